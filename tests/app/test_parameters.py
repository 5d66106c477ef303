"""Parameters of notebooks: read with their comments, checked by name and type, taken from texts."""

import json
import re

import pytest
from conftest import ROOT

from dfsbir.app.parameters import (
    EXPERIMENT,
    Parameter,
    check_cells,
    check_values,
    notebook_parameters,
    parse_value,
    parse_values,
    read_parameters,
)
from dfsbir.explore.opening import packaged_notebook


def test_the_parameters_cell_is_flat_and_typed():
    "One plain value with a comment each; every type can be told from a command line."
    parameters = notebook_parameters()
    names = {p.name for p in parameters}
    assert len(names) == len(parameters)
    assert {"dataset", "seed", "run_folder", "preset", "changes"} <= names
    assert all(type(p.default) in (bool, int, float, str) and p.comment for p in parameters)
    cells = json.loads(packaged_notebook(EXPERIMENT).read_text())["cells"]
    (cell,) = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
    statements = "".join(cell["source"])
    assert re.findall(r"^(\w+) = ", statements, re.MULTILINE) == [p.name for p in parameters]


def test_the_experiment_is_the_notebook_of_the_checkout():
    assert packaged_notebook(EXPERIMENT) == ROOT / "nbs" / "run_experiment.ipynb"


def test_a_notebook_without_a_parameters_cell(tmp_path):
    path = tmp_path / "n.ipynb"
    path.write_text(json.dumps({"cells": []}))
    with pytest.raises(ValueError, match="n.ipynb"):
        notebook_parameters(path)


def test_comments_stand_anywhere_in_a_statement():
    source = 'a = 1  # one\nb = (\n    ""  # two\n)\nc = "#"\nd = (  # three\n    4  # four\n)\n'
    found = {p.name: (p.default, p.comment) for p in read_parameters(source)}
    assert found == {"a": (1, "one"), "b": ("", "two"), "c": ("#", ""), "d": (4, "three four")}


def test_read_parameters_refuses_what_is_not_plain():
    with pytest.raises(ValueError):
        read_parameters("a = f(1)  # no")


FOUR = [Parameter("a", 1, ""), Parameter("b", 0.5, ""), Parameter("c", "x", "")]
FOUR.append(Parameter("d", True, ""))


def test_check_values():
    assert check_values(FOUR, {"b": 2, "d": False}) == {"a": 1, "b": 2, "c": "x", "d": False}


@pytest.mark.parametrize(
    "bad, facts",
    [
        ({"e": 1}, "'e'"),
        ({"a": 1.0}, "a wants int"),
        ({"a": True}, "a wants int"),
        ({"b": True}, "b wants float"),
        ({"c": 3}, "c wants str"),
        ({"d": 1}, "d wants bool"),
        ({"d": None}, "d wants bool"),
    ],
)
def test_values_that_are_refused(bad, facts):
    with pytest.raises(ValueError, match=facts):
        check_values(FOUR, bad)


def test_check_cells_sees_what_papermill_injected():
    cell = "a = 1  # one\nb = 'x'  # two"
    injected = ["", cell, "# Parameters\na = 2\n", "import os\nzzz = 3"]
    assert check_cells(injected) == {"a": 2, "b": "x"}
    assert check_cells(["", cell, "from x import y\ncheck(In)"]) == {"a": 1, "b": "x"}
    edited = ["", cell, cell.replace("1", "5", 1)]
    assert check_cells(edited)["a"] == 5, "a cell that was edited and run again"
    with pytest.raises(ValueError, match="'bb'.*'b'"):
        check_cells(["", cell, "# Parameters\nbb = 'y'\n"])
    with pytest.raises(ValueError):
        check_cells(["", "import os"])


@pytest.mark.parametrize(
    "default, text, value",
    [
        (1, "-3", -3),
        (0.1, "1e-3", 1e-3),
        (0.1, "2", 2.0),
        ("", "2024", "2024"),
        ("", "", ""),
        (True, "false", False),
        (False, "True", True),
    ],
)
def test_parse_value(default, text, value):
    got = parse_value(Parameter("x", default, ""), text)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    "pair, facts",
    [(("aa", "1"), "'aa'"), (("a", "1.5"), "a wants int"), (("d", "yes"), "d is true or false")],
)
def test_texts_that_are_refused(pair, facts):
    with pytest.raises(ValueError, match=facts):
        parse_values([pair], FOUR)
