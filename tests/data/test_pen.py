"The width of a drawing's lines: measured, changed, and what a real classifier makes of it."

import json
import os
from pathlib import Path

import pytest
import torch

from dfsbir.core.types import Normalizer
from dfsbir.data.pen import QUICKDRAW_PEN, measure_pen, redraw, redraw_set
from dfsbir.data.quickdraw import rasterise, read_quickdraw
from dfsbir.data.toy import toy_pairs
from dfsbir.teachers.card import make_card
from dfsbir.teachers.loading import load_teacher

ROOT = Path(__file__).resolve().parents[2]
PUBLIC = Path(os.environ.get("DFSBIR_DATA", ROOT.parent / "shared" / "data")) / "public181"
HOUSE = [
    [(0, 40), (0, 100), (80, 100), (80, 40), (0, 40), (40, 0), (80, 40)],
    [(30, 100), (30, 65), (50, 65), (50, 100)],
]


def house(width, size=128):
    return rasterise(HOUSE, size, width)[None] / 255


@pytest.mark.parametrize("size", [64, 128, 200])
@pytest.mark.parametrize("width", [0.03, 0.053, 0.08])
def test_the_width_is_measured(size, width):
    assert abs(measure_pen(house(width, size)).item() - width) < 0.2 * width


@pytest.mark.parametrize("width", [0.02, 0.03, 0.08])
@pytest.mark.parametrize("pen", [0.03, 0.053])
def test_lines_get_the_width_that_is_asked_for(width, pen):
    before = house(width)
    after, changed = redraw(before, pen)
    assert changed.item() == (abs(width - pen) > 0.005)
    assert abs(measure_pen(after).item() - pen) < 0.2 * pen
    assert after.min() >= 0 and after.max() <= 1
    ink, more = 1 - before, 1 - after
    wider, narrower = (ink, more) if pen > width else (more, ink)
    assert (narrower - wider > -1e-6).all()  # lines grow and shrink where they are


def test_what_is_left_as_it_is():
    same, changed = redraw(house(0.053), 0.053)
    assert torch.equal(same, house(0.053)) and not changed
    assert not redraw(house(0.06, 28), 0.07)[1]  # half a pixel is more than the difference
    blank = torch.ones(2, 1, 64, 64)
    assert not redraw(blank, 0.05)[1].any() and (measure_pen(blank) == 0).all()
    assert redraw_set(toy_pairs(4, 32)[1], None).size == 32


def test_thin_lines_do_not_vanish():
    lines = torch.ones(1, 1, 128, 128)
    lines[..., 20:36, 10:118] = 0  # 16 px wide
    lines[..., 80:82, 10:118] = 0  # 2 px wide
    redrawn, changed = redraw(lines, 0.03)
    assert changed.all()
    assert (1 - redrawn[..., 80:82, 10:118]).mean() > 0.9
    assert (1 - redrawn[..., 20:36, 64]).sum() < 12


@pytest.mark.parametrize("pen", [0, -0.1, 5.3, float("nan")])
def test_pens_that_are_no_width(pen):
    with pytest.raises(ValueError, match="share of the side"):
        redraw(house(0.03), pen)
    with pytest.raises(ValueError, match="share of the side"):
        Normalizer(28, 1, pen=pen)


def test_what_is_no_drawing():
    with pytest.raises(ValueError, match=r"\(N,1,S,S\)"):
        measure_pen(torch.rand(2, 3, 8, 8))
    with pytest.raises(ValueError, match="photo"):
        redraw_set(toy_pairs(4, 32)[0], 0.05)


def test_the_pen_of_a_card():
    assert "pen" not in Normalizer(28, 1).card()
    card = make_card(["a", "b"], "sketch", 28, mean=0, std=1, channels=1, pen=0.053)
    assert card["input"]["pen"] == Normalizer(**card["input"]).pen == 0.053
    with pytest.raises(ValueError, match="photos"):
        make_card(["a", "b"], "photo", 28, mean=0, std=1, pen=0.053)


def test_a_published_classifier_needs_its_pen():
    if not PUBLIC.is_dir():
        pytest.skip(f"real data: no folder {PUBLIC}")
    card = json.loads((PUBLIC / "sketch_teacher.json").read_text())
    teacher = load_teacher(PUBLIC / "sketch_teacher.ts", {**card, "modality": "sketch"})

    def accuracy(images):
        place = [teacher.classes.index(c) for c in images.classes]
        right = teacher(images.images(), bn=False).logits.argmax(1)
        return (right == torch.tensor(place)[images.labels]).float().mean().item()

    def drawn(width, size=128):
        return read_quickdraw(PUBLIC / "drawings", size, per_class=2, width=width)

    assert accuracy(drawn(QUICKDRAW_PEN)) > 0.74
    assert accuracy(drawn(0.03)) < 0.45
    for size in (64, 128):
        redrawn = redraw_set(drawn(0.03, size), QUICKDRAW_PEN)
        assert accuracy(redrawn) > accuracy(drawn(QUICKDRAW_PEN)) - 0.04
