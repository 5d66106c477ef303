"""Tables of a study of many runs."""

import json

import pytest
import torch

from dfsbir.finegrained.evaluation import InstanceReport
from dfsbir.finegrained.experiment import FineStudy, write_result
from dfsbir.finegrained.report import (
    Study,
    any_drawing_table,
    beside_published,
    bridge_table,
    choices_table,
    example_figures,
    jitter,
    links_table,
    order_of_methods,
    steadiness_table,
    unseen_table,
)
from dfsbir.finegrained.study import make_study


def write_run(root, method, seed, ranks, variant="", spread=None, figures=(), unseen=None):
    folder = root / f"{method}-{variant}-{seed}"
    folder.mkdir(parents=True)
    reports = {"last": ranks} | ({"unseen": unseen} if unseen else {})
    summary = dict(
        dataset="a",
        method=method,
        variant=variant,
        seed=seed,
        seconds=1.0,
        spread=spread or {},
        reports={
            name: {"ranks": of, "metrics": InstanceReport(torch.tensor(of), 20).metrics}
            for name, of in reports.items()
        },
    )
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, figures)))


def test_an_empty_study_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        Study.read([tmp_path])


def test_runs_are_found_by_method_and_variant(tmp_path):
    for seed in (1, 0):
        write_run(tmp_path, "full", seed, [1, 2])
    write_run(tmp_path, "full", 0, [1, 2], variant="other")
    study = Study.read([tmp_path])
    assert [run.seed for run in study.of("a", "full")] == [0, 1]
    assert len(study.of("a", variant=None)) == 3 and len(study.of("b")) == 0
    assert "a 3" in str(study)


@pytest.mark.parametrize(
    "better, verdict",
    [
        ([1] * 20, "holds:"),
        ([9] * 20, "contradicted"),
        ([1] * 11 + [9] * 9, "holds within"),
        ([9] * 11 + [1] * 9, "does not hold"),
    ],
)
def test_the_verdict_follows_from_the_interval(tmp_path, better, verdict):
    for seed in (0, 1):
        write_run(tmp_path, "triplet", seed, [1, 9] * 10)
        write_run(tmp_path, "strong", seed, better)
    assert verdict in order_of_methods(Study.read([tmp_path]), "a", [("triplet", "strong")])


def test_methods_with_other_seeds_are_not_compared(tmp_path):
    write_run(tmp_path, "triplet", 0, [1, 9])
    write_run(tmp_path, "strong", 1, [1, 9])
    assert order_of_methods(Study.read([tmp_path]), "a") == ""


def test_the_bridge(tmp_path):
    write_run(tmp_path, "strong", 0, [9] * 8, "CrossX nets afresh", unseen=[9, 9])
    assert bridge_table(Study.read([tmp_path])) is None
    write_run(tmp_path, "strong", 0, [1] * 4 + [9] * 4, "from CrossX encoders", unseen=[1, 9])
    lines = bridge_table(Study.read([tmp_path])).splitlines()
    assert "0.000" in lines[2] and "0.500 | +0.500" in lines[3] and "0.500 | 1.000" in lines[3]


def test_steadiness_with_and_without_averaging(tmp_path):
    figures = [{"step": i, "test/Acc@1": 0.1 * (i % 2)} for i in range(18)]
    write_run(tmp_path, "triplet", 0, [1], spread={"test/Acc@1": 0.02}, figures=figures)
    both = [{**line, "test raw/Acc@1": 2 * line["test/Acc@1"]} for line in figures]
    spreads = {"test/Acc@1": 0.01, "test raw/Acc@1": 0.04}
    write_run(tmp_path, "full", 0, [1], spread=spreads, figures=both)
    write_run(tmp_path, "strong", 0, [1])  # too short for a spread
    lines = steadiness_table(Study.read([tmp_path])).splitlines()[2:]
    assert len(lines) == 2
    assert "triplet" in lines[0] and "0.0200" in lines[0]
    assert "0.0100 | 0.0400 | 0.25" in lines[1] and "0.50 | 1 |" in lines[1]


def test_jitter_is_what_a_line_leaves():
    climbing = [{"a": 0.01 * i} for i in range(30)]
    assert jitter(climbing, "a") == pytest.approx(0.0, abs=1e-9)
    jumping = [{"a": 0.1 * (i % 2)} for i in range(30)]
    assert jitter(jumping, "a") == pytest.approx(0.05, rel=0.05)
    assert jitter(climbing[:17], "a") is None


def test_unseen_figures(tmp_path):
    write_run(tmp_path, "full", 0, [1, 1], unseen=[1, 9])
    (line,) = unseen_table(Study.read([tmp_path])).splitlines()[2:]
    assert "0.500 | 1.000" in line


def test_ours_stand_beside_the_published_figures(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path, "strong", seed, [1, 9, 9, 9])
        write_run(tmp_path, "strong", seed, [1, 1, 1, 9], variant="pretrained")
    study = Study.read([tmp_path])
    for variants, ours in (({}, "0.250"), ({"a": "pretrained"}, "0.750")):
        lines = beside_published(study, variants)._repr_markdown_().splitlines()
        (strong,) = [line for line in lines if line.startswith("| strong")]
        assert strong.split() == ["|", "strong", "|", "0.442", "|", "0.712", "|", ours, "|"]
    (full,) = [line for line in lines if line.startswith("| full")]
    assert "0.483" in full or "0.484" in full


def test_any_of_several_drawings(tmp_path):
    write_run(tmp_path, "strong", 0, [1, 9])
    assert any_drawing_table(Study.read([tmp_path]), "a") is None
    file = tmp_path / "strong--0" / "summary.json"
    summary = json.loads(file.read_text())
    report = InstanceReport(torch.tensor([1, 9, 9, 9]), 20, instances=torch.tensor([0, 0, 1, 1]))
    summary["reports"]["last"]["metrics"] = report.metrics
    file.write_text(json.dumps(summary))
    lines = any_drawing_table(Study.read([tmp_path]), "a")._repr_markdown_().splitlines()
    assert lines[2] == "| strong | 0.250 | 0.500 | 0.250 | 0.500 | 1 |"


def test_choices_are_ordered_by_held_back_photos(tmp_path):
    figures = {"K 3": (0.4, 0.5), "K 8": (0.5, 0.6), "not measured": (None, None)}
    for variant, by_seed in figures.items():
        for seed, value in enumerate(by_seed):
            line = {"test/Acc@1": 1 - (value or 0)}  # which the table must not look at
            if value is not None:
                line |= {"val/Acc@1": value, "val/mean rank": 2.0}
            first = {"val/Acc@1": 0.9, "val/mean rank": 1.0}  # of an earlier epoch
            write_run(tmp_path, "full", seed, [1], variant, figures=[first, line])
    write_run(tmp_path, "strong", 0, [1])  # no log at all
    lines = choices_table(Study.read([tmp_path]), "a")._repr_markdown_().splitlines()
    assert lines[2:] == [
        "| K 8 | full | 0.550 ± 0.071 | 2.000 ± 0.000 | 2 |",
        "| K 3 | full | 0.450 ± 0.071 | 2.000 ± 0.000 | 2 |",
    ]
    assert choices_table(Study.read([tmp_path]), "b") is None


def test_links_of_finished_runs(tmp_path, tiny_config):
    "The teacher of the shared folder is found again, and no image set is needed but the run's."
    data = dict(toy_images=16, toy_test=12, toy_unlabelled=10, validation=0)
    for method in ("strong", "full"):
        flat = tiny_config(method).flat()
        changes = {k: v for k, v in flat.items() if k.split(".")[0] in ("encoder", "pairs")}
        changes |= {"training.epochs": 1, "training.epoch_steps": 1}
        if method == "full":
            changes |= {"unlabelled.batch": 6, "distillation.k": 3}
        study = FineStudy(
            make_study(method, changes, {"unlabelled.batch": 6}, data=data),
            tmp_path / "runs" / method,
            tmp_path / "shared",
        )
        study.read()
        study.prepare()
        study.train()
        write_result(study, study.measure())
    teachers = sorted((tmp_path / "shared").iterdir())
    table = links_table(Study.read([tmp_path / "runs"]), "toy-instance", tmp_path / "shared")
    shown = table._repr_markdown_()
    for words in ("before: ", "teacher: ", "full: shares", "strong: shares", "by chance"):
        assert words in shown
    assert sorted((tmp_path / "shared").iterdir()) == teachers, "no teacher was trained anew"
    assert links_table(Study.read([tmp_path / "runs"]), "another", tmp_path) is None
    (run,) = Study.read([tmp_path / "runs"]).of("toy-instance", "full")
    ranks, attention = example_figures(run)
    assert len(attention.axes) == 18 and len(ranks.axes) > 6
