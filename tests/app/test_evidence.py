"""This project's evidence: its grids fit, and the miniature sweep of CI runs whole."""

import json
import os
import subprocess
import sys
from collections import Counter

import pytest
from conftest import ROOT

from dfsbir.app.collect import rebuild_results
from dfsbir.app.grid import read_grid
from dfsbir.crossx.config import CrossXConfig
from dfsbir.evaluation.results import read_results
from dfsbir.finegrained.study import make_study
from dfsbir.teachers.embeddings import TEACHER_EMBEDDINGS

GRIDS = ROOT / "nbs" / "experiments" / "grids"

# ---- the grids


@pytest.mark.parametrize("file", sorted(GRIDS.glob("*.yaml")), ids=lambda p: p.stem)
def test_the_projects_grids(file, monkeypatch):
    "They fit the notebook, and ask for three seeds, or for one where the first line says so."
    monkeypatch.chdir(ROOT)
    jobs = read_grid(file).jobs
    by_name = Counter(job.name.rpartition(" seed ")[0] for job in jobs)
    assert set(by_name.values()) == {
        1 if file.stem == "ci" or "one seed" in file.read_text().splitlines()[0] else 3
    }, by_name
    for job in jobs:
        changes = json.loads(job.parameters.get("changes", "{}"))
        if job.notebook.stem == "finegrained":
            teacher_changes = json.loads(job.parameters.get("teacher_changes", "{}"))
            make_study(job.parameters.get("method", "full"), changes, teacher_changes)
            continue
        method = job.parameters.get("method", "crossx-dfsbir")
        base = (
            "paper"
            if method in ("crossx-paper", "released")
            else job.parameters.get("preset", "dfsbir")
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
    for job in read_grid(GRIDS / "toy_overlap.yaml").jobs:
        photo, sketch = (
            set(job.parameters[k].split(", ")) for k in ("photo_classes", "sketch_classes")
        )
        assert (
            len(photo | sketch) == 10
            and 10 * len(photo & sketch) == int(job.parameters["variant"].rstrip("%"))
            and abs(len(photo) - len(sketch)) <= 1
        )


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
        [sys.executable, "-m", "dfsbir.app.cli", "sweep", GRIDS / "ci.yaml", "--threads", "1"],
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
        all(job.state == "done" for job in grid.jobs)
        and f"[{len(grid.jobs)}/{len(grid.jobs)}] done" in done.stdout
    )
    for job in grid.jobs:
        assert {
            "job.json",
            "job.log",
            "config.json",
            "record.json",
            "results.csv",
            "evidence.ipynb",
            "report.html",
        } <= {p.name for p in job.folder.iterdir()}, job.name
        assert "data:image/png;base64" in (job.folder / "report.html").read_text(encoding="utf-8")
    assert len(list((cwd / "runs" / "ci" / "teachers").glob("*.safetensors"))) == 4, (
        "two pairs of teachers: those of the partial overlap, and one pair for the others"
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
    "The report of all results, drawn from these few rows."
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
        for found in json.loads((tmp_path / "report.ipynb").read_text())["cells"]
        for out in found.get("outputs", [])
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
    change = of["ci", "crossx-dfsbir", "no batch-norm prior"] - ours
    assert f"no batch-norm prior {change:+.3f} (1 seed)" in said
    best = max(of["ci/unseen", m, v] for m, v in TEACHER_EMBEDDINGS)
    assert f"{of['ci/unseen', 'crossx-dfsbir', ''] / best:.3f} times the best" in said
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
            for found in json.loads((tmp_path / "out.ipynb").read_text())["cells"]
            for out in found.get("outputs", [])
        )
        assert (
            "both teachers name one class" in said
            and "| guided |" in said
            and "| adversarial |" in said
        )
    assert {p.stem for p in (tmp_path / "pictures").glob("*.png")} == {
        "aligned",
        "guided",
        "adversarial",
        "steps",
        "growth",
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
