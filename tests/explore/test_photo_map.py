"The map tab, without a browser."

import io

import pytest
from PIL import Image

pytest.importorskip("anywidget", reason="the map needs pip install 'dfsbir[explore]'")

from dfsbir.explore.embedding_map import EmbeddingMap
from dfsbir.explore.panels import Worker
from dfsbir.explore.photo_map import MapPanel, photo_map


def test_the_widget_holds_every_place_and_picture(run, sets):
    widget = photo_map(EmbeddingMap(run, *sets), tile=32, across=25)
    assert len(widget.xy) == 90 * 2 * 4 and widget.chosen == -1
    assert len(widget.is_sketch) == len(widget.label) == 90
    with Image.open(io.BytesIO(widget.sheet)) as sheet:
        assert sheet.size == (25 * 32, 4 * 32)


def test_a_click_shows_neighbours(run, sets, is_png):
    worker = Worker(pause=0.0)
    panel = MapPanel(run, lambda run: sets, worker)
    worker.wait()
    panel.map.chosen = 7
    worker.wait()
    assert is_png(panel.image.value) and panel.status.value.startswith("photo 7, ")


def test_images_that_cannot_be_read_are_reported(run):
    def missing(run):
        raise FileNotFoundError("no test photos")

    worker = Worker(pause=0.0)
    panel = MapPanel(run, missing, worker)
    worker.wait()
    assert panel.status.value == "no test photos" and panel.map is None
