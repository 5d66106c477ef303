"""The file `run`: what it prints, when it makes the environment, where torch comes from."""

import importlib.machinery
import importlib.util
import io
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The file `run` as a module, on Linux without a GPU, its environment in an empty folder."""
    monkeypatch.setenv("DFSBIR_VENV", str(tmp_path / "venv"))
    monkeypatch.delenv("DFSBIR_TORCH_INDEX", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    loader = importlib.machinery.SourceFileLoader("dfsbir_run", str(ROOT / "run"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("dfsbir_run", loader))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    loader.exec_module(module)
    monkeypatch.setattr(module, "has_gpu", lambda: False)
    monkeypatch.setattr(module, "pip_has_own_index", lambda: False)
    monkeypatch.setattr(module.urllib.request, "urlopen", lambda *args, **kw: io.BytesIO())
    return module


@pytest.fixture
def pip(run, monkeypatch):
    "What setup() would start, in .lines; a line that holds a word of .fails would fail."

    class Pip:
        lines, fails = [], []

    def start(line, **kw):
        line = [str(part) for part in line]
        Pip.lines.append(line)
        if line[1:3] == ["-m", "venv"]:
            run.PYTHON.parent.mkdir(parents=True, exist_ok=True)
            run.PYTHON.unlink(missing_ok=True)
            run.PYTHON.symlink_to(sys.executable)
        return subprocess.CompletedProcess(line, any(word in line for word in Pip.fails))

    Pip.lines, Pip.fails = [], []
    monkeypatch.setattr(run.subprocess, "run", start)
    return Pip


@pytest.mark.parametrize("args", [[], ["jbo"], ["exec"]])
def test_anything_else_prints_the_help(args):
    done = subprocess.run([sys.executable, ROOT / "run", *args], capture_output=True, text=True)
    assert done.returncode == 1 and "./run job" in done.stderr and "./run test" in done.stderr


def test_the_environment_is_made_once(run, pip, capsys):
    run.setup()
    assert "this takes some minutes" in capsys.readouterr().err
    assert [line[2:4] for line in pip.lines] == [
        ["venv", str(run.VENV)],
        ["pip", "install"],
        ["pip", "install"],
    ]
    assert all(str(ROOT / "constraints.txt") in line for line in pip.lines[1:])
    pip.lines.clear()
    run.setup()
    assert not pip.lines and not capsys.readouterr().err


def test_the_environment_is_made_again(run, pip, monkeypatch):
    "When the requirements change, and when its Python has gone."
    run.setup()
    pip.lines.clear()
    monkeypatch.setattr(run, "key", lambda: "changed")
    run.setup()
    assert pip.lines
    pip.lines.clear()
    run.PYTHON.unlink()
    run.setup()
    assert pip.lines


def test_a_failed_setup_is_tried_again(run, pip):
    pip.fails.append("-e")
    with pytest.raises(SystemExit, match="tries again"):
        run.setup()
    assert not run.STAMP.exists()
    pip.fails.clear()
    run.setup()
    assert run.STAMP.exists()


def test_old_python(run, pip, monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10, 1))
    with pytest.raises(SystemExit, match="3.11 or newer"):
        run.setup()
    assert not pip.lines


# ---- where torch comes from


def test_cpu_wheels_without_a_gpu(run, pip):
    assert run.torch_index() == run.TORCH_CPU
    run.setup()
    assert pip.lines[1][-4:] == ["--extra-index-url", run.TORCH_CPU, "torch", "torchvision"]
    assert "--extra-index-url" not in pip.lines[2]


def test_cpu_wheels_that_fail_are_given_up(run, pip, capsys):
    pip.fails.append("--extra-index-url")
    run.setup()
    assert "failed" in capsys.readouterr().err and run.STAMP.exists()


def test_usual_wheels_with_a_gpu(run, monkeypatch, capsys):
    monkeypatch.setattr(run, "has_gpu", lambda: True)
    assert run.torch_index() is None and not capsys.readouterr().err


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_usual_wheels_elsewhere(run, monkeypatch, platform):
    monkeypatch.setattr(sys, "platform", platform)
    assert run.torch_index() is None


def test_usual_wheels_where_the_index_is_out_of_reach(run, monkeypatch, capsys):
    def fails(*args, **kw):
        raise OSError("no route")

    monkeypatch.setattr(run.urllib.request, "urlopen", fails)
    assert run.torch_index() is None
    assert "out of reach (no route)" in capsys.readouterr().err


def test_an_index_set_for_pip_is_respected(run, monkeypatch, capsys):
    monkeypatch.setattr(run, "pip_has_own_index", lambda: True)
    assert run.torch_index() is None
    assert "respected" in capsys.readouterr().err


def test_a_named_index_goes_first(run, monkeypatch):
    monkeypatch.setattr(run, "has_gpu", lambda: True)
    monkeypatch.setenv("DFSBIR_TORCH_INDEX", "https://example.invalid/whl")
    assert run.torch_index() == "https://example.invalid/whl"
    monkeypatch.setenv("DFSBIR_TORCH_INDEX", "")
    monkeypatch.setattr(run, "has_gpu", lambda: False)
    assert run.torch_index() is None


@pytest.mark.parametrize(
    "text, own",
    [
        ("global.index-url='https://example.invalid'\n", True),
        ("global.cert='x'\n:env:.extra-index-url='y'\n", True),
        ("install.no-index='true'\n", True),
        ("global.cert='index-url='\nglobal.find-links='x'\n", False),
        ("", False),
    ],
)
def test_pip_has_own_index(run, monkeypatch, text, own):
    fresh = importlib.util.module_from_spec(run.__spec__)
    run.__spec__.loader.exec_module(fresh)
    monkeypatch.setattr(
        fresh.subprocess,
        "run",
        lambda *args, **kw: subprocess.CompletedProcess(args, 0, stdout=text),
    )
    assert fresh.pip_has_own_index() is own
