"""Every library notebook runs from top to bottom, as nbdev_test does it, in a copy of the tree."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

NBS = ROOT / "nbs"
NUMBERED = "[0-9][0-9]_*"
LIBRARY = sorted(NBS.glob(f"{NUMBERED}.ipynb")) + sorted(NBS.glob(f"{NUMBERED}/{NUMBERED}.ipynb"))
NOTEBOOKS = [*(path.relative_to(NBS).as_posix() for path in LIBRARY), "index.ipynb"]


def run_notebook(tree, name, env):
    "nbdev_test on one notebook of `tree`, in a process of its own."
    code = (
        "import sys; from nbdev.test import nbdev_test; nbdev_test(path=sys.argv[1], n_workers=0)"
    )
    return subprocess.run(
        [sys.executable, "-c", code, f"nbs/{name}"],
        cwd=tree,
        env=env,
        capture_output=True,
        text=True,
        timeout=900,
    )


def test_there_are_notebooks():
    assert "00_core/00_types.ipynb" in NOTEBOOKS


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook(name, tree, elsewhere):
    done = run_notebook(tree, name, elsewhere)
    assert done.returncode == 0 and "Success." in done.stdout, (
        f"{name} fails:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    )


def test_a_failing_cell_fails(tree, elsewhere):
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
    done = run_notebook(tree, "99_broken.ipynb", elsewhere)
    assert done.returncode != 0 and "AssertionError" in done.stderr
    assert "ZeroDivisionError" not in done.stderr
