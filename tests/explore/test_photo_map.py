"The map tab, without a browser."

import io

import pytest
from PIL import Image

pytest.importorskip("anywidget", reason="the map needs pip install 'dfsbir[explore]'")

from dfsbir.explore.embedding_map import EmbeddingMap
from dfsbir.explore.photo_map import MapPanel, photo_map
from dfsbir.explore.worker import Worker


def test_the_widget_holds_every_place_and_picture(run, sets):
    widget = photo_map(EmbeddingMap(run, *sets), tile=32, across=25)
    assert len(widget.xy) == 90 * 2 * 4 and widget.chosen == -1
    assert len(widget.is_sketch) == len(widget.label) == 90
    with Image.open(io.BytesIO(widget.sheet)) as sheet:
        assert sheet.size == (25 * 32, 4 * 32)


def test_a_click_shows_neighbours(run, sets):
    worker = Worker(pause=0.0)
    panel = MapPanel(run, lambda run: sets, worker)
    assert panel.figure.busy and not panel.figure.svg
    worker.wait()
    assert not panel.figure.busy and not panel.figure.svg  # nothing before the first click
    panel.map.chosen = 7
    worker.wait()
    assert panel.figure.svg.count("<image") == 14 and "photo 7" in panel.status.value


def test_images_that_cannot_be_read_are_reported(run):
    def missing(run):
        raise FileNotFoundError("no test photos")

    worker = Worker(pause=0.0)
    panel = MapPanel(run, missing, worker)
    worker.wait()
    assert panel.figure.error == "no test photos" and panel.map is None
