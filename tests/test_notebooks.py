"""Every library notebook runs from top to bottom, as nbdev_test runs it: one notebook, one test, in a copy of the tree."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

NBS = ROOT / "nbs"
LIBRARY = sorted(NBS.glob("[0-9][0-9]_*.ipynb")) + sorted(
    NBS.glob("[0-9][0-9]_*/[0-9][0-9]_*.ipynb")
)
NOTEBOOKS = [*(str(path.relative_to(NBS)) for path in LIBRARY), "index.ipynb"]


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
    "The harness itself: an assertion that does not hold, after a cell that may not run, is seen."
    cell = {"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": None}
    notebook = {
        "cells": [
            cell | {"id": "a", "source": ["#| eval: false\n", "1 / 0"]},
            cell | {"id": "b", "source": ["assert 1 == 2, 'seen'"]},
        ],
        "metadata": {
            "kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    (tree / "nbs" / "99_broken.ipynb").write_text(json.dumps(notebook))
    done = run_notebook(tree, "99_broken.ipynb", elsewhere)
    assert (
        done.returncode != 0
        and "AssertionError" in done.stderr
        and "ZeroDivisionError" not in done.stderr
    )
