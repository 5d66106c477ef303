"""Every library notebook runs from top to bottom, as nbdev_test does it, in a copy of the tree."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, TESTS

NBS = ROOT / "nbs"
NUMBERED = "[0-9][0-9]_*"
LIBRARY = sorted(NBS.glob(f"{NUMBERED}.ipynb")) + sorted(NBS.glob(f"{NUMBERED}/{NUMBERED}.ipynb"))
NOTEBOOKS = [*(path.relative_to(NBS).as_posix() for path in LIBRARY), "index.ipynb"]


class Server:
    "A notebook_server.py, which runs one notebook after another."

    def __init__(self):
        env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        env["TRITON_INTERPRET"] = "1"  # Triton asks when it is imported, which torchvision does
        self.process = subprocess.Popen(
            [sys.executable, TESTS / "notebook_server.py"],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, tree, name, env):
        "(exit code, output) of nbdev_test on one notebook of `tree`."
        log = tree.parent / "log.txt"
        job = dict(notebook=f"nbs/{name}", tree=str(tree), env=env, log=str(log))
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        code = self.process.stdout.readline()
        assert code, "the server of notebooks has ended"
        return int(code), log.read_text(errors="replace")

    def close(self):
        self.process.stdin.close()
        self.process.wait()


@pytest.fixture(scope="module")
def server():
    "One for all notebooks of a process of pytest."
    if not hasattr(os, "fork"):
        pytest.skip("this system has no fork; nbdev_test runs the notebooks")
    server = Server()
    yield server
    server.close()


def test_there_are_notebooks():
    assert "00_core/00_types.ipynb" in NOTEBOOKS


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook(name, tree, elsewhere, server):
    code, output = server.run(tree, name, elsewhere)
    assert code == 0 and "Success." in output, f"{name} fails:\n{output[-8000:]}"


def test_a_failing_cell_fails(tree, elsewhere, server):
    "The harness itself: a false assertion is seen, and a cell marked not to run is not run."
    cell = {"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": None}
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    notebook = {
        "cells": [
            cell | {"id": "a", "source": ["#| eval: false\n", "1 / 0"]},
            cell | {"id": "b", "source": ["assert 1 == 2, 'seen'"]},
        ],
        "metadata": {"kernelspec": kernel},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    (tree / "nbs" / "99_broken.ipynb").write_text(json.dumps(notebook))
    code, output = server.run(tree, "99_broken.ipynb", elsewhere)
    assert code != 0 and "AssertionError" in output
    assert "ZeroDivisionError" not in output


def test_every_notebook_has_a_process_of_its_own(tree, elsewhere, server):
    "The package comes from the tree, the environment is the one given, and nothing is left over."
    lines = [
        "import os, sys, dfsbir\n",
        "facts = dfsbir.__file__, os.environ['MARK'], 'LEFT' in os.environ, hasattr(sys, 'left')\n",
        "print(*facts, file=open(os.environ['FACTS'], 'w'))\n",
        "sys.left = os.environ['LEFT'] = 'over'",
    ]
    cell = {"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": None}
    notebook = {
        "cells": [cell | {"id": "a", "source": lines}],
        "metadata": {"kernelspec": {"display_name": "p", "language": "python", "name": "python3"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    (tree / "nbs" / "99_mark.ipynb").write_text(json.dumps(notebook))
    for mark in ("one", "two"):
        facts = tree.parent / "facts.txt"
        env = {**elsewhere, "MARK": mark, "FACTS": str(facts)}
        assert server.run(tree, "99_mark.ipynb", env)[0] == 0
        assert facts.read_text() == f"{tree / 'dfsbir' / '__init__.py'} {mark} False False\n"
    assert "MARK" not in os.environ
