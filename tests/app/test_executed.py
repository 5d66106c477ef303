"""Executed notebooks: the page made of one, the cell that failed, the program that runs it."""

import json

from dfsbir.app.executed import failed_cell, notebook_of_papermill, write_report

ERROR = {"output_type": "error", "ename": "ValueError", "evalue": "no", "traceback": []}


def executed(tmp_path, *outputs):
    "An executed notebook with a title and a cell for each list of outputs."
    title = {"cell_type": "markdown", "metadata": {}, "source": ["# Title\n", "text"]}
    code = {"cell_type": "code", "metadata": {}, "execution_count": 3, "source": ["f()"]}
    cells = [title] + [{**code, "outputs": found} for found in outputs]
    notebook = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 4}
    (tmp_path / "n.ipynb").write_text(json.dumps(notebook))
    return tmp_path / "n.ipynb"


def test_failed_cell(tmp_path):
    assert failed_cell(executed(tmp_path, [])) == ""
    text = failed_cell(executed(tmp_path, [], [ERROR]))
    assert "[3]" in text and "Title" in text and "ValueError: no" in text


def test_write_report(tmp_path):
    output = {"output_type": "stream", "name": "stdout", "text": ["this & that"]}
    page = write_report(executed(tmp_path, [output]), tmp_path / "out" / "r.html").read_text()
    assert "this &amp; that" in page and "Title" in page


def test_not_under_papermill():
    assert notebook_of_papermill() is None
