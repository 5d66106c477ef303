"Figures outside of pyplot, laid out for a width, as PNG and SVG."

import base64
import io
import re
import subprocess
import sys

import matplotlib.pyplot as plt
import pytest
import torch
from PIL import Image

from dfsbir.explore.pictures import (
    Picture,
    png_bytes,
    short,
    shortened,
    text_width,
    tiles,
    wrapped,
)


def test_a_picture_is_unknown_to_pyplot(is_png):
    before = plt.get_fignums()
    picture = tiles([torch.rand(3, 1, 8, 8), torch.rand(2, 3, 8, 8)], title="two rows")
    assert is_png(png_bytes(picture)) and plt.get_fignums() == before


def boxes(picture):
    "Places of the axes in inches from the upper left corner; IPython draws without savefig."
    width, height = picture.figure.get_size_inches()
    found = []
    for ax in picture.axes:
        x0, y0, x1, y1 = ax.get_position().extents
        found.append((x0 * width, (1 - y1) * height, x1 * width, (1 - y0) * height))
    return found


@pytest.mark.parametrize("width", [3.0, 3.6, 6.0, 12.0])
@pytest.mark.parametrize("columns", [1, 7, 16])
def test_rows_fit_every_width_and_nothing_overlaps(width, columns):
    picture = Picture(width, "a title that is long enough to need two lines on a phone, surely")
    images = torch.rand(columns, 3, 4, 4)
    captions = [["one\ntwo"] * columns] * 2
    picture.tiles([images, images], captions, ["photo", "sketch"])
    picture.plots(3)
    places = boxes(picture)
    assert len(places) == 2 * columns + 3
    height = picture.figure.get_size_inches()[1]
    for x0, y0, x1, y1 in places:
        assert x0 >= 0 and y0 >= 0 and x1 <= width + 1e-6 and y1 <= height + 1e-6
    for i, a in enumerate(places):
        for b in places[i + 1 :]:
            apart = a[2] <= b[0] + 1e-6 or b[2] <= a[0] + 1e-6
            assert apart or a[3] <= b[1] + 1e-6 or b[3] <= a[1] + 1e-6


def test_blocks_of_images_are_of_equal_length():
    picture = tiles([torch.rand(8, 1, 4, 4)], width=7.0, side=0.95)
    tops = [round(place[1], 3) for place in boxes(picture)]
    assert [tops.count(top) for top in sorted(set(tops))] == [4, 4]


def test_images_keep_their_own_pixels_in_svg():
    svg = tiles([torch.rand(2, 3, 8, 8)], [["a", "b"]]).svg()
    assert svg.count("<image") == 2
    assert re.findall(r"<!-- (\w+) -->", svg) == ["a", "b"]  # captions can be read back


def test_a_transparent_svg_has_no_background():
    picture = tiles([torch.rand(1, 3, 8, 8)])
    assert "#ffffff" in picture.svg() and "#ffffff" not in picture.svg(transparent=True)


@pytest.mark.parametrize(
    "number, text", [(0.934, ".93"), (1.0, "1.0"), (0.999, "1.0"), (0, ".00"), (-0.25, "-.25")]
)
def test_short_numbers(number, text):
    assert short(number) == text


def test_captions_are_cut_to_their_place():
    assert shortened("fish\nteacher .98", 1.0) == "fish\nteacher .98"
    first, second = shortened("a very long name of a class\nshort", 1.0).split("\n")
    assert text_width(first) <= 1.0 and first.endswith("…") and second == "short"
    assert shortened("similarity 1.000", 0.95) == "similarity 1.000"  # as wide as it is drawn


@pytest.mark.parametrize("size", [8, 10])
@pytest.mark.parametrize("width", [0.6, 1.5, 4.0])
def test_text_is_wrapped_to_its_place_and_no_word_is_lost(size, width):
    text = "photo student: 86% of 300 test images right, and an unpronounceablylongword"
    lines = wrapped(text, width, size)
    assert all(text_width(line, size) <= width for line in lines)
    kept = [word for word in text.split() if text_width(word, size) <= width]
    assert [word for word in " ".join(lines).split() if not word.endswith("…")] == kept


def test_the_measured_width_is_the_drawn_one():
    figure = Picture(4.0).figure
    for line in ("similarity 1.000", "mmm", "iii"):
        drawn = figure.text(0, 0, line, fontsize=8).get_window_extent().width / figure.dpi
        assert text_width(line) == pytest.approx(drawn, abs=0.06)


def test_names_of_rows_with_two_lines_stand_apart():
    for width in (3.25, 9.0):
        picture = tiles([torch.rand(4, 1, 4, 4)] * 2, names=["sketch\nweight 16"] * 2, width=width)
        labels = [ax.yaxis.label for ax in picture.axes if ax.get_ylabel()]
        picture.figure.draw_without_rendering()
        boxes = [label.get_window_extent() for label in labels]
        assert all(box.x0 >= 0 for box in boxes)
        spans = sorted((box.y0, box.y1) for box in boxes)
        assert all(below[1] <= above[0] for below, above in zip(spans, spans[1:]))


def test_a_notebook_shows_a_small_png_also_after_pyplot():
    "With IPython's own formatter of figures, which pyplot brings, as without."
    code = """
import base64
from IPython.core.interactiveshell import InteractiveShell
from IPython.core.pylabtools import select_figure_formats
shell = InteractiveShell.instance()
select_figure_formats(shell, {"png"})
shell.display_formatter.active_types = shell.display_formatter.format_types
import torch
from dfsbir.explore.pictures import tiles
data, _ = shell.display_formatter.format(tiles([torch.rand(8, 3, 32, 32)] * 4))
print(base64.b64encode(data["image/png"]).decode())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    png = base64.b64decode(done.stdout.strip().splitlines()[-1])
    with Image.open(io.BytesIO(png)) as image:
        assert image.mode == "P"  # a palette, which takes a third of the bytes
