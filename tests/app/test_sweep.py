"""Sweeps: failures are kept apart, nothing is run twice or lost, Ctrl-C stops cleanly."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from app.helpers import call, grid_of, times

from dfsbir.app.file_lock import exclusive
from dfsbir.app.grid import LOCK, LOG, RECORD
from dfsbir.app.sweep import run_job, run_sweep


def test_failures_are_kept_apart_and_nothing_runs_twice(place, monkeypatch):
    """One job fails, one kernel is killed, two work; again: nothing. Retry: what failed, alone.

    Threads are divided among the processes.
    """
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    lines = []
    grid = grid_of(place, "cells: [{method: [crash, die, plain]}, {seed: 1}]")
    states = run_sweep(grid, processes=2, log=lines.append)
    found = {state: sorted(job.name for job in jobs) for state, jobs in states.items() if jobs}
    assert found == {
        "done": ["plain seed 0", "plain seed 1"],
        "failed": ["crash seed 0", "die seed 0"],
    }
    crash, die, plain, _ = grid.jobs
    assert "it broke" in crash.record["error"] and "it broke" in (crash.folder / LOG).read_text()
    assert (crash.folder / "small.ipynb").is_file()
    assert "Kernel died" in die.record["error"] and not (die.folder / "results.csv").exists()
    for job in grid.jobs:
        for line in (job.folder / "times.txt").read_text().splitlines():
            assert line.split()[1] == "2", "threads"
    assert len(lines) == 5 and "3 left" in lines[1]
    assert lines[0].startswith("g.yaml: 4 jobs, 0 done before, 4 to run")

    run_sweep(grid, log=lines.append)
    assert [times(job) for job in grid.jobs] == [1, 1, 1, 1]
    assert "0 to run, 2 failed before" in lines[-1]
    assert run_job(plain) == plain.record and times(plain) == 1, "not even when asked for directly"
    (die.folder / RECORD).write_text(json.dumps({"state": "done"}))  # only the crash is left
    states = run_sweep(grid, retry=True, log=lines.append)
    assert len(states["done"]) == 4 and [times(job) for job in grid.jobs] == [2, 1, 1, 1]
    assert call("sweep", "g.yaml") == 0


def test_a_job_that_another_process_runs_is_left_alone(place):
    grid, lines = grid_of(place, "cells: [{method: plain}]"), []
    (job,) = grid.jobs
    with exclusive(job.folder / LOCK):
        (job.folder / RECORD).write_text(json.dumps({"state": "running", "seconds": 0}))
        assert job.state == "running" and run_job(job)["state"] == "running"
        assert run_sweep(grid, log=lines.append)["running"] == [job]
    assert times(job) == 0 and job.state == "stopped", "nobody holds it: it can be continued"


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_ctrl_c_stops_cleanly_and_the_same_command_goes_on(place):
    job = grid_of(place, "cells: [{method: sleep}, {method: sleep, seed: 1}]").jobs[0]
    command = [sys.executable, "-m", "dfsbir.app.cli", "sweep", "g.yaml"]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    ) as sweep:
        while not times(job):
            assert sweep.poll() is None, sweep.communicate()
            time.sleep(0.1)
        assert job.state == "running"
        # as SIGINT, which is ignored where tests run in the background
        sweep.send_signal(signal.SIGTERM)
        _, err = sweep.communicate(timeout=120)
    assert sweep.returncode == 130 and "Traceback" not in err
    assert "0 of 2 jobs are done" in err
    assert job.state == "stopped" and not (job.folder / "results.csv").exists()
    kernel = int((job.folder / "times.txt").read_text().split()[0])
    deadline = time.monotonic() + 60
    while Path(f"/proc/{kernel}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{kernel}").exists(), "its notebook ended with it"
    (place / "g.yaml").write_text("notebook: small.ipynb\ncells: [{method: sleep}]\n")
    assert call("sweep", "g.yaml") == 0 and times(job) == 2


def test_on_a_local_ray_of_two_workers(place):
    pytest.importorskip("ray", reason="the extra ray is not installed")
    grid, lines = grid_of(place, "cells: [{method: [plain, crash], seed: [0, 1]}]"), []
    states = run_sweep(grid, processes=2, ray="local", threads=1, log=lines.append)
    assert sorted(job.name for job in states["done"]) == ["plain seed 0", "plain seed 1"]
    assert len(states["failed"]) == 2
    assert all("it broke" in job.record["error"] for job in states["failed"])
    assert [times(job) for job in grid.jobs] == [1, 1, 1, 1]


def test_no_processes(place):
    with pytest.raises(ValueError, match="0"):
        run_sweep(grid_of(place, "cells: [{}]"), processes=0)


# ---- the command


def test_the_command_lists_runs_and_reports(place, capsys):
    (place / "g.yaml").write_text(
        "notebook: small.ipynb\ncells: [{method: plain}, {method: crash}]\n"
    )
    assert call("sweep", "g.yaml", "--list") == 0
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == 2 and all(line.startswith("new") for line in listed)
    assert call("sweep", "g.yaml") == 1
    text = capsys.readouterr().out
    assert "crash seed 0" in text and "dfsbir sweep g.yaml --retry" in text
    assert call("sweep", "g.yaml", "--list") == 0 and "it broke" in capsys.readouterr().out
    assert call("sweep", "g.yaml", "--rebuild", "all.csv") == 0
    assert call("sweep", "runs/g", "--rebuild", "again.csv") == 0
    assert (place / "all.csv").read_text() == (place / "again.csv").read_text()
    assert call("sweep", "none.yaml") == 2 and "none.yaml" in capsys.readouterr().err
