"""One experiment: nets that methods share, stages, and the notebooks by papermill."""

import json
import os
import subprocess
import sys

import pytest

from dfsbir.evaluation.results import read_results
from dfsbir.finegrained.config import METHODS
from dfsbir.finegrained.data import InstanceDataConfig
from dfsbir.finegrained.experiment import FineStudy, write_result
from dfsbir.finegrained.study import make_study


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_a_study(method):
    study = make_study(method)
    assert study.finegrained.pairs and (study.pretraining is None) == (
        study.pretraining_preset is None
    )


def test_a_teacher_has_what_its_student_has_but_for_the_method():
    changes = {
        "encoder": {"size": 32, "channels": 3, "head": "both"},
        "training": {"lr": 1e-3, "ema_decay": 0.9},
        "views.flip": 0.1,
        "distillation.tau": 0.3,
        "seed": 4,
    }
    teacher = make_study("full", changes, {"training.epochs": 3}).pretraining
    assert teacher.encoder.size == 32 and teacher.encoder.head == "discriminative"
    assert teacher.training.lr == 1e-3 and teacher.training.ema_decay == 0.98
    assert teacher.training.epochs == 3 and teacher.views.flip == 0.1 and teacher.seed == 4
    assert teacher.pairs is None and teacher.distillation is None


def test_what_needs_which_net():
    presets = {method: make_study(method).pretraining_preset for method in METHODS}
    assert presets["triplet"] is None and presets["full"] == presets["rkd"] == "teacher"
    assert presets["jigsaw"] == "jigsaw-pretext" and presets["edge2sketch"] is None
    assert make_study("triplet", start="teacher").pretraining_preset == "teacher"


def test_studies_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="'fulll'"):
        make_study("fulll")
    with pytest.raises(ValueError, match="pairs.batch"):
        make_study("triplet", {"pairs.bach": 3})
    with pytest.raises(ValueError, match="bridge"):
        make_study("jigsaw", bridge="somewhere")


def tiny_study(tiny_config, method, start="random", **changes):
    "A study of a method that ends in seconds."
    tiny = {k: v for k, v in tiny_config(method).flat().items() if v is not None}
    data = InstanceDataConfig(toy_images=20, toy_test=12, toy_unlabelled=12, unseen="held-out")
    unlabelled = {"unlabelled.batch": 8, "training.epochs": 1}
    return make_study(method, tiny | changes, unlabelled, data=data, start=start)


def run_stages(study):
    study.read()
    study.prepare()
    study.train()
    result = study.measure()
    write_result(study, result)
    return result


def test_the_stages(tmp_path, tiny_config):
    study = FineStudy(tiny_study(tiny_config, "full"), tmp_path / "full", tmp_path / "shared")
    result = run_stages(study)
    assert set(result.reports) == {"last", "validation-chosen", "unseen"}
    rows = read_results(tmp_path / "full" / "results.csv")
    assert {(row["dataset"], row["method"], row["variant"]) for row in rows} == {
        ("toy-instance", "full", ""),
        ("toy-instance", "full", "validation-chosen"),
        ("toy-instance/unseen", "full", ""),
    }
    assert {row["metric"] for row in rows} == {"Acc@1", "Acc@5", "Acc@10"}
    summary = json.loads((tmp_path / "full" / "summary.json").read_text())
    assert len(summary["reports"]["last"]["ranks"]) == 12
    study.run.close()

    again = FineStudy(tiny_study(tiny_config, "full"), tmp_path / "full", tmp_path / "shared")
    assert run_stages(again).reports["last"].metrics == result.reports["last"].metrics
    assert len(read_results(tmp_path / "full" / "results.csv")) == len(rows), "no row twice"
    assert json.loads((tmp_path / "full" / "summary.json").read_text()) == summary


def test_methods_share_their_teacher(tmp_path, tiny_config):
    "Of the same data and seed; another seed has another one."
    for name, method, seed in (("a", "full", 0), ("b", "rkd", 0), ("c", "full", 1)):
        config = tiny_study(tiny_config, method, seed=seed)
        study = FineStudy(config, tmp_path / name, tmp_path / "shared")
        study.read()
        study.prepare()
    kept = sorted(folder.name for folder in (tmp_path / "shared").iterdir())
    assert [name[:14] for name in kept] == ["teacher-toy-0-", "teacher-toy-1-"]


@pytest.mark.parametrize("method, start", [("jigsaw", "random"), ("triplet", "teacher")])
def test_training_starts_from_the_net_of_unlabelled_photos(tmp_path, tiny_config, method, start):
    pytest.importorskip("skimage")
    config = tiny_study(tiny_config, method, start)
    study = FineStudy(config, tmp_path / "run", tmp_path / "shared")
    result = run_stages(study)
    (kept,) = (tmp_path / "shared").iterdir()
    assert kept.name.startswith(config.pretraining_preset) and study.start is not None
    assert (study.teacher is None) == (start == "random")
    assert result.reports["last"].gallery == 12


def test_other_settings_do_not_go_on_in_the_same_folder(tmp_path, tiny_config):
    study = FineStudy(tiny_study(tiny_config, "triplet"), tmp_path / "run")
    run_stages(study)
    study.run.close()
    with pytest.raises(ValueError, match="finegrained.training.lr"):
        FineStudy(tiny_study(tiny_config, "triplet", **{"training.lr": 0.1}), tmp_path / "run")


# ---- the notebooks, by papermill


@pytest.fixture
def papermill(tmp_path, root):
    "The function papermill(notebook, **parameters), which runs a notebook of experiments."

    def run(notebook, **parameters):
        words = []
        for name, value in parameters.items():
            words += ["-r" if isinstance(value, str) else "-p", name, str(value)]
        env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
        path = root / "nbs" / "experiments" / notebook
        command = [sys.executable, "-m", "papermill", path, "out.ipynb", "--no-progress-bar"]
        done = subprocess.run(
            [*command, *words],
            cwd=tmp_path,
            env=env | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=600,
        )
        return done

    return run


def test_the_notebooks(tmp_path, papermill, stages):
    "A tiny full run: teacher, student, results, report; then the report of the study."
    changes = {
        "encoder": {"size": 28, "backbone": stages},
        "pairs.batch": 6,
        "unlabelled.batch": 8,
        "distillation.k": 3,
        "training": {"epochs": 2, "epoch_steps": 2},
    }
    done = papermill(
        "finegrained.ipynb",
        toy_images=20,
        toy_test=12,
        toy_unlabelled=12,
        changes=json.dumps(changes),
        teacher_changes='{"training.epochs": 1, "unlabelled.batch": 8}',
        unseen="held-out",
        shared="kept",
        run_folder="runs/full",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "runs" / "full"
    assert len(read_results(run / "results.csv")) == 9
    assert "data:image/png;base64" in (run / "report.html").read_text()
    done = papermill("finegrained_report.ipynb", studies="runs", sensitivities="")
    assert done.returncode == 0, done.stderr[-3000:]
    text = (tmp_path / "out.ipynb").read_text()
    assert "| full |" in text and "not run" in text


def test_a_typo_is_found_before_anything_runs(tmp_path, papermill):
    done = papermill("finegrained.ipynb", changes='{"pairs.bach": 3}')
    assert done.returncode != 0 and "pairs.batch" in done.stderr
    assert not (tmp_path / "runs").exists()
