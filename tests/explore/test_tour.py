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


def tour_cells(path=ROOT / "nbs" / "tour.ipynb"):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def source(cell):
    return "".join(cell["source"])


def shown(cell):
    "The text of all that a cell printed or displayed, also of bars that went on in one line."
    words = []
    for output in cell.get("outputs", []):
        words.append(output.get("text", ""))
        words += output.get("data", {}).get("text/plain", "")
    return "".join("".join(part) for part in words)


def test_tour_runs_reduced_and_shows_how_far_it_is(tree, elsewhere, tmp_path):
    pytest.importorskip("anywidget", reason="the tour needs pip install 'dfsbir[explore,search]'")
    pytest.importorskip(
        "papermill", reason="the reduced tour is run by papermill: pip install 'dfsbir[run]'"
    )
    executed = tmp_path / "out.ipynb"
    words = [sys.executable, "-m", "papermill", "tour.ipynb", executed, "--no-progress-bar"]
    words += ["-p", "folder", tmp_path / "kept"]
    for name, value in REDUCED.items():
        words += ["-p", name, value]
    done = subprocess.run(
        [str(word) for word in words],
        cwd=tree / "nbs",
        env=elsewhere,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / "kept" / "tour" / "encoders" / "sketch.safetensors").is_file()
    cells = tour_cells(executed)
    parameters = next(c for c in cells if "parameters" in c["metadata"].get("tags", []))
    assert all(f"{name} = " in source(parameters) for name in REDUCED)
    for call, bars in (("train_teacher(", ("photo", "sketch")), (".fit(", ("CrossX",))):
        (cell,) = [c for c in cells if c["cell_type"] == "code" and call in source(c)]
        assert all(bar in shown(cell) and "%|" in shown(cell) for bar in bars), call


def test_committed_tour_shows_its_pictures():
    outputs = [output for cell in tour_cells() for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 8


def test_committed_tour_has_no_finished_bars():
    for cell in tour_cells():
        assert "%|" not in shown(cell) and "HBox" not in shown(cell)


def test_the_live_explorer_comes_before_its_picture():
    texts = [source(cell) for cell in tour_cells()]
    (live,) = [i for i, text in enumerate(texts) if "explore(str(home), scroll=True)" in text]
    (picture,) = [i for i, text in enumerate(texts) if "](images/draw_and_find.png)" in text]
    assert live < picture and (ROOT / "nbs" / "images" / "draw_and_find.png").is_file()
