"Opening the explorer and the tour, without a server."

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("anywidget", reason="the explorer needs pip install 'dfsbir[explore]'")

from dfsbir.explore.explorer import Explorer
from dfsbir.explore.opening import (
    copy_tour,
    explorer_command,
    open_explorer,
    packaged_notebook,
)


def test_the_explorer_comes_behind_a_line(home):
    page = open_explorer(str(home))
    assert "loading" in page.children[1].value
    page.worker.wait()
    explorer = page.children[1]
    assert isinstance(explorer, Explorer) and "one" in explorer.runs


def test_a_run_that_is_made_reports_how_far_it_is(run, monkeypatch, tmp_path):
    seen = []

    def make(folder, report):
        report("training the photo teacher")
        seen.append(page.children[1].value)
        return run

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dfsbir.explore.explorer.tiny_run", make)
    page = open_explorer()
    page.worker.wait()
    assert "photo teacher" in seen[0] and list(page.children[1].runs) == ["tiny"]


def test_a_folder_without_runs_is_reported_in_the_page(tmp_path):
    page = open_explorer(str(tmp_path))
    page.worker.wait()
    assert "no finished run" in page.children[1].value


def test_the_page_is_served_for_folders_of_the_caller(home, tmp_path, monkeypatch):
    monkeypatch.delenv("DFSBIR_RUNS", raising=False)
    monkeypatch.chdir(tmp_path)
    words, env = explorer_command(str(home), port=8123, browser=False, theme="dark")
    assert words[1:3] == ["-m", "voila"] and "--no-browser" in words and "--port=8123" in words
    assert "--theme=dark" in words and Path(words[3]).name == "explorer.ipynb"
    assert env["DFSBIR_RUNS"] == str(home)
    assert explorer_command()[1]["DFSBIR_RUNS"] == ""  # nothing here: a tiny run is made
    encoders = tmp_path / "runs" / "half" / "encoders"
    encoders.mkdir(parents=True)
    (encoders / "photo.safetensors").touch()
    assert explorer_command()[1]["DFSBIR_RUNS"] == ""  # the sketch encoder is not written yet
    shutil.rmtree(tmp_path / "runs")
    (tmp_path / "runs").symlink_to(home, target_is_directory=True)
    assert Path(explorer_command()[1]["DFSBIR_RUNS"]) == home
    with pytest.raises(FileNotFoundError, match="nowhere"):
        explorer_command("nowhere")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        explorer_command(str(home), gallery="nowhere")


@pytest.mark.parametrize("name", ["voila", "ipywidgets", "anywidget"])
def test_a_missing_extra_is_named(name, tmp_path):
    code = f"""
import importlib.util
found = importlib.util.find_spec
from dfsbir.explore import opening
opening.find_spec = lambda module: None if module == {name!r} else found(module)
opening.explorer_command()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError") and "dfsbir[explore]" in last and name in last


def test_the_tour_is_copied_without_outputs_and_never_overwritten(tmp_path):
    copy = copy_tour(tmp_path / "new")
    cells = json.loads(copy.read_text())["cells"]
    assert not any(cell.get("outputs") for cell in cells)
    original = json.loads(packaged_notebook("tour.ipynb").read_text())["cells"]
    texts = ["".join(cell["source"]) for cell in original]
    kept = [text for text in texts if "](images/" not in text]
    assert ["".join(cell["source"]) for cell in cells] == kept and len(kept) == len(texts) - 1
    copy.write_text("work of the user")
    assert copy_tour(tmp_path / "new").read_text() == "work of the user"


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGTERM to catch")
def test_a_server_ends_with_the_command_that_started_it():
    code = """
import sys
from dfsbir.explore import opening
server = [sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(600)"]
opening.explorer_command = lambda *given: (server, None)
opening.serve_explorer()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    ) as command:
        server = int(command.stdout.readline())
        command.terminate()
        command.wait(60)
    with pytest.raises(ProcessLookupError):
        os.kill(server, 0)
