"""Stages: what is done is remembered, and warnings are kept for the report."""

import json

import pytest

from dfsbir.core.stages import Record


def test_stages_are_remembered(tmp_path, capsys):
    record = Record(tmp_path)
    with record.stage("first"):
        pass
    with pytest.raises(RuntimeError), record.stage("second"):
        raise RuntimeError
    again = Record(tmp_path)
    assert again["done"] == ["first"] and again["run_id"] == record["run_id"]
    assert set(again["seconds"]) == {"first", "second"}
    seconds = again["seconds"]["first"]
    with again.stage("first"):
        pass
    assert Record(tmp_path)["seconds"]["first"] == seconds, "what is done before does not count"
    with again.stage("second"):
        pass
    assert Record(tmp_path)["done"] == ["first", "second"]
    assert "second" in capsys.readouterr().out


def test_warnings_are_kept_for_the_report_and_looked_for_anew(tmp_path, capsys):
    record = Record(tmp_path)
    record.warn("the teacher guesses")
    assert "WARNING: the teacher guesses" in capsys.readouterr().out
    kept = json.loads((tmp_path / "record.json").read_text())
    assert kept["warnings"] == ["the teacher guesses"]
    assert Record(tmp_path)["warnings"] == []
