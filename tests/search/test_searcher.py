"""Searching: strokes of every kind, queries as files, pictures and tensors, mistakes."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from search.helpers import COUNT, picture, save

from dfsbir.data.pen import measure_pen
from dfsbir.data.toy import toy_pairs
from dfsbir.search.searcher import Searcher, sketch_from_strokes
from dfsbir.students.encoder import save_encoders

# ---- strokes


def ink_of(strokes):
    "Where the drawing has ink, (1,96,96) of 0 and 1."
    return (sketch_from_strokes(strokes, 96) < 0.5).float()


def around(ink):
    "The ink and what lies within two pixels of it."
    return torch.nn.functional.max_pool2d(ink, 5, 1, 2)


def walked_inside(stroke, n=1500):
    "The points of a stroke that lie on the canvas, as one stroke each, by walking along it."
    points = np.concatenate([np.linspace(a, b, n) for a, b in zip(stroke, stroke[1:])])
    return [[p] for p in points[((points >= 0) & (points <= 1)).all(1)]]


@pytest.mark.parametrize("seed", range(6))
def test_strokes_are_cut_at_the_edge(seed):
    "What is drawn is what lies on the canvas: the same picture as of the points found by walking."
    stroke = np.random.default_rng(seed).uniform(-0.6, 1.6, (9, 2))
    stroke[3] = stroke[2] + [0, 0.3]  # a vertical piece
    points = walked_inside(stroke)
    if not points:
        with pytest.raises(ValueError):
            sketch_from_strokes([stroke], 96)
        return
    drawn, walked = ink_of([stroke]), ink_of(points)
    assert (drawn <= around(walked)).all() and (walked <= around(drawn)).all()


@pytest.mark.parametrize(
    "strokes, fact",
    [
        ([], "no strokes"),
        ([[]], "no strokes"),
        ([[], np.zeros((0, 2))], "no strokes"),
        ([[(0.5, float("nan"))]], "finite"),
        ([[(0.1, 0.1), (float("inf"), 0.5)]], "finite"),
        ([[(1.5, 0.5)]], "canvas"),
        ([[(2, 2), (3, 3)], [(-1, 0), (-0.1, 1)]], "from -1 to 3"),
        ([[(0.1, 0.2, 0.3)]], r"\(x, y\)"),
        ([[(0.1, 0.2, 0.3), (0.4, 0.5, 0.6)]], r"shape \(2, 3\)"),  # six numbers, no three points
        ([[(0.1, 0.2), (0.3, 0.4, 0.5)]], r"\(x, y\)"),
        ([(0.1, 0.2), (0.3, 0.4)], r"shape \(2,\)"),  # one stroke, not in a list of strokes
        ([["ab"]], r"\(x, y\)"),
        (5, r"\(x, y\)"),
        ([5], r"\(x, y\)"),
        (None, r"\(x, y\)"),
    ],
)
def test_bad_strokes(strokes, fact, gallery, encoders):
    with pytest.raises(ValueError, match=fact):
        sketch_from_strokes(strokes, 32)
    with pytest.raises(ValueError, match=fact):
        Searcher(gallery, encoders).by_strokes(strokes)


@pytest.mark.parametrize(
    "strokes",
    [
        [[(0.5, 0.5)]],
        [[(0, 0)]],
        [[(0.5, 0.5), (0.5, 0.5)]],
        [[(1e-9, 1)], []],
        [[(0.2, 0.5), (1.4, 0.5)]],
        [[(-9, 0.5), (9, 0.5)]],
        [np.array([[0.1, 0.1], [0.9, 0.9]])],
    ],
)
def test_scant_strokes_are_drawn(strokes, gallery, encoders):
    sketch = sketch_from_strokes(strokes, 32)
    assert sketch.shape == (1, 32, 32) and sketch.max() == 1 and sketch.min() < 0.8
    hits = Searcher(gallery, encoders).by_strokes(strokes, k=4)
    assert hits.scores.isfinite().all() and hits.indices.shape == (1, 4)


def test_by_strokes_is_by_sketch_of_the_drawing(gallery, encoders):
    strokes = [[(0.2, 0.2), (0.8, 0.3)], [(0.5, 0.5), (0.4, 0.9), (0.1, 0.8)]]
    searcher = Searcher(gallery, encoders)
    a = searcher.by_strokes(strokes, 7, width=0.05)
    b = searcher.by_sketch(sketch_from_strokes(strokes, 128, 0.05), 7)  # the net has 28 px
    assert torch.equal(a.indices, b.indices) and torch.equal(a.scores, b.scores)


def test_the_pen_of_the_sketch_teacher(gallery, encoders):
    strokes = [[(0.2, 0.2), (0.8, 0.3)], [(0.5, 0.5), (0.4, 0.9), (0.1, 0.8)]]
    plain = Searcher(gallery, encoders)
    assert plain.pen == 0.03
    wide = copy.deepcopy(encoders)
    wide["sketch"].normalizer.pen = 0.053
    searcher = Searcher(gallery, wide)
    assert searcher.pen == 0.053
    by_strokes = searcher.by_strokes(strokes, 7)
    assert torch.equal(by_strokes.scores, plain.by_strokes(strokes, 7, width=0.053).scores)
    thin = sketch_from_strokes(strokes, 128, 0.03)
    by_picture = searcher.by_sketch(thin, 7)
    assert "0.053" in by_picture.notes[0]
    drawn = searcher.by_sketch(sketch_from_strokes(strokes, 128, 0.053), 7)
    assert "0.053" not in drawn.notes[0]
    assert abs(measure_pen(by_picture.queries).item() - 0.053) < 0.01
    assert measure_pen(plain.by_sketch(thin, 7).queries).item() < 0.04


# ---- queries


def test_searcher_takes_folders(gallery, encoders, tmp_path):
    save_encoders(tmp_path / "e", encoders)
    strokes = [[(0, 0), (1, 1)]]
    by_folder = Searcher(gallery.folder, tmp_path / "e").by_strokes(strokes)
    assert torch.equal(by_folder.indices, Searcher(gallery, encoders).by_strokes(strokes).indices)


def test_k_and_label(gallery, encoders, toy):
    searcher, sketch = Searcher(gallery, encoders), toy[1][0][0]
    assert searcher.by_sketch(sketch, k=10**6).indices.shape == (1, COUNT)
    assert len(set(searcher.by_sketch(sketch, k=50, label="car").indices[0].tolist())) == 3
    with pytest.raises(ValueError, match="0"):
        searcher.by_sketch(sketch, k=0)
    with pytest.raises(ValueError, match="unicorn.*bottle, car"):
        searcher.by_sketch(sketch, label="unicorn")


@pytest.mark.parametrize(
    "method, image, fact",
    [
        ("by_sketch", torch.ones(1, 9, 9), "blank"),
        ("by_sketch", torch.rand(3, 9, 9), r"\(1,H,W\)"),
        ("by_sketch", torch.rand(1, 9, 9) * 3, r"\[0,1\]"),
        ("by_sketch", torch.full((1, 9, 9), float("nan")), r"\[0,1\]"),
        ("by_sketch", torch.zeros(0, 1, 9, 9), r"\(0, 1, 9, 9\)"),
        ("by_photo", torch.rand(1, 9, 9), r"\(3,H,W\)"),
    ],
)
def test_tensors_that_are_no_query(method, image, fact, gallery, encoders):
    with pytest.raises(ValueError, match=fact):
        getattr(Searcher(gallery, encoders), method)(image)


def test_a_file_that_is_not_there(gallery, encoders):
    with pytest.raises(FileNotFoundError, match="nowhere.png"):
        Searcher(gallery, encoders).by_sketch("nowhere.png")


def test_a_query_may_be_a_file_a_picture_or_a_tensor(gallery, encoders, toy, tmp_path):
    searcher, x = Searcher(gallery, encoders), (toy[1].images() * 255).round() / 255
    image = Image.fromarray((x[3, 0] * 255).byte().numpy())
    image.save(tmp_path / "s.png")
    pictures = [image.convert(mode) for mode in ("L", "RGB", "RGBA", "CMYK")]
    queries = [tmp_path / "s.png", str(tmp_path / "s.png"), *pictures]
    found = [searcher.by_sketch(query, 5).indices for query in queries]
    assert all(torch.equal(places, found[0]) for places in found[1:])
    single = searcher.by_sketch(x[3], 5)
    assert torch.equal(searcher.by_sketch((x[3] * 255).byte(), 5).indices, single.indices)
    many = searcher.by_sketch(x[:4], 5)
    assert len(many) == 4 and torch.equal(many.indices[3:], single.indices)
    assert many.contact_sheet(2).size == many.contact_sheet(3).size


def test_a_picture_is_read_like_its_file(gallery, encoders, tmp_path):
    "Black ink on a transparent ground that is black as well."
    searcher, ink = Searcher(gallery, encoders), Image.new("P", (60, 60), 1)
    ink.putpalette([0, 0, 0, 0, 0, 0] + [0] * 762)
    ink.paste(0, (10, 25, 50, 35))
    ink.save(tmp_path / "ink.png", transparency=1)
    with Image.open(tmp_path / "ink.png") as image:
        assert image.mode == "P"
        by_picture, by_file = searcher.by_sketch(image), searcher.by_sketch(tmp_path / "ink.png")
    assert torch.equal(by_picture.indices, by_file.indices)


@pytest.mark.parametrize("steps", [["HSV"], ["LA", "La"], ["RGBA", "RGBa"]])
def test_pictures_in_modes_that_few_formats_know(steps, gallery, encoders):
    image = picture()
    for mode in steps:
        image = image.convert(mode)
    assert len(Searcher(gallery, encoders).by_photo(image)) == 1


# ---- drawings that are not canonical


def test_a_drawing_is_normalised_and_its_notes_say_so(gallery, encoders, toy, tmp_path):
    "As a file, a picture or a tensor: light ink on a dark ground is found as the clean drawing is."
    searcher, clean = Searcher(gallery, encoders), toy[1][3][0]
    image = Image.fromarray((255 * (1 - 0.8 * clean[0])).byte().numpy())
    image.save(tmp_path / "board.png")
    assert searcher.by_sketch(clean).notes == [""]
    for query in (tmp_path / "board.png", image, 1 - 0.8 * clean):
        hits = searcher.by_sketch(query)
        assert "inverted" in hits.notes[0] and len(hits.notes) == 1
        assert hits.queries[0].mean() > 0.7, "dark ink on light paper"
    many = searcher.by_sketch(torch.stack([clean, 1 - 0.8 * clean]))
    assert [bool(note) for note in many.notes] == [False, True]


def test_a_photo_for_a_sketch_is_noticed(gallery, encoders, tmp_path):
    searcher, (large, _) = Searcher(gallery, encoders), toy_pairs(20, size=128, split="test")
    files = [save((large,), i, tmp_path / f"{i}.jpg") for i in range(20)]
    notes = [searcher.by_sketch(file).notes[0] for file in files]
    assert sum("photo" in note for note in notes) >= 18
    assert not searcher.by_photo(files[0]).notes


def test_blank_pictures_of_any_tone_are_refused(gallery, encoders, tmp_path):
    for level in (0, 120, 245, 255):
        Image.new("L", (90, 60), level).save(tmp_path / "blank.png")
        with pytest.raises(ValueError, match="blank"):
            Searcher(gallery, encoders).by_sketch(tmp_path / "blank.png")
