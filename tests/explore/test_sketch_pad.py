"The drawing tab, without a browser."

import pytest
from PIL import Image

pytest.importorskip("anywidget", reason="the pad needs pip install 'dfsbir[explore]'")

import ipywidgets as W

from dfsbir.explore.finder import Found
from dfsbir.explore.samples import sample_drawing
from dfsbir.explore.sketch_pad import DrawPanel, found_html
from dfsbir.explore.worker import Worker

LINE = [[0.1, 0.2], [0.8, 0.7]]


@pytest.fixture
def worker():
    return Worker(pause=0.0)


@pytest.fixture
def panel(run, finder, worker):
    return DrawPanel(run, finder, worker)


def find_widgets(box, kind):
    "All widgets of a kind below a box."
    own = [box] if isinstance(box, kind) else []
    children = getattr(box, "children", ())
    return own + [widget for child in children for widget in find_widgets(child, kind)]


def press(panel, css_class):
    (button,) = [b for b in find_widgets(panel, W.Button) if css_class in b._dom_classes]
    button.click()
    panel.worker.wait()


def test_strokes_are_searched_with(panel, worker):
    panel.pad.strokes = [LINE]
    worker.wait()
    assert panel.cards.value.count("<img") == 12 and panel.status.value.startswith("1 stroke;")


def test_an_estimated_drawing_is_put_undone_and_cleared(panel, run, finder):
    strokes = sample_drawing(run, run.classes[0], 0)[1]
    press(panel, "dfs-put")
    assert panel.pad.strokes == finder.strokes == strokes
    press(panel, "dfs-undo")
    assert panel.pad.strokes == strokes[:-1]
    press(panel, "dfs-clear")
    assert panel.pad.strokes == [] and panel.cards.value.count("<img") == 0


def test_another_drawing_of_the_class(panel, run):
    press(panel, "dfs-random")
    seed = panel.seed.value
    assert panel.svg.value == sample_drawing(run, run.classes[0], seed)[0]


def test_the_next_key_puts_the_next_drawing_on_the_pad(panel, run):
    panel.seed.value = 98
    for seed in (99, 0):
        panel.next_drawing()
        panel.worker.wait()
        assert panel.pad.strokes == sample_drawing(run, run.classes[0], seed)[1]


def test_the_tab_says_what_it_shows(panel):
    assert "Look for" in panel.children[0].value


def test_strokes_outside_the_canvas_are_reported_not_raised(panel, worker):
    panel.pad.strokes = [[[5.0, 5.0], [6.0, 6.0]]]
    worker.wait()
    assert "canvas" in panel.status.value


@pytest.mark.parametrize("kind", ["paper", "objects"])
def test_a_run_without_strokes_offers_no_drawings(kind, finder, worker, request):
    panel = DrawPanel(request.getfixturevalue(kind), finder, worker)
    assert not [b for b in find_widgets(panel, W.Button) if "dfs-put" in b._dom_classes]
    panel.next_drawing()  # the key N has nothing to put
    assert panel.pad.strokes == []


def test_cards_escape_what_files_are_called():
    found = Found(Image.new("RGB", (8, 8)), "<b>", 0.5, 'a"><script>.jpg')
    cards = found_html([found], ["<b>\nsimilarity .50"], 3)
    assert "<script>" not in cards and "&lt;b&gt;<br>similarity .50" in cards
