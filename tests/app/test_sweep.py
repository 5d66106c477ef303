"""Sweeps: failures are kept apart, nothing is run twice or lost, Ctrl-C stops cleanly."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from app.helpers import BODY, PARAMETERS, call, grid_of, notebook_of, times

from dfsbir.app.file_lock import exclusive
from dfsbir.app.grid import LOCK, LOG, RECORD
from dfsbir.app.sweep import GpuPool, machine_gpus, run_job, run_sweep


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


def sweep_on_ray(grid, **options):
    "A sweep on a local Ray; skips where the machine is too busy for Ray to start."
    pytest.importorskip("ray", reason="the extra ray is not installed")
    try:
        return run_sweep(grid, ray="local", threads=1, **options)
    except RuntimeError as error:
        if "did not start" not in str(error):
            raise
        pytest.skip(str(error))


def test_on_a_local_ray_of_two_workers(place):
    grid, lines = grid_of(place, "cells: [{method: [plain, crash], seed: [0, 1]}]"), []
    states = sweep_on_ray(grid, processes=2, log=lines.append)
    assert sorted(job.name for job in states["done"]) == ["plain seed 0", "plain seed 1"]
    assert len(states["failed"]) == 2
    assert all("it broke" in job.record["error"] for job in states["failed"])
    assert [times(job) for job in grid.jobs] == [1, 1, 1, 1]


class FakeRay(ModuleType):
    "Runs a task as soon as somebody waits for it, and notes what was asked for."

    def __init__(self, gpus=0, failing_starts=0):
        super().__init__("ray")
        self.gpus, self.failing_starts = gpus, failing_starts
        self.starts, self.stops, self.asked = 0, 0, []
        self.exceptions = SimpleNamespace(RayError=OSError)

    def is_initialized(self):
        return False

    def init(self, *place, **options):
        self.starts += 1
        if self.starts <= self.failing_starts:
            raise Exception("The current node timed out during startup.")

    def shutdown(self):
        self.stops += 1

    def cluster_resources(self):
        return {"CPU": 8.0} | ({"GPU": float(self.gpus)} if self.gpus else {})

    def remote(self, **options):
        def remote_of(function):
            return FakeTask(self, function)

        return remote_of

    def wait(self, references, **options):
        return references[:1], references[1:]

    def get(self, reference):
        return reference()


class FakeTask:
    "A function of FakeRay."

    def __init__(self, ray, function):
        self.ray, self.function = ray, function

    def options(self, **options):
        self.ray.asked.append(options)
        return self

    def remote(self, *args):
        return partial(self.function, *args)


@pytest.fixture
def fake_ray(monkeypatch):
    "A function that installs a FakeRay in the place of Ray."

    def install(**options):
        fake = FakeRay(**options)
        monkeypatch.setitem(sys.modules, "ray", fake)
        return fake

    return install


def test_a_ray_that_does_not_start_is_tried_again(place, fake_ray):
    ray = fake_ray(failing_starts=2)
    grid = grid_of(place, "cells: [{}]")
    assert len(run_sweep(grid, ray="local", log=lambda line: None)["done"]) == 1
    assert ray.starts == 3 and ray.stops == 3, "what was begun is cleared away"
    ray = fake_ray(failing_starts=9)
    with pytest.raises(RuntimeError, match="did not start"):
        run_sweep(grid_of(place, "cells: [{seed: 1}]"), ray="local", log=lambda line: None)


@pytest.mark.parametrize(
    "address, gpus, processes, asked",
    [
        ("local", 0, 2, [0, 0]),
        ("local", 2, 2, [1, 0]),
        ("local", 4, 2, [1, 0]),
        ("local", 1, 4, [0.25, 0]),
        ("ray://there:10001", 8, 1, [1, 0]),
    ],
)
def test_gpus_that_jobs_ask_ray_for(place, fake_ray, address, gpus, processes, asked):
    "One each; a share where more jobs run here than there are GPUs; none on the CPU."
    (place / "small.ipynb").write_text(notebook_of(PARAMETERS + 'device = "auto"\n', BODY))
    ray = fake_ray(gpus=gpus)
    grid = grid_of(place, "cells: [{device: [auto, cpu]}]")
    states = run_sweep(grid, processes, address, threads=1, log=lambda line: None)
    assert len(states["done"]) == 2
    assert [options["num_gpus"] for options in ray.asked] == asked


# ---- graphics cards

SEEN = """
(run / "seen.txt").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
"""


@pytest.fixture
def seeing(place):
    "The small experiment also writes which GPUs it sees, and has a device."
    notebook = notebook_of(PARAMETERS + 'device = "auto"\n', BODY + SEEN)
    (place / "small.ipynb").write_text(notebook)
    return place


def seen_by(jobs):
    return {job.name: (job.folder / "seen.txt").read_text() for job in jobs}


@pytest.mark.parametrize(
    "named, gpus",
    [("2,5", ["2", "5"]), ("", []), ("-1", []), ("0, 1,-1,2", ["0", "1"]), ("GPU-8a", ["GPU-8a"])],
)
def test_gpus_are_those_that_this_process_sees(monkeypatch, named, gpus):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert machine_gpus() == gpus


def test_without_a_variable_gpus_are_counted(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    assert machine_gpus() == ["0", "1", "2"]


def test_a_job_gets_the_gpu_with_the_fewest_jobs(place):
    job = grid_of(place, "cells: [{}]").jobs[0]
    pool = GpuPool(["2", "5"])
    with pool.lend(job) as first, pool.lend(job) as second:
        assert [first, second] == ["2", "5"]
        with pool.lend(job) as third:
            assert third == "2"
            assert pool.jobs == {"2": 2, "5": 1}
    assert pool.jobs == {"2": 0, "5": 0}
    with GpuPool([]).lend(job) as none:
        assert none is None


def test_each_job_sees_a_gpu_of_its_own_and_cpu_jobs_none_of_them(seeing, monkeypatch):
    "As on a machine with two GPUs."
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    grid = grid_of(seeing, "cells: [{seed: [0, 1]}]")
    states = run_sweep(grid, processes=2, log=lambda line: None)
    assert len(states["done"]) == 2
    assert sorted(seen_by(grid.jobs).values()) == ["2", "5"]
    assert seen_by(grid.jobs) == {job.name: job.record["gpu"] for job in grid.jobs}
    grid = grid_of(seeing, "cells: [{device: cpu}]", "cpu.yaml")
    run_sweep(grid, log=lambda line: None)
    (cpu,) = grid.jobs
    assert "gpu" not in cpu.record and seen_by([cpu]) == {cpu.name: "2,5"}


def test_on_a_ray_of_two_gpus_each_job_sees_one(seeing):
    "Ray is told of two GPUs; it hides them from whoever asks for none."
    ray = pytest.importorskip("ray", reason="the extra ray is not installed")
    grid = grid_of(seeing, "cells: [{seed: [0, 1]}, {device: cpu}]")
    try:
        ray.init("local", num_cpus=3, num_gpus=2, include_dashboard=False, log_to_driver=False)
    except Exception as error:
        ray.shutdown()
        pytest.skip(f"Ray did not start on this machine: {error}")
    try:
        states = run_sweep(grid, processes=2, ray="local", threads=1, log=lambda line: None)
    finally:
        ray.shutdown()
    assert len(states["done"]) == 3
    seen = [(job.folder / "seen.txt").read_text() for job in grid.jobs]
    on_gpu = [s for s, job in zip(seen, grid.jobs) if "device" not in job.parameters]
    assert len(on_gpu) == 2 and set(on_gpu) <= {"0", "1"}, "one each, not none"


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
