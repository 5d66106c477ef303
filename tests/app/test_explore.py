"dfsbir explore and dfsbir tour: the words that reach the servers, and mistakes before they start."

import importlib.util
import shutil
import sys

import pytest
from app.helpers import call, fails

from dfsbir.explore import opening


@pytest.fixture
def server(monkeypatch):
    "Stands in for a server: keeps the words and the environment that it was started with."

    class Server:
        code, words, env = 0, None, None

        def __call__(self, words, env):
            self.words, self.env = words, env
            return self

        def wait(self):
            return self.code

    started = Server()
    monkeypatch.setattr(opening.subprocess, "Popen", started)
    monkeypatch.setattr(opening, "_require", lambda *modules: None)
    monkeypatch.delenv("DFSBIR_RUNS", raising=False)
    return started


def test_explore_serves_the_runs_that_are_named(server, run, tmp_path):
    words = ("--gallery", tmp_path, "--port", 8123, "--no-browser", "--theme", "dark")
    assert call("explore", run, *words) == 0
    assert server.words[:3] == [sys.executable, "-m", "voila"]
    assert {"--port=8123", "--no-browser", "--theme=dark"} <= set(server.words)
    assert server.env["DFSBIR_RUNS"] == str(run) and server.env["DFSBIR_GALLERY"] == str(tmp_path)


def test_explore_alone_takes_the_runs_that_are_here(server, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call("explore") == 0 and server.env["DFSBIR_RUNS"] == ""
    shutil.copytree(run, tmp_path / "runs" / "one")
    assert call("explore") == 0 and server.env["DFSBIR_RUNS"] == str(tmp_path / "runs")


def test_the_tour_is_opened_as_a_copy(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call("tour", "--no-browser") == 0
    assert server.words[:3] == [sys.executable, "-m", "jupyterlab"]
    assert f"--ServerApp.root_dir={tmp_path}" in server.words
    assert "--LabApp.default_url=/lab/tree/tour.ipynb" in server.words
    assert "--no-browser" in server.words and (tmp_path / "tour.ipynb").is_file()
    assert call("tour", tmp_path / "new" / "place") == 0
    assert (tmp_path / "new" / "place" / "tour.ipynb").is_file()


@pytest.mark.parametrize("name", ["explore", "tour"])
def test_the_exit_code_is_that_of_the_server(name, server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    server.code = 3
    assert call(name) == 3


@pytest.mark.parametrize("words", [["nowhere"], ["--gallery", "nowhere"]], ids=" ".join)
def test_folders_that_are_not_there_are_named(words, server, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "nowhere" in fails(capsys, "explore", *words) and server.words is None


@pytest.mark.parametrize(
    "name, module",
    [
        *(("explore", module) for module in ("voila", "ipywidgets", "anywidget")),
        *(("tour", module) for module in ("jupyterlab", "ipywidgets", "anywidget")),
    ],
)
def test_a_missing_extra_is_named(name, module, capsys, tmp_path, monkeypatch):
    "The extra and the module; nothing is written."
    monkeypatch.chdir(tmp_path)
    find = importlib.util.find_spec
    monkeypatch.setattr(opening, "find_spec", lambda n: None if n == module else find(n))
    text = fails(capsys, name)
    assert "dfsbir[explore]" in text and module in text and not list(tmp_path.iterdir())
