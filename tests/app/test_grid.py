"""Grids: lists are crossed, tables merged, jobs have keys; mistakes are found while reading."""

import json
from pathlib import Path

import pytest
from app.helpers import grid_of, notebook_of

from dfsbir.app.grid import crossed, job_key, merged, read_grid


def test_lists_are_crossed_at_any_depth():
    value = {"a": [1, [2, 3]], "b": {"c": ["x", "y"]}}
    assert crossed(value) == [{"a": a, "b": {"c": c}} for a in (1, 2, 3) for c in "xy"]
    assert crossed({"a": []}) == [] and crossed({}) == [{}]


def test_tables_are_merged_and_the_rest_is_replaced():
    base = {"t": {"x": 1, "u": {"y": 2}}, "s": [0, 1]}
    new = {"t": {"u": {"z": 3}}, "s": 4}
    assert merged(base, new) == {"t": {"x": 1, "u": {"y": 2, "z": 3}}, "s": 4}


def test_jobs_of_a_grid(place):
    entries = "  - method: [plain, other]\n  - {method: third, rate: 1e-3, options: {b: 2}}\n"
    grid = grid_of(place, f"defaults: {{seed: [0, 1], options: {{a: 1}}}}\ncells:\n{entries}")
    methods = ("plain", "other", "third")
    names = [f"{m} seed {s}" for s in (0, 1) for m in methods]
    assert [job.name for job in grid.jobs] == names, "seed by seed"
    third = grid.jobs[2].parameters
    assert third["rate"] == 0.001 and json.loads(third["options"]) == {"a": 1, "b": 2}
    assert Path(third["run_folder"]) == grid.jobs[2].folder
    assert "method" not in grid.jobs[0].parameters, "the notebook's own defaults are left to it"
    assert grid.folder == place / "runs" / "g" and len({job.folder for job in grid.jobs}) == 6
    assert {job.state for job in grid.jobs} == {"new"}


def test_a_key_is_what_is_computed():
    defaults = {"a": 1, "b": "", "run_folder": "x", "teachers_folder": "y", "results": ""}
    key = job_key({"a": 2}, defaults)
    places = {"run_folder": "elsewhere", "results": "r.csv"}
    assert key == job_key({"b": "", "a": 2, **places}, defaults)
    assert key == job_key({"a": 2}, {**defaults, "new": 0})
    others = [job_key(p, defaults) for p in ({"a": 3}, {"a": 2, "b": "x"}, {})]
    assert len({key, *others}) == 4


def test_a_job_keeps_its_folder_when_it_is_renamed(place):
    first = grid_of(place, "cells: [{method: other}]").jobs[0]
    first.folder.mkdir(parents=True)
    renamed = grid_of(place, 'name: "now {method}"\ncells: [{method: other}]').jobs[0]
    assert renamed.folder == first.folder and renamed.name != first.name


def test_the_same_parameters_of_another_notebook_are_not_done(place):
    job = grid_of(place, "cells: [{method: other}]").jobs[0]
    job.folder.mkdir(parents=True)
    done = {"state": "done", "name": job.name, "seconds": 1.0, "notebook": job.notebook.name}
    (job.folder / "job.json").write_text(json.dumps(done))
    assert grid_of(place, "cells: [{method: other}]").jobs[0].state == "done"
    (place / "second.ipynb").write_bytes(job.notebook.read_bytes())
    with pytest.raises(ValueError, match=f"second.ipynb.*holds a run of {job.notebook.name}"):
        grid_of(place, "notebook: second.ipynb\ncells: [{method: other}]")


@pytest.mark.parametrize(
    "text, facts",
    [
        ("cells: [{methd: a}]", "entry 1.*'methd'.*'method'"),
        ("cells: [{rate: quick}]", "rate wants float"),
        ("cells: [{seed: 1.5}]", "seed wants int"),
        ("cells: [{seed: null}]", "seed wants int"),
        ("cell: []", "'cell'.*'cells'"),
        ("cells: [{method: a}, {method: [a, b]}]", "twice.*a seed 0"),
        ("cells: [", "g.yaml"),
        ("cells: [a]", "entry 1.*table.*'a'"),
        ("cells: {method: a}", "cells wants a list.*'method'"),
        ("defaults: [1]", "defaults wants a table"),
        ("folder: 5", "folder wants a text, found 5"),
        ("name: '{foo}'", "'{foo}'.*parameters: method"),
        ("name: '{method:d}'", "{method:d}"),
        ("notebook: none.ipynb", "none.ipynb"),
    ],
)
def test_mistakes_in_a_grid_are_found_before_anything_runs(place, text, facts):
    with pytest.raises((ValueError, FileNotFoundError), match=facts):
        grid_of(place, text)


def test_files_that_are_no_grid(place):
    (place / "list.yaml").write_text("- 1\n")
    with pytest.raises(ValueError, match="list.yaml"):
        read_grid(place / "list.yaml")
    with pytest.raises(FileNotFoundError, match="none.yaml"):
        read_grid(place / "none.yaml")
    (place / "small.ipynb").write_text(notebook_of("seed = 0"))
    with pytest.raises(ValueError, match="run_folder"):
        grid_of(place, "cells: [{}]")
