"""QuickDraw: strokes as images, records, folders of either format."""

import json
import re

import numpy as np
import pytest
import torch

from dfsbir.data.image_files import BrokenImage
from dfsbir.data.quickdraw import parse_drawing, rasterise, read_quickdraw


def distance_to_segment(points, a, b):
    t = (((points - a) @ (b - a)) / ((b - a) @ (b - a))).clamp(0, 1)
    return (points - a - t[..., None] * (b - a)).norm(dim=-1)


def test_rasterise_against_distances():
    "A pixel is inked as the distance of its centre to the nearest segment says."
    strokes = [np.array([[0.0, 0], [10, 10], [20, 0]]), np.array([[0.0, 20], [20, 20]])]
    size, width = 64, 0.06
    ink = 1 - rasterise(strokes, size, width)[0].float() / 255
    unit = size * (1 - 2 * 0.04 - width) / 20
    side = torch.arange(size) + 0.5
    centres = torch.stack(torch.meshgrid(side, side, indexing="xy"), -1).double()
    near = torch.full((size, size), 1e9, dtype=torch.double)
    for stroke in strokes:
        points = torch.tensor((stroke - 10) * unit + size / 2)
        for a, b in zip(points[:-1], points[1:]):
            near = torch.minimum(near, distance_to_segment(centres, a, b))
    wanted = (width * size / 2 - near + 0.5).clamp(0, 1).float()
    difference = (ink - wanted).abs()
    assert difference.mean() < 0.01 and (difference > 0.5).float().mean() < 0.005


def test_width_is_a_share_of_the_side():
    line = [np.array([[0, 0], [300, 100]])]
    share = [
        (255 - rasterise(line, size, 0.05).float()).mean().item() / 255 for size in (28, 64, 224)
    ]
    assert max(share) - min(share) < 0.006


def test_proportions_stay():
    line = [np.array([[0, 0], [300, 100]])]
    rows, columns = np.nonzero(rasterise(line, 96, 0.02)[0].numpy() < 128)
    assert abs(np.ptp(columns) / np.ptp(rows) - 3) < 0.25


def test_a_dot_is_a_drawing():
    assert rasterise([np.array([[5, 5]])], 32).min() < 200


@pytest.mark.parametrize("strokes", [[], [np.zeros((0, 2))], [np.array([[0, np.nan]])]])
def test_what_cannot_be_drawn_is_refused(strokes):
    with pytest.raises(ValueError):
        rasterise(strokes, 32)


RAW = {"word": "cat", "drawing": [[[0, 10.5, 20], [0, 5, 0], [0, 7, 19]], [[3], [4], [30]]]}
SIMPLE = {"word": "cat", "drawing": [[[0, 255], [0, 128]]], "key_id": "1"}


def test_a_raw_record():
    word, strokes = parse_drawing(json.dumps(RAW))
    assert word == "cat" and strokes[0].tolist() == [[0, 0], [10.5, 5], [20, 0]]
    assert strokes[1].shape == (1, 2)


def test_raw_and_simplified_files(tmp_path):
    (tmp_path / "raw").mkdir()
    cats = json.dumps(RAW) + "\n\n" + json.dumps(SIMPLE) + "\n"
    (tmp_path / "raw" / "cat.ndjson").write_text(cats)
    ants = json.dumps({**SIMPLE, "word": "ant"})
    (tmp_path / "raw" / "full_simplified_ant.ndjson").write_text(ants)
    images = read_quickdraw(tmp_path, 32)
    assert images.classes == ["ant", "cat"] and images.labels.tolist() == [0, 1, 1]
    assert images.paths[2].endswith("cat.ndjson:3")
    assert torch.equal(images.pixels()[1], rasterise(parse_drawing(json.dumps(RAW))[1], 32))
    assert len(read_quickdraw(tmp_path, 32, per_class=1)) == 2
    lazy = read_quickdraw(tmp_path, 32, classes=["cat"], cached=False)
    assert torch.equal(lazy.images(), images.images()[1:])
    with pytest.raises(ValueError, match="dog"):
        read_quickdraw(tmp_path, 32, classes=["dog"])
    (tmp_path / "simplified").mkdir()
    (tmp_path / "simplified" / "cat.ndjson").write_text(json.dumps(SIMPLE))
    with pytest.raises(ValueError, match="raw.*simplified"):
        read_quickdraw(tmp_path, 32)


def test_two_files_of_one_class_are_refused(tmp_path):
    for name in ("cat", "full_raw_cat"):
        (tmp_path / f"{name}.ndjson").write_text(json.dumps(SIMPLE))
    with pytest.raises(ValueError, match="cat.ndjson"):
        read_quickdraw(tmp_path, 32)


@pytest.mark.parametrize(
    "line, says",
    [
        ("{", "not JSON"),
        ("[]", "'word' and 'drawing'"),
        ('{"word": "cat", "drawing": []}', "no strokes"),
        ('{"word": "cat", "drawing": [[[1, 2], [1]]]}', "[2, 1]"),
        ('{"word": "cat", "drawing": [[[1]]]}', "stroke 0"),
        ('{"word": "cat", "drawing": [[[NaN], [1]]]}', "finite"),
        ('{"word": "cat", "drawing": [[["a"], [1]]]}', "not a number"),
        ('{"word": "dog", "drawing": [[[1], [1]]]}', "'cat'"),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_broken_records_are_named(tmp_path, line, says, workers):
    (tmp_path / "cat.ndjson").write_text(json.dumps(SIMPLE) + "\n" + line + "\n")
    with pytest.raises(BrokenImage, match=re.escape(says)) as e:
        read_quickdraw(tmp_path, 28, workers=workers)
    assert e.value.path.endswith("cat.ndjson:2")
    with pytest.warns(UserWarning, match="1 of 2"):
        images = read_quickdraw(tmp_path, 28, on_error="skip", workers=workers)
    assert len(images) == 1 and says in images.broken[0][1]


def test_bitmaps(tmp_path):
    bitmaps = np.zeros((3, 784), np.uint8)
    bitmaps[:, 100:110] = 255
    np.save(tmp_path / "full_numpy_bitmap_cat.npy", bitmaps)
    images = read_quickdraw(tmp_path, 28)
    assert images.classes == ["cat"]
    assert torch.equal(images.pixels(), torch.from_numpy(255 - bitmaps).view(3, 1, 28, 28))
    assert read_quickdraw(tmp_path, 56, per_class=2).images().shape == (2, 1, 56, 56)


def test_broken_bitmaps(tmp_path):
    np.save(tmp_path / "cat.npy", np.zeros((3, 784), np.uint8))
    np.save(tmp_path / "dog.npy", np.array([{"evil": 1}], object))
    with pytest.raises(BrokenImage, match="dog.npy.*object"):
        read_quickdraw(tmp_path, 28)
    np.save(tmp_path / "dog.npy", np.zeros((2, 783), np.uint8))
    with pytest.warns(UserWarning, match="1 of 4"):
        images = read_quickdraw(tmp_path, 28, on_error="skip")
    assert len(images) == 3 and "(2, 783)" in images.broken[0][1]


def test_real_quickdraw(data_dir):
    images = read_quickdraw(data_dir / "quickdraw", 64)
    assert len(images.classes) == 40 and len(images) >= 40 and not images.broken
    assert (images.images().amin((1, 2, 3)) < 0.3).all() and images.images().mean() > 0.7
