"""The tour runs from a clean copy with small numbers; what is committed shows its pictures."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

REDUCED = {
    "size": 32,
    "images": 150,
    "epochs": 2,
    "warmup": 10,
    "new_pairs": 64,
    "student_steps": 4,
}


def test_tour_runs_reduced(tree, elsewhere, tmp_path):
    pytest.importorskip("anywidget", reason="the tour needs pip install 'dfsbir[explore,search]'")
    pytest.importorskip(
        "papermill", reason="the reduced tour is run by papermill: pip install 'dfsbir[run]'"
    )
    words = [
        sys.executable,
        "-m",
        "papermill",
        "tour.ipynb",
        tmp_path / "out.ipynb",
        "--no-progress-bar",
        "-p",
        "folder",
        tmp_path / "kept",
    ]
    for name, value in REDUCED.items():
        words += ["-p", name, value]
    done = subprocess.run(
        [str(w) for w in words],
        cwd=tree / "nbs",
        env=elsewhere,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / "kept" / "tour" / "encoders" / "sketch.safetensors").is_file()
    cells = json.loads((tmp_path / "out.ipynb").read_text())["cells"]
    parameters = next(c for c in cells if "parameters" in c["metadata"].get("tags", []))
    assert all(f"{name} = " in "".join(parameters["source"]) for name in REDUCED)


def test_committed_tour_shows_its_pictures():
    cells = json.loads((ROOT / "nbs" / "tour.ipynb").read_text())["cells"]
    outputs = [o for c in cells for o in c.get("outputs", [])]
    assert not [o for o in outputs if o["output_type"] == "error"]
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 8
    for picture in ("images/draw_and_find.png",):
        assert (
            any(picture in "".join(c["source"]) for c in cells)
            and (ROOT / "nbs" / picture).is_file()
        )
