"""Figures and tables of runs."""

import json

import pytest
import torch

from dfsbir.finegrained.config import FineGrainedConfig
from dfsbir.finegrained.evaluation import InstanceReport, embed_pair, true_ranks
from dfsbir.finegrained.plots import (
    compare_runs,
    sensitivity,
    show_attention,
    show_ranks,
    stability,
)


def write_run(folder, method, seed, ranks, **changes):
    "A finished run with these ranks."
    folder.mkdir(parents=True)
    config = FineGrainedConfig.preset(method, {"seed": seed}, changes)
    parameters = {f"finegrained.{name}": value for name, value in config.flat().items()}
    (folder / "config.json").write_text(json.dumps({"parameters": parameters}))
    report = {"ranks": ranks, "metrics": InstanceReport(torch.tensor(ranks), 20).metrics}
    about = dict(dataset="a", method=method, variant="", seed=seed, seconds=3.0)
    summary = {**about, "spread": {"test/Acc@1": 0.02}, "reports": {"last": report}}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture
def folders(tmp_path):
    "Runs of full and triplet under two seeds."
    ranks = {
        "full": ([1, 1, 1, 2], [1, 1, 9, 1]),
        "triplet": ([1, 9, 9, 2], [9, 9, 9, 1]),
    }
    return [
        write_run(tmp_path / f"{method}{seed}", method, seed, of)
        for method, by_seed in ranks.items()
        for seed, of in enumerate(by_seed)
    ]


def test_compared_runs(folders):
    lines = compare_runs(folders).splitlines()
    assert lines[2].startswith("| triplet | **0.250** | 0.250, 0.250 |")
    assert lines[3].startswith("| full | **0.750** | 0.750, 0.750 |") and "+0.500" in lines[3]
    assert compare_runs(folders, "Acc@10").splitlines()[2].startswith("| triplet | **1.000**")


def test_drawings_of_a_photo_that_agree_do_not_narrow_the_intervals(folders):
    of_one = compare_runs(folders)
    for folder in folders:
        file = folder / "summary.json"
        summary = json.loads(file.read_text())
        last = summary["reports"]["last"]
        last["ranks"], last["instances"] = last["ranks"] * 9, [0, 1, 2, 3] * 9
        file.write_text(json.dumps(summary))
    assert compare_runs(folders) == of_one  # nine drawings that agree say what one does


def test_runs_of_two_data_sets_are_not_compared(folders):
    summary = json.loads((folders[0] / "summary.json").read_text())
    (folders[0] / "summary.json").write_text(json.dumps({**summary, "dataset": "b"}))
    with pytest.raises(ValueError, match="'a', 'b'"):
        compare_runs(folders)


@pytest.fixture
def usual(tmp_path):
    "Two runs of full that differ in their seed."
    return [write_run(tmp_path / f"usual{seed}", "full", seed, [1, 9]) for seed in (0, 1)]


def test_sensitivity(tmp_path, usual):
    tau = [
        write_run(tmp_path / f"tau{value}", "full", 0, [1, 1], **{"distillation.tau": value})
        for value in (0.05, 0.2)
    ]
    k = write_run(tmp_path / "k4", "full", 0, [9, 9], **{"distillation.k": 4})
    off = write_run(tmp_path / "off", "full", 0, [9, 9], **{"pairs.photo": None})
    axes = sensitivity([*usual, *tau, k, off]).axes
    points = {ax.get_xlabel(): ax.lines[-2].get_xydata().tolist() for ax in axes}
    assert points == {
        "distillation.k": [[4.0, 0.0], [8.0, 0.5]],
        "distillation.tau": [[0.05, 1.0], [0.1, 0.5], [0.2, 1.0]],
        "pairs.photo.weight": [[0.0, 0.0], [0.5, 0.5]],
    }


def test_sensitivity_to_nothing_or_to_several_settings_is_refused(tmp_path, usual):
    with pytest.raises(ValueError, match="do not differ"):
        sensitivity(usual)
    both = {"distillation.tau": 0.2, "distillation.k": 4}
    two = write_run(tmp_path / "two", "full", 0, [1, 1], **both)
    with pytest.raises(ValueError, match="distillation.k.*distillation.tau"):
        sensitivity([*usual, two])


def test_stability_has_a_curve_for_every_figure():
    full = [
        {"step": i, "test/Acc@1": i / 10, "test raw/Acc@1": i / 20, "val/Acc@1": 0.1}
        for i in range(1, 10)
    ]
    triplet = [{"step": line["step"], "test/Acc@1": 0.2} for line in full]
    (ax,) = stability({"full": full, "triplet": triplet}).axes
    assert len(ax.lines) == 4


def test_ranks_are_shown_with_the_true_photo_framed(teacher, toy):
    axes = show_ranks(teacher, *toy, rows=3, k=5).axes
    ranks = true_ranks(*embed_pair(teacher, *toy), toy[1].instances, toy[0].instances)
    titles = [ax.get_ylabel() for ax in axes if ax.get_ylabel()]
    assert len(axes) == 18
    assert titles[0] == f"rank {ranks.min()}" and titles[-1] == f"rank {ranks.max()}"
    for row in range(3):
        spines = [ax.spines["top"] for ax in axes[row * 6 + 1 : row * 6 + 6]]
        framed = [
            spine
            for spine in spines
            if spine.get_linestyle() == "-" and spine.get_edgecolor()[1] > 0.5
        ]
        assert len(framed) == 1


def test_attention_of_both_outputs(tiny_encoder, test_toy):
    encoder = tiny_encoder()
    fig = show_attention(encoder, test_toy[1], 3)
    pictures = [ax.images[0].get_array() for ax in fig.axes if ax.images]
    assert len(pictures) == 9
    for attention in pictures[3:]:
        assert attention.max() == pytest.approx(1)
    assert encoder.training, "its mode is left as it was"
