"""Executed notebooks: the page made of one, the cell that failed, the program that runs it."""

import base64
import html
import importlib.util
import io
import json
import re
import shutil
import subprocess
import sys

import pytest
from PIL import Image

from dfsbir.app.executed import TEXT_BARS, failed_cell, notebook_of_papermill, write_report
from dfsbir.teachers.class_map import align_classes

ERROR = {"output_type": "error", "ename": "ValueError", "evalue": "no", "traceback": []}


def executed(tmp_path, *outputs, tags=None):
    "An executed notebook with a title and a cell for each list of outputs."
    title = {"cell_type": "markdown", "metadata": {}, "source": ["# Title\n", "about this"]}
    code = {"cell_type": "code", "execution_count": 3, "source": ["f()"]}
    cells = [title]
    for n, found in enumerate(outputs):
        cells.append({**code, "outputs": found, "metadata": {"tags": (tags or {}).get(n, [])}})
    notebook = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 4}
    (tmp_path / "n.ipynb").write_text(json.dumps(notebook))
    return tmp_path / "n.ipynb"


def test_failed_cell(tmp_path):
    assert failed_cell(executed(tmp_path, [])) == ""
    text = failed_cell(executed(tmp_path, [], [ERROR]))
    assert text.startswith("no ") and "[3]" in text and "Title" in text


@pytest.mark.parametrize(
    "name, message, named",
    [
        ("ValueError", "k is 0", False),
        ("FileNotFoundError", "there is no x.png", False),
        ("ValueError", "", True),
        ("KeyError", "'x'", True),
        ("DataFreeViolation", "an image was opened", True),
    ],
)
def test_the_class_of_an_error_is_named_where_its_message_is_not_enough(
    name, message, named, tmp_path
):
    error = {**ERROR, "ename": name, "evalue": message}
    text = failed_cell(executed(tmp_path, [error]))
    assert message in text and (name in text) == named


# ---- the report


def said(text, name="stdout"):
    return {"output_type": "stream", "name": name, "text": [text]}


def picture(width=900):
    "A picture wider than a phone."
    file = io.BytesIO()
    Image.new("RGB", (width, 40), "teal").save(file, "PNG")
    data = {"image/png": base64.b64encode(file.getvalue()).decode()}
    return {"output_type": "display_data", "data": data, "metadata": {}}


def table(columns=20):
    row = "|" + "| ".join(f"column{i} " for i in range(columns)) + "|\n"
    text = row + "|---" * columns + "|\n" + row
    return {"output_type": "display_data", "data": {"text/markdown": text}, "metadata": {}}


def main_part(page):
    "The page without its head, where the styles are."
    return page[page.index("<main>") :]


def test_the_report_is_what_the_notebook_shows(tmp_path):
    notebook = executed(tmp_path, [said("this & that")])
    page = write_report(notebook, tmp_path / "out" / "r.html").read_text()
    assert "this &amp; that" in page and "Title" in page


def test_the_answer_comes_first_and_once(tmp_path):
    notebook = executed(tmp_path, [said("how")], [said("the answer")], tags={1: ["answer"]})
    page = main_part(write_report(notebook, tmp_path / "r.html").read_text())
    places = [page.index(word) for word in ("Title", "the answer", "about this", "how")]
    assert places == sorted(places) and page.count("the answer") == 1
    assert page.index("the answer") < page.index("<details>"), "no code before it"


def test_code_is_folded(tmp_path):
    notebook = executed(tmp_path, [said("a")], [], [said("b")], tags={2: ["answer"]})
    page = main_part(write_report(notebook, tmp_path / "r.html").read_text())
    assert page.count("<details>") == page.count("</details>") == 3
    assert not re.search("<details[^>]* open", page)


def test_a_run_that_stopped_says_so_first(tmp_path):
    notebook = executed(tmp_path, [said("how")], [ERROR])
    page = main_part(write_report(notebook, tmp_path / "r.html").read_text())
    assert page.index("did not finish") < page.index("how")
    notebook = executed(tmp_path, [said("how")])
    page = main_part(write_report(notebook, tmp_path / "r.html", "the process died").read_text())
    assert page.index("the process died") < page.index("how")
    finished = write_report(executed(tmp_path, [said("how")]), tmp_path / "r.html").read_text()
    assert "did not finish" not in finished


def test_names_and_errors_of_others_are_text_on_the_page(tmp_path):
    "Class names in tables, and the reason why a run did not finish."
    names = ["cat", "<img src=x onerror=alert(1)>", "a|b", "*my* `run`"]
    shared = align_classes(names, names)
    assert all(name in str(shared) for name in shared.classes), (
        "without escapes where it is printed"
    )
    data = {"text/markdown": shared._repr_markdown_()}
    output = {"output_type": "display_data", "data": data, "metadata": {}}
    notebook = executed(tmp_path, [output])
    failure = "wanted <PosixPath> *.png and *.jpg in my_run_1"
    page = main_part(write_report(notebook, tmp_path / "r.html", failure).read_text())
    assert "wanted &lt;PosixPath&gt; *.png and *.jpg in my_run_1" in page
    cells = re.findall("<td[^>]*>(.*?)</td>", page)
    assert cells[::3] == [html.escape(name) for name in shared.classes] and len(cells) == 12
    assert "<img" not in page


@pytest.mark.parametrize(
    "output",
    [
        said(
            "\rteacher:  50%|##  | 1/2 [00:01<00:01]\rteacher: 100%|####| 2/2 [00:02]\n", "stderr"
        ),
        said("reading: 12it [00:03,  4.1it/s]\n", "stderr"),
        {
            "output_type": "display_data",
            "metadata": {},
            "data": {
                "application/vnd.jupyter.widget-view+json": {"model_id": "m"},
                "text/plain": ["teacher: 100%|####| 2/2"],
            },
        },
    ],
    ids=["text", "of unknown length", "widget"],
)
def test_bars_are_left_out_and_what_stands_beside_them_is_kept(output, tmp_path):
    notebook = executed(tmp_path, [output, said("teachers: 3 s")])
    content = json.loads(notebook.read_text())
    content["metadata"]["widgets"] = {"application/vnd.jupyter.widget-state+json": {"state": {}}}
    notebook.write_text(json.dumps(content))
    page = main_part(write_report(notebook, tmp_path / "r.html").read_text())
    assert "teachers: 3 s" in page
    assert not re.search("50%|100%|12it|widget", page)


def test_raw_cells_are_left_out(tmp_path):
    notebook = executed(tmp_path, [said("a")])
    content = json.loads(notebook.read_text())
    raw = {"cell_type": "raw", "metadata": {}, "source": ["---\n", "skip_exec: true\n", "---"]}
    notebook.write_text(json.dumps({**content, "cells": [raw, *content["cells"]]}))
    page = main_part(write_report(notebook, tmp_path / "r.html").read_text())
    assert "skip_exec" not in page and page.index("Title") < page.index("<details>")


def test_no_script_and_no_address_is_loaded(tmp_path):
    page = write_report(executed(tmp_path, [picture(), said("a")]), tmp_path / "r.html").read_text()
    assert not re.search(r"<script[^>]* src|<link[^>]* href|url\(.?http|import\(", page)


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
PAGE = """() => {
  const images = [...document.images];
  const box = e => e.getBoundingClientRect();
  return {
    wide: document.documentElement.scrollWidth - innerWidth,
    broken: images.filter(e => !e.naturalWidth).length,
    cut: images.filter(e => box(e).right > innerWidth + 1).length,
    light: getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3)
      .every(v => v > 200),
    code: [...document.querySelectorAll('.jp-InputArea-editor')]
      .filter(e => e.checkVisibility()).length,
  };
}"""


@pytest.mark.skipif(
    not CHROMIUM or importlib.util.find_spec("playwright") is None,
    reason="needs playwright and a Chromium browser",
)
def test_in_a_browser_without_a_network(tmp_path):
    "No request, no error; it fits a desk and a phone, and follows the reader's scheme."
    from playwright.sync_api import sync_playwright

    notebook = executed(tmp_path, [picture(), table(), said("word " * 99)], tags={0: ["answer"]})
    page = write_report(notebook, tmp_path / "r.html")
    with sync_playwright() as p:
        browser = p.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        for width in (1440, 390):
            for scheme in ("light", "dark"):
                view = {"width": width, "height": 900}
                context = browser.new_context(viewport=view, color_scheme=scheme, offline=True)
                tab, asked, said_there = context.new_page(), [], []
                tab.on("request", lambda r, asked=asked: asked.append(r.url))
                tab.on("console", lambda m, out=said_there: out.append(m.text))
                tab.goto(page.as_uri())
                found = tab.evaluate(PAGE)
                assert found.pop("light") == (scheme == "light")
                assert not any(found.values()), (width, scheme, found)
                outside = [url for url in asked if not url.startswith(("file:", "data:"))]
                assert not outside and not said_there
                context.close()
        browser.close()


# ---- bars of text


@pytest.mark.parametrize("wanted", ["1", ""])
def test_bars_are_text_where_it_is_asked_for(wanted, monkeypatch):
    "In a process of its own, since the choice is made when tqdm.auto is imported."
    pytest.importorskip("ipywidgets")
    code = (
        "import sys, types; sys.modules['ipykernel.zmqshell'] = types.ModuleType('zmqshell')\n"
        "from dfsbir.app.executed import use_text_bars; use_text_bars()\n"
        "import IPython; from tqdm.auto import tqdm; print('notebook' in str(tqdm.__mro__))"
    )
    monkeypatch.setenv(TEXT_BARS, wanted)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True
    )
    assert done.stdout.strip() == str(not wanted), done.stderr


def test_not_under_papermill():
    assert notebook_of_papermill() is None
