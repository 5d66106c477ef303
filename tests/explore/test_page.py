"The line that is there before the explorer, without a browser."

import subprocess
import sys

import pytest

pytest.importorskip("ipywidgets", reason="the page needs pip install 'dfsbir[explore]'")

import ipywidgets as W

from dfsbir.explore.page import Preparation, progress_line


def test_progress_then_the_page():
    seen = []

    def prepare(report):
        report("action 3 of 9")
        seen.append(page.children[1].value)
        return 7

    page = Preparation("loading ...", prepare, lambda result: W.Label(f"page {result}"))
    page.worker.wait()
    assert "action 3 of 9" in seen[0] and page.children[1].value == "page 7"


def test_what_fails_is_reported_in_words():
    def prepare(report):
        raise FileNotFoundError("no finished run in <runs>")

    page = Preparation("loading ...", prepare, W.Label)
    page.worker.wait()
    assert "no finished run in &lt;runs&gt;" in page.children[1].value


def test_a_line_is_escaped():
    assert "<script>" not in progress_line("<script>").value


def test_the_first_line_needs_no_pytorch():
    code = "import sys, dfsbir.explore.page, dfsbir.explore.opening; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
