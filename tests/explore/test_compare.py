"All runs in a table, and two of them side by side."

import json
import shutil

import pytest

from dfsbir.core.types import MODALITIES
from dfsbir.evaluation.report import evaluate_retrieval
from dfsbir.evaluation.results import append_results
from dfsbir.explore.compare import (
    compare_html,
    compare_runs,
    config_differences,
    html_table,
    measured_map,
    retrieval_report,
    runs_table,
    settings_table,
)
from dfsbir.explore.pictures import png_bytes
from dfsbir.explore.runs import Run


@pytest.fixture
def measured(home, tmp_path):
    "A run with the published preset inside it, and a table of results for both."
    folder = tmp_path / "one"
    shutil.copytree(home / "one", folder)
    config = json.loads((folder / "config.json").read_text())
    config["parameters"] = {"dataset": "toy", "preset": "both"}
    (folder / "config.json").write_text(json.dumps(config))
    return Run(folder), Run(folder / "paper")


ROW = {"dataset": "toy", "seed": 0, "metric": "mAP@all", "seconds": 1.0}
ROW |= {"device": "cpu", "run_id": "x"}
METHODS = {"random": 0.1, "teacher-posteriors": 0.4, "crossx-paper": 0.25, "crossx-dfsbir": 0.5}


def test_measured_precision_of_a_run_and_of_the_one_inside_it(measured):
    outer, inner = measured
    assert measured_map(outer) == measured_map(inner) == {}
    unmeasured = runs_table({"outer": outer})
    rows = [ROW | {"method": method, "value": value} for method, value in METHODS.items()]
    append_results(outer.path / "results.csv", rows)
    both = {"random order": 0.1, "teachers": 0.4}
    assert measured_map(outer) == {**both, "this run": 0.5}
    assert measured_map(inner) == {**both, "this run": 0.25}
    assert "not measured" in unmeasured
    table = runs_table({"outer": outer, "inner": inner})
    assert "not measured" not in table
    assert "0.500" in table and "0.250" in table and table.index("outer") < table.index("inner")


def test_the_ceiling_has_its_own_precision(ceiling):
    rows = [ROW | {"method": method, "value": value} for method, value in METHODS.items()]
    file = ceiling.path.parent / "results.csv"
    append_results(file, [*rows, ROW | {"method": "data-dependent", "value": 0.75}])
    measured = measured_map(ceiling), measured_map(Run(ceiling.path.parent))
    file.unlink()
    assert [found["this run"] for found in measured] == [0.75, 0.5]


def test_settings_that_differ(run, paper):
    found = {name: values for name, *values in config_differences(run, paper)}
    assert found["pairs.conditioned"] == [True, False]
    assert found["pairs.sketch.kind"] == ["stroke", "pixel"]
    assert found["pairs.sketch.strokes"][1] is None  # pixels have no strokes
    assert "seed" not in found and not config_differences(run, run)


def test_precision_is_that_of_the_retrieval_report(run, sets):
    report = retrieval_report(run, sets)
    photos, sketches = (run.encoders[m](s.images()) for m, s in zip(MODALITIES, sets))
    labels = [[run.classes.index(s.classes[k]) for k in s.labels] for s in sets]
    tensor = sets[0].labels.new_tensor
    slow = evaluate_retrieval(sketches, photos, tensor(labels[1]), tensor(labels[0]))
    assert report.metrics["mAP@all"] == pytest.approx(slow.metrics["mAP@all"], abs=1e-5)
    assert retrieval_report(run, sets) is report


def test_comparison_names_every_class_and_setting(runs, sets, is_png):
    text = compare_html(runs, "one", "one/paper", lambda run: sets)
    for words in (*sets[0].classes, "pairs.conditioned", "random order", "45 sketches"):
        assert words in text
    alone = compare_html(runs, "one", "one", lambda run: sets)
    assert "pairs.conditioned" not in alone and "difference" not in alone
    assert "choose another run" in alone and "random order" in alone
    single = compare_html({"one": runs["one"]}, "one", "one", lambda run: sets)
    assert "there is one run here" in single and single.count("<th>one</th>") == 1
    picture = compare_runs(runs["one"], runs["one/paper"], ("one", "one/paper"))
    assert is_png(png_bytes(picture))


def test_the_title_of_a_wide_table_does_not_scroll_away():
    text = html_table(["a"], [["b"]], "all runs")
    assert text.index("all runs") < text.index("dfs-table")  # outside of what scrolls


def test_settings_have_digits_that_can_be_read():
    text = settings_table(("a", "b"), [("weight", 2.1714724095162588, 3e-05)])
    assert "2.17147<" in text and "3e-05" in text


def test_settings_that_one_run_lacks_are_folded():
    both, own = ("seed", 1, 2), ("pairs.strokes", 12, None)
    text = settings_table(("a", "b"), [both, own])
    folded = text.index("<details>")
    assert text.index("seed") < folded < text.index("pairs.strokes") and "1 setting that" in text
    assert "details" not in settings_table(("a", "b"), [both])
    assert "settings that differ" not in settings_table(("a", "b"), [own])


def test_a_run_without_samples_is_compared(run, objects, is_png):
    assert is_png(png_bytes(compare_runs(run, objects)))


def test_tables_escape_what_they_show():
    assert "<script>" not in html_table(["a"], [["<script>"], [None], [0.5]], "<b>")
