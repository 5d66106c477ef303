"""dfsbir run: mistakes end before anything starts."""

import sys

from app.helpers import fails


def test_mistaken_parameters_end_before_anything_starts(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "'seed'" in fails(capsys, "run", "-p", "sead", 1)
    assert "seed wants int" in fails(capsys, "run", "-p", "seed", "one")
    assert "true or false" in fails(capsys, "run", "-p", "ceiling", "maybe")
    assert not list(tmp_path.iterdir())


def test_a_missing_extra_is_named(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "papermill", None)
    assert "dfsbir[run]" in fails(capsys, "run") and not list(tmp_path.iterdir())
