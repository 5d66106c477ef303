"""Sweeps: what a grid means, that nothing is run twice or lost, how it stops; and the miniature sweep of the evidence, whole."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT

from dfsbir.app.sweep import (
    RECORD,
    crossed,
    exclusive,
    job_key,
    main,
    merged,
    read_grid,
    rebuild_results,
    run_job,
    run_sweep,
)
from dfsbir.crossx.config import CrossXConfig
from dfsbir.evaluation.results import RESULT_COLUMNS, append_results, read_results
from dfsbir.finegrained.config import FineGrainedConfig
from dfsbir.teachers.embeddings import TEACHER_EMBEDDINGS

GRIDS = ROOT / "nbs" / "experiments" / "grids"

PARAMETERS = """
method = "plain"     # plain, crash, die, sleep
rate = 0.1           # of nothing
options = ""         # JSON
seed = 0
run_folder = "runs/x"
"""
BODY = """
import json, os, signal, time
from pathlib import Path
run = Path(run_folder)
with open(run / "times.txt", "a") as f: print(os.getpid(), os.environ["OMP_NUM_THREADS"], file=f)
again = len((run / "times.txt").read_text().splitlines()) > 1
assert method != "crash" or again, "it broke"
if method == "die": os.kill(os.getpid(), signal.SIGKILL)
if method == "sleep" and not again: time.sleep(300)
row = "d,%s,%s,%d,mAP@all,%.6f,1.0,cpu,%s" % (method, "", seed, .5 + seed / 10, run.name)
(run / "results.csv").write_text("dataset,method,variant,seed,metric,value,seconds,device,run_id\\n" + row + "\\n")
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    "A folder with a small experiment, where the test stands."
    cells = [
        {
            "cell_type": "code",
            "id": f"c{i}",
            "metadata": {"tags": ["parameters"] if not i else []},
            "source": s,
            "outputs": [],
            "execution_count": None,
        }
        for i, s in enumerate((PARAMETERS, BODY))
    ]
    notebook = {
        "cells": cells,
        "metadata": {
            "kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    (tmp_path / "small.ipynb").write_text(json.dumps(notebook))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path


def grid_of(place, text, name="g.yaml"):
    (place / name).write_text("notebook: small.ipynb\n" + text)
    return read_grid(place / name)


def times(cell):
    "How often a cell was begun."
    file = cell.folder / "times.txt"
    return len(file.read_text().splitlines()) if file.is_file() else 0


# ---- grids


def test_lists_are_crossed_at_any_depth():
    assert crossed({"a": [1, [2, 3]], "b": {"c": ["x", "y"]}}) == [
        {"a": a, "b": {"c": c}} for a in (1, 2, 3) for c in "xy"
    ]
    assert crossed({"a": []}) == [] and crossed({}) == [{}]
    assert merged({"t": {"x": 1, "u": {"y": 2}}, "s": [0, 1]}, {"t": {"u": {"z": 3}}, "s": 4}) == {
        "t": {"x": 1, "u": {"y": 2, "z": 3}},
        "s": 4,
    }


def test_cells_of_a_grid(place):
    grid = grid_of(
        place,
        "defaults: {seed: [0, 1], options: {a: 1}}\ncells:\n  - method: [plain, other]\n  - {method: third, rate: 1e-3, options: {b: 2}}\n",
    )
    assert [c.name for c in grid.cells] == [
        f"{m} seed {s}" for s in (0, 1) for m in ("plain", "other", "third")
    ], "seed by seed"
    third = grid.cells[2].parameters
    assert (
        third["rate"] == 0.001
        and json.loads(third["options"]) == {"a": 1, "b": 2}
        and Path(third["run_folder"]) == grid.cells[2].folder
    )
    assert "method" not in grid.cells[0].parameters, "what the notebook says anyway is left to it"
    assert grid.folder == place / "runs" / "g" and len({c.folder for c in grid.cells}) == 6


def test_a_key_is_what_is_computed():
    defaults = {"a": 1, "b": "", "run_folder": "x", "teachers_folder": "y", "results": ""}
    key = job_key({"a": 2}, defaults)
    assert (
        key
        == job_key({"b": "", "a": 2, "run_folder": "elsewhere", "results": "r.csv"}, defaults)
        == job_key({"a": 2}, {**defaults, "new": 0})
    )
    assert (
        len(
            {
                key,
                job_key({"a": 3}, defaults),
                job_key({"a": 2, "b": "x"}, defaults),
                job_key({}, defaults),
            }
        )
        == 4
    )


def test_a_cell_keeps_its_folder_when_it_is_renamed(place):
    first = grid_of(place, "cells: [{method: other}]")
    first.cells[0].folder.mkdir(parents=True)
    assert (
        grid_of(place, 'name: "now {method}"\ncells: [{method: other}]').cells[0].folder
        == first.cells[0].folder
    )


@pytest.mark.parametrize(
    "text, says",
    [
        ("cells: [{methd: a}]", "did you mean 'method'"),
        ("cells: [{rate: quick}]", "wants float"),
        ("cells: [{seed: 1.5}]", "wants int"),
        ("cells: [{seed: null}]", "wants int"),
        ("cell: []", "did you mean 'cells'"),
        ("cells: [{method: a}, {method: [a, b]}]", "asks twice"),
        ("cells: [", "is not YAML"),
        ("notebook: none.ipynb", "there is no"),
    ],
)
def test_mistakes_in_a_grid_are_found_before_anything_runs(place, text, says):
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        grid_of(place, text)


@pytest.mark.parametrize("file", sorted(GRIDS.glob("*.yaml")), ids=lambda p: p.stem)
def test_the_projects_grids(file, monkeypatch):
    "They fit the notebook, and ask for three seeds of everything (one in the miniature for CI, and where a grid's first line says so)."
    monkeypatch.chdir(ROOT)
    cells = read_grid(file).cells
    by_name = Counter(c.name.rpartition(" seed ")[0] for c in cells)
    assert set(by_name.values()) == {
        1 if file.stem == "ci" or "one seed" in file.read_text().splitlines()[0] else 3
    }, by_name
    for c in cells:
        changes = json.loads(c.parameters.get("changes", "{}"))
        if c.notebook.stem == "finegrained":
            FineGrainedConfig.preset(c.parameters.get("method", "full"), **changes)
            continue
        method = c.parameters.get("method", "crossx-dfsbir")
        base = (
            "paper"
            if method in ("crossx-paper", "released")
            else c.parameters.get("preset", "dfsbir")
        )
        CrossXConfig.preset(
            base,
            **{
                **{k: v for k, v in changes.items() if not isinstance(v, dict)},
                **changes.get(base, {}),
                **changes.get(method, {}),
            },
        )


def test_the_overlaps_are_what_they_say(monkeypatch):
    monkeypatch.chdir(ROOT)
    for c in read_grid(GRIDS / "toy_overlap.yaml").cells:
        photo, sketch = (
            set(c.parameters[k].split(", ")) for k in ("photo_classes", "sketch_classes")
        )
        assert (
            len(photo | sketch) == 10
            and 10 * len(photo & sketch) == int(c.parameters["variant"].rstrip("%"))
            and abs(len(photo) - len(sketch)) <= 1
        )


# ---- running


def test_failures_are_kept_apart_and_nothing_runs_twice(place, monkeypatch):
    "One cell fails, one kernel is killed, two work; again: nothing. Retry: what failed, alone. Threads are divided."
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    grid, freeze = grid_of(place, "cells: [{method: [crash, die, plain]}, {seed: 1}]"), []
    states = run_sweep(grid, processes=2, tell=freeze.append)
    assert {k: sorted(c.name for c in v) for k, v in states.items() if v} == {
        "done": ["plain seed 0", "plain seed 1"],
        "failed": ["crash seed 0", "die seed 0"],
    }
    crash, die, plain, other = grid.cells[0], grid.cells[1], grid.cells[2], grid.cells[3]
    assert (
        "it broke" in crash.record["error"]
        and "it broke" in (crash.folder / "cell.log").read_text()
        and (crash.folder / "small.ipynb").is_file()
    )
    assert "Kernel died" in die.record["error"] and not (die.folder / "results.csv").exists()
    assert all(
        line.split()[1] == "2"
        for c in grid.cells
        for line in (c.folder / "times.txt").read_text().splitlines()
    )
    assert (
        len(freeze) == 5
        and "3 left" in freeze[1]
        and freeze[0].startswith("g.yaml: 4 cells, 0 done before, 4 to run")
    )

    run_sweep(grid, tell=freeze.append)
    assert [times(c) for c in grid.cells] == [1, 1, 1, 1] and "0 to run, 2 failed before" in freeze[
        -1
    ]
    assert run_job(plain) == plain.record and times(plain) == 1, "not even when asked for directly"
    (die.folder / RECORD).write_text(
        json.dumps({"state": "done"})
    )  # so that only the crash is tried again
    states = run_sweep(grid, retry=True, tell=freeze.append)
    assert len(states["done"]) == 4 and [times(c) for c in grid.cells] == [2, 1, 1, 1]
    assert main(["g.yaml"]) == 0


def test_a_cell_that_another_process_runs_is_left_alone(place):
    grid, freeze = grid_of(place, "cells: [{method: plain}]"), []
    cell = grid.cells[0]
    with exclusive(cell.folder / "cell.lock"):
        (cell.folder / RECORD).write_text(json.dumps({"state": "running", "seconds": 0}))
        assert cell.state == "running"
        assert run_job(cell)["state"] == "running" and run_sweep(grid, tell=freeze.append)[
            "running"
        ] == [cell]
    assert times(cell) == 0 and cell.state == "stopped", (
        "nobody holds it any more: it can be gone on with"
    )


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_ctrl_c_stops_cleanly_and_the_same_command_goes_on(place):
    cell = grid_of(place, "cells: [{method: sleep}, {method: sleep, seed: 1}]").cells[0]
    command = [sys.executable, "-m", "dfsbir.app.sweep", "g.yaml"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as sweep:
        while not times(cell):
            assert sweep.poll() is None, sweep.communicate()
            time.sleep(0.1)
        assert cell.state == "running"
        sweep.send_signal(
            signal.SIGTERM
        )  # as SIGINT, which is ignored where tests run in the background
        out, err = sweep.communicate(timeout=120)
    assert (
        sweep.returncode == 130
        and "0 of 2 cells are done; the same command goes on" in err
        and "Traceback" not in err
    )
    assert cell.state == "stopped" and not (cell.folder / "results.csv").exists()
    kernel = int((cell.folder / "times.txt").read_text().split()[0])
    deadline = time.monotonic() + 60
    while Path(f"/proc/{kernel}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{kernel}").exists(), "its notebook ended with it"
    (place / "g.yaml").write_text("notebook: small.ipynb\ncells: [{method: sleep}]\n")
    assert main(["g.yaml"]) == 0 and times(cell) == 2


def test_on_a_local_ray_of_two_workers(place):
    pytest.importorskip("ray", reason="the extra ray is not installed")
    grid, freeze = grid_of(place, "cells: [{method: [plain, crash], seed: [0, 1]}]"), []
    states = run_sweep(grid, processes=2, ray="local", threads=1, tell=freeze.append)
    assert (
        sorted(c.name for c in states["done"]) == ["plain seed 0", "plain seed 1"]
        and len(states["failed"]) == 2
    )
    assert all("it broke" in c.record["error"] for c in states["failed"]) and [
        times(c) for c in grid.cells
    ] == [1, 1, 1, 1]


# ---- results


def rows(path, run, value, method="m", **more):
    path.mkdir(parents=True)
    append_results(
        path / "results.csv",
        [
            dict(
                dataset="d",
                method=method,
                seed=0,
                metric="mAP@all",
                value=value,
                seconds=1,
                device="cpu",
                run_id=run,
                **more,
            )
        ],
    )
    return path


def test_results_are_rebuilt_from_finished_runs(tmp_path):
    (
        rows(tmp_path / "a", "a", 0.1, "crossx-dfsbir"),
        rows(tmp_path / "b" / "deep", "b", 0.2, "teacher-features"),
        rows(tmp_path / "failed", "f", 0.9, "n"),
    )
    (tmp_path / "failed" / RECORD).write_text(json.dumps({"state": "failed"}))
    os.utime(rows(tmp_path / "older", "o", 0.3, "crossx-dfsbir") / "results.csv", (0, 0))
    freeze, target = [], tmp_path / "all.csv"
    assert rebuild_results([tmp_path], target, freeze.append) == 2
    assert [(r["method"], r["run_id"]) for r in read_results(target)] == [
        ("teacher-features", "b"),
        ("crossx-dfsbir", "a"),
    ], "the newer one, from floor to ceiling"
    assert any("measured by o and by a" in t for t in freeze)
    before = target.read_bytes()
    rebuild_results([tmp_path], target, freeze.append)
    assert target.read_bytes() == before and before.decode().splitlines()[0] == ",".join(
        RESULT_COLUMNS
    )
    with pytest.raises(ValueError, match="no finished run"):
        rebuild_results([tmp_path / "failed"], target)
    assert target.read_bytes() == before


# ---- the evidence itself: the miniature sweep of CI, whole


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    "(folder, finished process) of the miniature sweep by the command."
    cwd = tmp_path_factory.mktemp("sweep")
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
    }
    return cwd, subprocess.run(
        [sys.executable, "-m", "dfsbir.app.sweep", GRIDS / "ci.yaml", "--threads", "1"],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=1500,
    )


def test_the_miniature_sweep(swept, monkeypatch):
    cwd, done = swept
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    monkeypatch.chdir(cwd)
    grid = read_grid(GRIDS / "ci.yaml")
    assert (
        all(c.state == "done" for c in grid.cells)
        and f"[{len(grid.cells)}/{len(grid.cells)}] done" in done.stdout
    )
    for c in grid.cells:
        assert {
            "cell.json",
            "cell.log",
            "config.json",
            "record.json",
            "results.csv",
            "evidence.ipynb",
            "report.html",
        } <= {p.name for p in c.folder.iterdir()}, c.name
        assert "data:image/png;base64" in (c.folder / "report.html").read_text(encoding="utf-8")
    assert len(list((cwd / "runs" / "ci" / "teachers").glob("*.safetensors"))) == 4, (
        "two pairs of teachers for all cells: those of the partial overlap, and one pair for the others"
    )
    assert {p.name for p in cwd.iterdir()} == {"runs"}


def test_its_rows(swept):
    cwd, _ = swept
    rebuild_results([cwd / "runs"], cwd / "runs" / "all.csv", lambda _: None)
    found = read_results(cwd / "runs" / "all.csv")
    keys = Counter((r["dataset"], r["method"], r["variant"]) for r in found)
    methods = {
        ("random", ""),
        *TEACHER_EMBEDDINGS,
        ("crossx-dfsbir", ""),
        ("crossx-paper", ""),
        ("gaussian-prior", ""),
        ("crossx-dfsbir", "no batch-norm prior"),
    }
    overlap = {
        (f"ci-overlap{q}", "crossx-dfsbir", "60%")
        for q in ("", "/all", "/photo-only", "/sketch-only", "/unseen")
    }
    accuracies = {("ci", f"{m}-teacher", "") for m in ("photo", "sketch")}
    assert (
        set(keys) == {(d, *m) for d in ("ci", "ci/unseen") for m in methods} | overlap | accuracies
    )
    assert all(n == (1 if k in accuracies else 3) for k, n in keys.items())
    assert all(0 <= r["value"] <= 1 for r in found) and all(
        r["seconds"] > 0 for r in found if r["method"].startswith("crossx")
    )
    of = {
        (r["dataset"], r["method"], r["variant"]): r["value"]
        for r in found
        if r["metric"] == "mAP@all"
    }
    assert of["ci/unseen", "random", ""] > of["ci", "random", ""], (
        "two unseen classes, ten known ones"
    )


def test_its_report(swept, tmp_path):
    "The report of all results, drawn from these few: pictures where there are rows, a word where there are none."
    cwd, _ = swept
    rebuild_results([cwd / "runs"], cwd / "runs" / "all.csv", lambda _: None)
    given = {
        "results": str(cwd / "runs" / "all.csv"),
        "main_sets": "ci, nothing",
        "unseen_sets": "ci",
        "ablation_set": "ci",
        "overlap_set": "ci-overlap",
        "cost_set": "ci",
        "figures": "pictures",
    }
    words = [w for k, v in given.items() for w in ("-r", k, v)]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "papermill",
            ROOT / "nbs" / "experiments" / "report.ipynb",
            "report.ipynb",
            "--no-progress-bar",
            *words,
        ],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = "\n".join(
        "".join(out.get("text", "")) + "".join(out.get("data", {}).get("text/markdown", ""))
        for cell in json.loads((tmp_path / "report.ipynb").read_text())["cells"]
        for out in cell.get("outputs", [])
    )
    of = {
        (r["dataset"], r["method"], r["variant"]): r["value"]
        for r in read_results(cwd / "runs" / "all.csv")
        if r["metric"] == "mAP@all"
    }
    ours = of["ci", "crossx-dfsbir", ""]
    assert (
        f"crossx-dfsbir has {ours:.3f} (1 seed)" in said
        and "nothing: no rows yet" in said
        and "not measured: uni-modal, averaging-weights, meta-data, alternative-data" in said
    )
    assert (
        f"no batch-norm prior {of['ci', 'crossx-dfsbir', 'no batch-norm prior'] - ours:+.3f} (1 seed)"
        in said
    )
    best = max(of["ci/unseen", m, v] for m, v in TEACHER_EMBEDDINGS)
    assert f"{of['ci/unseen', 'crossx-dfsbir', ''] / best:.3f} times the best read-out" in said
    assert (
        f"all classes: {of['ci-overlap/all', 'crossx-dfsbir', '60%']:.3f} (1 seed) at 60%" in said
    )
    assert {"methods_ci.png", "ablation_ci_crossx-dfsbir.png", "unseen_ci.png", "overlap.png"} <= {
        p.name for p in (tmp_path / "pictures").iterdir()
    }


def test_the_papers_figures(tmp_path):
    "Every picture is drawn from a few steps, and drawn again from what was kept."
    given = {"toy_images": 60, "toy_test": 40, "teacher_net": "tiny", "steps": 4, "batch": 20}
    words = [
        w
        for k, v in {**given, "figures": "pictures"}.items()
        for w in ("-r" if isinstance(v, str) else "-p", k, str(v))
    ]
    for _ in range(2):
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "papermill",
                ROOT / "nbs" / "experiments" / "figures.ipynb",
                "out.ipynb",
                "--no-progress-bar",
                *words,
            ],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        said = "\n".join(
            "".join(out.get("data", {}).get("text/markdown", ""))
            for cell in json.loads((tmp_path / "out.ipynb").read_text())["cells"]
            for out in cell.get("outputs", [])
        )
        assert (
            "Both teachers name one class on" in said
            and "| guided |" in said
            and "| adversarial |" in said
            and "cold start: mAP@all" in said
        )
    assert {p.stem for p in (tmp_path / "pictures").glob("*.png")} == {
        "aligned",
        "guided",
        "adversarial",
        "steps",
        "retrievals",
    }
    assert {p.name for p in (tmp_path / "runs" / "figures").iterdir()} == {
        "teachers",
        "unaligned",
        "aligned",
        "unguided",
        "guided",
        "plain",
        "adversarial",
        "cold",
        "warm",
    }
