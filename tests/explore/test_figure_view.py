"The figure in the browser: its states and its files. What it looks like is tested in a browser."

import io

import pytest
import torch
from PIL import Image

pytest.importorskip("anywidget", reason="figures need pip install 'dfsbir[explore]'")

from dfsbir.explore.figure_view import FigureView, draw_svg
from dfsbir.explore.pictures import tiles


@pytest.fixture
def drawn():
    return draw_svg(lambda: tiles([torch.rand(2, 1, 8, 8)], [["fish", "car"]]))


def test_states_from_empty_to_drawn_to_failed_and_back(drawn):
    view = FigureView()
    assert not view.svg and not view.busy and not view.error
    view.start("embedding ...")
    assert view.busy and view.doing == "embedding ..." and not view.svg
    view.show(*drawn)
    assert view.svg and not view.busy and not view.error
    view.start()
    assert view.busy and view.svg  # the old figure stays while the new one is drawn
    view.fail(ValueError("no sample"))
    assert view.error == "no sample" and not view.busy
    view.show(*drawn)
    assert not view.error


def test_an_error_without_words_has_a_name():
    view = FigureView()
    view.fail(MemoryError())
    assert view.error == "MemoryError"


@pytest.mark.parametrize("format", ["png", "svg"])
def test_what_a_button_asks_for_is_sent_as_a_file(drawn, format):
    view, sent = FigureView(name="run samples"), []
    view.show(*drawn)
    view.send = lambda content, buffers: sent.append((content, buffers))
    view._handle_custom_msg({"format": format}, [])
    ((content, (data,)),) = sent
    assert content["name"] == f"run samples.{format}" and format in content["type"]
    if format == "png":
        with Image.open(io.BytesIO(data)) as image:
            assert image.info["dpi"][0] == pytest.approx(200, abs=1)
    else:
        assert b"<svg" in data and b"#ffffff" in data


def test_there_is_no_file_without_a_figure():
    with pytest.raises(ValueError, match="no figure"):
        FigureView().file("png")
