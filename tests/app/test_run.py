"""dfsbir run: mistakes end before anything starts."""

import sys

from app.helpers import fails

from dfsbir.app.parameters import notebook_parameters
from dfsbir.crossx.experiment import open_run, prepare_experiment


def test_mistaken_parameters_end_before_anything_starts(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "'seed'" in fails(capsys, "run", "-p", "sead", 1)
    assert "seed wants int" in fails(capsys, "run", "-p", "seed", "one")
    assert "true or false" in fails(capsys, "run", "-p", "ceiling", "maybe")
    assert not list(tmp_path.iterdir())


def test_a_failed_start_leaves_an_earlier_run_as_it_is(capsys, tmp_path, monkeypatch):
    "Mistakes that only the experiment can find, and parameters that differ from the run's."
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    parameters = {p.name: p.default for p in notebook_parameters()}
    _, configs = prepare_experiment(parameters)
    open_run({**parameters, "run_folder": str(run)}, configs["dfsbir"]).close()
    for name in ("run_experiment.ipynb", "report.html", "metrics.jsonl"):
        (run / name).write_text('{"step": 1}\n')
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    for name, value, named in [
        ("preset", "opn", "'open'"),
        ("photo_teacher", "nowhere.safetensors", "nowhere.safetensors"),
        ("teacher_net", "torchvision/resnet19", "resnet19"),
        ("changes", '{"students.rl": 1}', "students.lr"),
        ("changes", '{"students.start.kind": "cold", "students.start.net": "x/y"}', "timm"),
        ("seed", 1, "seed: 0 there, 1 here"),
    ]:
        assert named in fails(capsys, "run", "-p", "run_folder", run, "-p", name, value)
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_a_missing_extra_is_named(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "papermill", None)
    assert "dfsbir[run]" in fails(capsys, "run") and not list(tmp_path.iterdir())
