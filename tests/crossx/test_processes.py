"""One run in two processes on one CPU: stopped, resumed, failing, and what it refuses."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch
from crossx.helpers import CONFIGS, PLAN, SIDE, assert_same, make_teacher, result
from torch import nn

from dfsbir.core.device import make_fabric
from dfsbir.core.run_folder import RunFolder
from dfsbir.core.types import MODALITIES, Modality
from dfsbir.crossx.build import build_crossx
from dfsbir.crossx.pairs import ProceduralPairs
from dfsbir.crossx.processes import fit_in_processes
from dfsbir.teachers.loading import load_teacher, save_teacher

TWO = CONFIGS["dfsbir"].changed({"processes": 2})


@pytest.fixture
def ctrl_c():
    "SIGINT raises KeyboardInterrupt, also where tests run in the background."
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def one_process(teachers, folder, config=TWO):
    "A trainer of this process and the run folder."
    crossx = build_crossx(*teachers, config, fabric=make_fabric("cpu"))
    return crossx, RunFolder(folder, config.flat())


def press_after(run, actions):
    "Ctrl-C once so many actions are in the log."

    def watch():
        deadline = time.monotonic() + 120
        while len(run.metrics()) < actions and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=watch, daemon=True).start()


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_two_processes_stopped_and_resumed_equal_an_uninterrupted_run(teachers, tmp_path, ctrl_c):
    whole, run = one_process(teachers, tmp_path / "whole")
    encoders = fit_in_processes(whole, run)
    assert whole.position == len(PLAN) and set(encoders) == set(MODALITIES)
    saved = [run.load_checkpoint(name) for name in ("last", "last-1")]
    students = [state["distiller"]["students"] for state in saved]
    assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in students)))
    pairs = [state["pairs"]["random"] for state in saved]
    assert not torch.equal(*pairs), "each process has noise of its own"

    stopped, part = one_process(teachers, tmp_path / "part")
    press_after(part, 3)
    with pytest.raises(KeyboardInterrupt, match="part"):
        fit_in_processes(stopped, part)
    positions = [part.load_checkpoint(name)["position"] for name in ("last", "last-1")]
    assert positions[0] == positions[1] and 3 <= positions[0] < len(PLAN)
    again, part = one_process(teachers, tmp_path / "part")
    fit_in_processes(again, part)
    assert_same(result(part), result(run))


def test_the_first_failure_is_told_and_the_other_process_ends(teachers, tmp_path):
    crossx, run = one_process(teachers, tmp_path / "run")
    run.log(1, value=1.0)  # the run has begun
    run.pin("teachers", dict.fromkeys(map(str, MODALITIES), "others"))
    begun = time.monotonic()
    with pytest.raises(RuntimeError, match="begun with other teachers"):
        fit_in_processes(crossx, run)
    assert (run.path / "processes" / "log-1.txt").read_text()
    assert time.monotonic() - begun < 200
    run.log(2, value=1.0)  # the folder is this process's again


def test_a_teacher_from_a_file_is_found_there(teachers, tmp_path):
    "Nothing is trained here: the plan is empty."
    for m, teacher in zip(MODALITIES, teachers):
        save_teacher(teacher, tmp_path / f"{m}.safetensors")
    loaded = [load_teacher(tmp_path / f"{m}.safetensors") for m in MODALITIES]
    config = TWO.changed({"schedule.rounds": 0, "pairs.warmup_steps": 1})
    crossx, run = one_process(loaded, tmp_path / "run", config)
    fit_in_processes(crossx, run)
    orders = json.loads((run.path / "processes" / "orders.json").read_text())
    files = {orders["teachers"][m]["file"] for m in ("photo", "sketch")}
    assert files == {str(tmp_path / f"{m}.safetensors") for m in MODALITIES}
    assert not list((run.path / "processes").glob("*.safetensors"))


def test_what_other_processes_cannot_have_is_refused(teachers, tmp_path):
    crossx, run = one_process(teachers, tmp_path / "run")
    with pytest.raises(ValueError, match="2 processes"):
        crossx.fit(run)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))
    own = make_teacher(Modality.PHOTO, net=net)
    crossx.teachers = {Modality.PHOTO: own, Modality.SKETCH: teachers[1]}
    with pytest.raises(ValueError, match="photo teacher"):
        fit_in_processes(crossx, run)
    pairs = ProceduralPairs({m: SIDE for m in MODALITIES}, make_fabric("cpu"), 0)
    given = build_crossx(*teachers, TWO, fabric=make_fabric("cpu"), pairs=pairs)
    with pytest.raises(ValueError, match="passed as an object"):
        fit_in_processes(given, run)


SCRIPT = """
import json
import sys
from pathlib import Path
from dfsbir.core.device import make_fabric
from dfsbir.core.run_folder import RunFolder
from dfsbir.crossx.build import build_crossx
from dfsbir.crossx.config import CrossXConfig
from dfsbir.teachers.loading import load_teacher

home = Path(sys.argv[1])
config = CrossXConfig.from_flat(json.loads((home / "config.json").read_text()))
fabric = make_fabric(config.device, config.precision, config.processes)
teachers = [load_teacher(home / f"{name}.safetensors") for name in ("photo", "sketch")]
crossx = build_crossx(*teachers, config, fabric=fabric)
crossx.fit(RunFolder(home / "machines", config.flat()))
"""


def start_machine(rank, home, port):
    "A process of its own machine, in the environment that torchrun makes."
    names = ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "RANK", "GROUP_RANK", "WORLD_SIZE")
    places = dict(zip(names, map(str, (0, 1, rank, rank, 2))))
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "run"}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(home)],
        env={**os.environ, **places, **address, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_two_machines_give_what_two_processes_of_one_give(teachers, tmp_path):
    for m, teacher in zip(MODALITIES, teachers):
        save_teacher(teacher, tmp_path / f"{m}.safetensors")
    loaded = [load_teacher(tmp_path / f"{m}.safetensors") for m in MODALITIES]
    crossx, run = one_process(loaded, tmp_path / "one")
    fit_in_processes(crossx, run)
    (tmp_path / "config.json").write_text(json.dumps(TWO.flat()))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    machines = [start_machine(rank, tmp_path, port) for rank in range(2)]
    said = [machine.communicate(timeout=200)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said
    assert_same(result(RunFolder(tmp_path / "machines")), result(run))


def test_another_number_of_processes_than_torchrun_has_started_is_refused(monkeypatch):
    found = {"TORCHELASTIC_RUN_ID": "run", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
    for name, value in found.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        ValueError, match="8 processes, 4 of them on this machine.*set processes to 8"
    ):
        make_fabric("cpu", processes=2)
