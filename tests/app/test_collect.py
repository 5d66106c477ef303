"""Results of a sweep: put together from finished runs, the newer one of two, again the same."""

import json
import os

import pytest

from dfsbir.app.collect import rebuild_results
from dfsbir.app.grid import RECORD
from dfsbir.evaluation.results import RESULT_COLUMNS, append_results, read_results


def write_run(path, run, value, method="m"):
    "The folder of a run with one row of results."
    path.mkdir(parents=True)
    row = dict(dataset="d", method=method, seed=0, metric="mAP@all", value=value)
    append_results(path / "results.csv", [{**row, "seconds": 1, "device": "cpu", "run_id": run}])
    return path


def test_results_are_rebuilt_from_finished_runs(tmp_path):
    write_run(tmp_path / "a", "a", 0.1, "crossx-dfsbir")
    write_run(tmp_path / "b" / "deep", "b", 0.2, "teacher-features")
    write_run(tmp_path / "failed", "f", 0.9, "n")
    (tmp_path / "failed" / RECORD).write_text(json.dumps({"state": "failed"}))
    older = write_run(tmp_path / "older", "o", 0.3, "crossx-dfsbir")
    os.utime(older / "results.csv", (0, 0))
    lines, target = [], tmp_path / "all.csv"
    assert rebuild_results([tmp_path], target, lines.append) == 2
    found = [(row["method"], row["run_id"]) for row in read_results(target)]
    assert found == [("teacher-features", "b"), ("crossx-dfsbir", "a")], "newer; floor to ceiling"
    assert any("by o and by a" in line for line in lines)
    before = target.read_bytes()
    rebuild_results([tmp_path], target, lines.append)
    assert target.read_bytes() == before
    assert before.decode().splitlines()[0] == ",".join(RESULT_COLUMNS)
    with pytest.raises(ValueError, match="failed"):
        rebuild_results([tmp_path / "failed"], target)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        rebuild_results([tmp_path / "nowhere"], target)
    assert target.read_bytes() == before
