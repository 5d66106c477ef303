"""Pictures and tables of a run."""

import pytest
import torch
from crossx.helpers import CONFIGS, OPEN, begin

from dfsbir.core.types import MODALITIES
from dfsbir.crossx.plots import (
    diversity_table,
    metrics_table,
    per_class_table,
    show_growth,
    show_losses,
)
from dfsbir.evaluation.results import METRICS
from dfsbir.inversion.estimator import measure_diversity


@pytest.fixture(scope="module")
def run(teachers, tmp_path_factory):
    crossx, run = begin(teachers, CONFIGS["dfsbir"], tmp_path_factory.mktemp("run") / "run")
    crossx.fit(run, progress=False)
    return run


def test_growth_has_a_row_for_each_step(run):
    fig = show_growth(run, rows=2)
    assert [ax.get_ylabel() for ax in fig.axes] == ["step 1", "step 4"]


def test_a_run_without_estimates_has_no_growth(teachers, tmp_path):
    _, run = begin(teachers, OPEN, tmp_path / "open")
    with pytest.raises(ValueError, match="open"):
        show_growth(run)


def test_losses_are_those_of_the_log(run):
    fig = show_losses(run, columns=3)
    shown = {ax.get_title(): ax.lines[0].get_ydata() for ax in fig.axes if ax.get_visible()}
    log = run.metrics()
    assert set(shown) == {k for line in log for k in line if k.startswith(("estimator", "student"))}
    for name, values in shown.items():
        assert list(values) == [line[name] for line in log if name in line]


def test_a_run_without_a_line_of_losses_is_drawn(tmp_path, teachers):
    _, run = begin(teachers, CONFIGS["dfsbir"], tmp_path / "run")
    assert not [ax for ax in show_losses(run).axes if ax.get_visible()]


def test_diversity_is_measured_by_modality():
    images = {
        m: (torch.rand(6, m.channels, 8, 8), torch.tensor([0, 0, 0, 1, 1, 1])) for m in MODALITIES
    }
    table = diversity_table({"mine": images})
    for m in MODALITIES:
        assert f"{measure_diversity(*images[m]):.3f}" in table.splitlines()[2]


def test_methods_stand_in_the_order_from_floor_to_ceiling():
    values = dict.fromkeys(METRICS, 0.25)
    keys = [("data-dependent", ""), ("crossx-dfsbir", "open"), ("random", ""), ("mine", "")]
    table = metrics_table("toy", dict.fromkeys(keys, values), {keys[1]: 12.4}, values)
    lines = table.splitlines()
    names = [line.split(" | ")[0].strip("| ") for line in lines[2:]]
    assert names == ["random", "crossx-dfsbir (open)", "data-dependent", "mine", "*bound*"]
    assert lines[3].split(" | ")[-1].strip(" |") == "12"


def test_classes_are_rows():
    table = per_class_table({"a": {"cup": 0.5, "fish": 1.0}, "b": {"cup": 0.25, "fish": 0.125}})
    assert "| fish | 1.000 | 0.125 |" in table
