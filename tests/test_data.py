"""Data: oracles, faults and contracts that the notebook does not hold."""

import json
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dfsbir.core.types import PairBatch
from dfsbir.data.benchmarks import read_sketchy, read_tuberlin
from dfsbir.data.folders import read_folder
from dfsbir.data.image_files import BrokenImage, open_image
from dfsbir.data.image_set import ImageSet
from dfsbir.data.instance_pairs import read_photos, read_qmul_v1, read_qmul_v2, read_triplets
from dfsbir.data.manifest import Manifest, ManifestMismatch, hashed_split
from dfsbir.data.plots import show_images, show_pairs
from dfsbir.data.quickdraw import parse_drawing, rasterise, read_quickdraw
from dfsbir.data.toy import _compose, toy_pairs
from dfsbir.data.toy_shapes import TOY_CLASSES, TOY_HELD_OUT

REAL = Path(
    os.environ.get("DFSBIR_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data"
)


def real(name):
    if not (REAL / name).is_dir():
        pytest.skip(f"{REAL / name} is not here: set DFSBIR_DATA to the folder of real data")
    return REAL / name


def picture(path, value=100, mode="RGB", size=(40, 40), **kw):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(
        mode,
        size,
        value if mode in ("L", "I;16") else (value,) * len(Image.new(mode, (1, 1)).getbands()),
    ).save(path, **kw)
    return path


@pytest.fixture
def tree(tmp_path):
    for c in ("cat", "ant"):
        for k in range(3):
            picture(tmp_path / c / f"{k}.png", 50 * k + 20)
    return tmp_path


# ---- toy set
def mean_ap(q, g, labels):
    "Slow mean average precision of the cosine."
    sim = torch.nn.functional.normalize(q, dim=1) @ torch.nn.functional.normalize(g, dim=1).T
    ap = []
    for i, order in enumerate(sim.argsort(dim=1, descending=True)):
        hit = (labels[order] == labels[i]).float()
        ap.append((hit.cumsum(0) / torch.arange(1, len(hit) + 1) * hit).sum() / hit.sum())
    return float(torch.stack(ap).mean())


@pytest.fixture(scope="module")
def toy():
    return toy_pairs(200, 32, seed=1, split="test")


def test_toy_is_what_it_says(toy):
    photos, sketches = toy
    assert photos.images().shape == (200, 3, 32, 32) and sketches.images().shape == (200, 1, 32, 32)
    assert torch.equal(photos.labels, sketches.labels) and torch.equal(
        photos.instances, sketches.instances
    )
    assert torch.bincount(photos.labels).tolist() == [20] * 10 and photos.classes == list(
        TOY_CLASSES
    )
    assert (
        len(TOY_CLASSES) >= 10
        and len(TOY_HELD_OUT) >= 4
        and not set(TOY_CLASSES) & set(TOY_HELD_OUT)
    )
    assert sketches.images().mean() > 0.8, "sketches are dark ink on white paper"
    assert (sketches.images().amin((1, 2, 3)) < 0.7).all(), "no sketch is empty"
    assert photos.images().std((1, 2, 3)).min() > 0.03, "no photo is blank"


def test_toy_instance_does_not_depend_on_n(toy):
    for few, many in zip(toy_pairs(41, 32, seed=1, split="test"), toy):
        assert torch.equal(few.source.pixels, many.source.pixels[:41])


def test_toy_seeds_and_splits_share_nothing(toy):
    seen = {p.numpy().tobytes() for s in toy for p in s.source.pixels}
    assert len(seen) == 400, "every image differs from every other"
    for other in (toy_pairs(64, 32, seed=1), toy_pairs(64, 32, seed=2, split="test")):
        assert not seen & {p.numpy().tobytes() for s in other for p in s.source.pixels}


def test_toy_same_instance_at_another_size():
    small, large = toy_pairs(32, 32, seed=4), toy_pairs(32, 64, seed=4)
    for a, b, least in zip(
        small, large, (0.85, 0.8)
    ):  # grain is drawn per pixel, so not equal; another instance gives far less
        b = torch.nn.functional.avg_pool2d(b.images(), 2)
        for x, y in zip(a.images(), b):
            assert np.corrcoef(x.ravel(), y.ravel())[0, 1] > least


def test_toy_photo_and_sketch_share_their_instance(monkeypatch):
    "Width over height of the object in the photo and of the ink in the sketch go together, within each class."
    masks, compose = [], _compose
    monkeypatch.setattr(
        "dfsbir.data.toy._compose",
        lambda layers, size: masks.extend(x[1][..., 3] for x in layers) or compose(layers, size),
    )
    ratio = lambda on: np.divide(*(1 + np.ptp(np.nonzero(on)[k]) for k in (1, 0)))
    for name in ("bottle", "fish", "umbrella"):
        masks.clear()
        _, sketches = toy_pairs(160, 48, seed=2, classes=[name], split="test")
        pairs = [
            (ratio(m > 100), ratio(s[0].numpy() < 0.6)) for m, s in zip(masks, sketches.images())
        ]
        own = np.corrcoef(np.log(pairs).T)[0, 1]
        assert own > 0.35, f"{name}: {own:.2f}"


@pytest.mark.parametrize("size", (28, 224))
def test_toy_sizes(size):
    photos, sketches = toy_pairs(3, size, classes=TOY_HELD_OUT)
    assert photos.images().shape == (3, 3, size, size) and sketches.size == size


def test_raw_pixels_stay_near_chance(toy):
    photos, sketches = toy
    assert (
        mean_ap(sketches.images().flatten(1), photos.images().mean(1).flatten(1), photos.labels)
        < 0.1 + 0.08
    )


@pytest.mark.parametrize(
    "wrong, says",
    [
        (dict(n=0), "n >= 1"),
        (dict(size=20), "28 to 224"),
        (dict(size=300), "28 to 224"),
        (dict(split="val"), "'train' and 'test'"),
        (dict(classes=["dragon"]), "dragon"),
        (dict(seed=-1), "seed >= 0"),
    ],
)
def test_toy_refuses(wrong, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        toy_pairs(**{"n": 2, **wrong})


def test_toy_training_images_obey_the_data_free_law():
    from dfsbir.core.data_guard import DataFreeViolation, data_free

    with data_free():
        toy_pairs(2, 28, split="test")
        with pytest.raises(DataFreeViolation):
            toy_pairs(2, 28)


# ---- ImageSet
def test_image_set_parts(toy):
    photos, _ = toy
    x, y = photos[3]
    assert x.dtype == torch.float32 and x.min() >= 0 and x.max() <= 1 and y == 3
    rest, held = photos.split(0.25, seed=0)
    assert torch.bincount(held.labels).tolist() == [5] * 10 and len(rest) + len(held) == 200
    assert not set(rest.instances.tolist()) & set(held.instances.tolist())
    again = photos.split(0.25, seed=0)[1]
    assert again.digest() == held.digest() != photos.split(0.25, seed=1)[1].digest()
    part = photos.take([5, 0])
    assert torch.equal(part.images()[1], photos[0][0]) and part.labels.tolist() == [5, 0]
    assert (
        len(photos.take(photos.labels == 2)) == 20
        and len(photos.take(slice(7))) == 7
        and len(photos.take([])) == 0
    )
    assert photos.take([]).images().shape == (0, 3, 32, 32)


def test_loader_order(toy):
    order = lambda seed: torch.cat(
        [y for _, y in toy[0].loader(64, shuffle=True, seed=seed)]
    ).tolist()
    assert order(0) == order(0) != order(1)
    x, y = next(iter(toy[1].loader(50)))
    assert x.shape == (50, 1, 32, 32) and torch.equal(y, toy[1].labels[:50])


def test_image_set_takes_floats_back(toy):
    photos = toy[0]
    assert torch.equal(
        ImageSet(photos.images(), photos.labels, photos.classes, "photo").source.pixels,
        photos.source.pixels,
    )


def test_image_set_refuses():
    x = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    for args, says in (
        ((x, [0, 5], ["a"], "photo"), "labels run from 0 to 5"),
        ((x, [0], ["a"], "photo"), "one of each per image"),
        ((x, [0, 0], ["a"], "sketch"), "(N,1,S,S)"),
        ((x.float() + 2, [0, 0], ["a"], "photo"), "lie in [0,1]"),
        ((x.long(), [0, 0], ["a"], "photo"), "uint8 or float"),
        ((x, [0, 0], ["a"], "video"), "video"),
    ):
        with pytest.raises(ValueError, match=re.escape(says)):
            ImageSet(*args)
    one = ImageSet(x, [0, 1], ["a", "b"], "photo")
    with pytest.raises(ValueError, match="one image"):
        one.split(0.5)
    with pytest.raises(ValueError, match="between 0 and 1"):
        one.split(1.0)


def test_pictures(toy):
    fig = show_images(toy[0].take(range(7)), columns=5, frames=["g", None] * 3 + ["r"])
    assert len(fig.axes) == 10
    batch = PairBatch(toy[0].images()[:4], toy[1].images()[:4], toy[0].labels[:4])
    assert len(show_pairs(batch, n=3).axes) == 6 and len(show_pairs(toy, n=5).axes) == 10
    for wrong in (torch.zeros(3, 8, 8), torch.zeros(2, 2, 8, 8), torch.zeros(0, 3, 8, 8)):
        with pytest.raises(ValueError, match="show_images wants"):
            show_images(wrong)
    with pytest.raises(ValueError, match="as many photos"):
        show_pairs((toy[0], toy[1].take([0])))


# ---- one door for images
def test_kinds_of_files(tmp_path):
    grey = lambda path, modality="photo": open_image(path, modality, 16).float().mean().item()
    assert abs(grey(picture(tmp_path / "a.png", 100)) - 100) < 1
    assert abs(grey(picture(tmp_path / "b.png", 100, "L")) - 100) < 1
    assert abs(grey(picture(tmp_path / "cmyk.jpg", 0, "CMYK")) - 255) < 3
    assert abs(grey(picture(tmp_path / "deep.png", 100 * 257, "I;16")) - 100) < 1
    assert grey(picture(tmp_path / "clear.png", 0, "RGBA")) == 255, "transparent is white"
    assert grey(picture(tmp_path / "clear2.png", 0, "LA"), "sketch") == 255
    Image.new("P", (9, 9), 0).save(tmp_path / "p.png", transparency=0)
    assert grey(tmp_path / "p.png", "sketch") == 255
    assert open_image(tmp_path / "a.png", "sketch", 16).shape == (1, 16, 16) and open_image(
        tmp_path / "b.png", "photo", 16
    ).shape == (3, 16, 16)


def test_upright_and_square(tmp_path):
    x = np.zeros((40, 80, 3), np.uint8)
    x[:, :40] = 255  # left half white
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise
    Image.fromarray(x).save(tmp_path / "turned.png", exif=exif)
    photo = open_image(tmp_path / "turned.png", "photo", 20).float()
    assert photo[:, :9].mean() > 250 and photo[:, 11:].mean() < 5, "white is on top after turning"
    Image.fromarray(np.zeros((40, 80), np.uint8)).save(tmp_path / "wide.png")
    sketch = open_image(tmp_path / "wide.png", "sketch", 20)[0].float()
    assert sketch[:4].min() == 255 and sketch[16:].min() == 255 and sketch[8:12].max() == 0, (
        "a sketch is padded with paper, never cut"
    )


def broken_files(folder):
    whole = picture(folder / "whole.jpg", size=(300, 300)).read_bytes()
    (folder / "whole.jpg").unlink()
    png = picture(folder / "whole.png", size=(300, 300)).read_bytes()
    (folder / "whole.png").unlink()
    for name, content in (
        ("cut.jpg", whole[: len(whole) // 2]),
        ("cut.png", png[: len(png) - 30]),
        ("empty.png", b""),
        ("text.jpg", b"not an image"),
        ("garbled.png", png[:40] + b"\0" * 60 + png[100:]),
    ):
        (folder / name).write_bytes(content)
    return ["cut.jpg", "cut.png", "empty.png", "text.jpg", "garbled.png"]


@pytest.mark.parametrize("cached", (True, False))
def test_broken_images_stop_or_are_listed(tree, cached):
    names = broken_files(tree / "cat")
    with pytest.raises(BrokenImage) as e:
        read_folder(tree, "photo", 16, cached=True)
    assert str(tree) in str(e.value) and "on_error='skip'" in str(e.value)
    with pytest.warns(UserWarning, match="5 of 11 images are broken"):
        s = read_folder(tree, "photo", 16, on_error="skip", cached=cached)
    assert (
        len(s) == 6
        and sorted(Path(p).name for p, _ in s.broken) == sorted(names)
        and all(reason for _, reason in s.broken)
    )
    assert (
        len(s.images()) == 6 and len(s.take([0]).broken) == 5 and "5 broken" in s._repr_markdown_()
    )


def test_lazy_set_names_the_broken_image_when_met(tree):
    (tree / "cat" / "0.png").write_bytes(b"")
    s = read_folder(tree, "photo", 16, cached=False)
    assert len(s) == 6 and s[0][0].shape == (3, 16, 16)
    with pytest.raises(BrokenImage, match="0.png"):
        s[3]
    with pytest.raises(BrokenImage, match="0.png"):
        list(s.loader(2))
    e = pickle.loads(pickle.dumps(BrokenImage("a", "b")))
    assert (e.path, e.reason) == ("a", "b")


def test_bombs(tree, monkeypatch):
    monkeypatch.setattr("dfsbir.data.image_files.MAX_PIXELS", 1000)
    with pytest.raises(BrokenImage, match="bomb"):
        read_folder(tree, "photo", 16)
    monkeypatch.undo()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(BrokenImage, match="DecompressionBomb"):
        read_folder(tree, "photo", 16)


# ---- class folders
def test_folder(tree):
    (tree / ".DS_Store").write_text("")
    (tree / "cat" / "notes.txt").write_text("")
    picture(tree / "cat" / "deeper" / "9.JPG")
    s = read_folder(tree, "sketch", 16)
    assert (
        s.classes == ["ant", "cat"]
        and s.labels.tolist() == [0] * 3 + [1] * 4
        and s.paths[0].endswith("0.png")
        and s.source.pixels.shape == (7, 1, 16, 16)
    )
    lazy = read_folder(tree, "sketch", 16, cached=False)
    assert torch.equal(lazy.images(), s.images()) and lazy.digest() == s.digest()
    assert len(pickle.loads(pickle.dumps(lazy))) == 7


@pytest.mark.parametrize("layout", ("test", "test/photo", "photo/test"))
def test_folder_with_splits(tmp_path, layout):
    for where in (layout, layout.replace("test", "train")):
        picture(tmp_path / where / "cat" / "1.png", 9 if "train" in where else 99)
    assert read_folder(tmp_path, "photo", 16, split="test").images().mean().item() == pytest.approx(
        99 / 255
    )
    with pytest.raises(FileNotFoundError, match="no folder for split 'dev'"):
        read_folder(tmp_path, "photo", 16, split="dev")
    with pytest.raises(ValueError, match="say which with split="):
        read_folder(tmp_path, "photo", 16)


def test_folder_refuses(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a folder"):
        read_folder(tmp_path / "no", "photo", 16)
    with pytest.raises(FileNotFoundError, match="no class folders"):
        read_folder(tmp_path, "photo", 16)
    (tmp_path / "void").mkdir()
    with pytest.raises(ValueError, match="void"):
        read_folder(tmp_path, "photo", 16)
    picture(tmp_path / "void" / "1.png")
    with pytest.raises(ValueError, match="on_error"):
        read_folder(tmp_path, "photo", 16, on_error="ignore")


# ---- strokes
def test_rasterise_against_distances():
    "A pixel is inked as the distance to the nearest segment says."
    strokes, size, width = (
        [np.array([[0.0, 0], [10, 10], [20, 0]]), np.array([[0.0, 20], [20, 20]])],
        64,
        0.06,
    )
    got = 1 - rasterise(strokes, size, width)[0].float() / 255
    unit = size * (1 - 2 * 0.04 - width) / 20
    centre = torch.stack(
        torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="xy"), -1
    ).double()
    near = torch.full((size, size), 1e9, dtype=torch.double)
    for s in strokes:
        p = torch.tensor((s - 10) * unit + size / 2)
        for a, b in zip(p[:-1], p[1:]):
            t = (((centre - a) @ (b - a)) / ((b - a) @ (b - a))).clamp(0, 1)
            near = torch.minimum(near, (centre - a - t[..., None] * (b - a)).norm(dim=-1))
    wanted = (width * size / 2 - near + 0.5).clamp(0, 1).float()
    assert (got - wanted).abs().mean() < 0.01 and (
        (got - wanted).abs() > 0.5
    ).float().mean() < 0.005


def test_width_is_relative_and_proportions_stay():
    line = [np.array([[0, 0], [300, 100]])]
    share = [
        (255 - rasterise(line, size, 0.05).float()).mean().item() / 255 for size in (28, 64, 224)
    ]
    assert max(share) - min(share) < 0.006
    ink = (rasterise(line, 96, 0.02)[0] < 128).nonzero()
    assert abs(np.ptp(ink[:, 1].numpy()) / np.ptp(ink[:, 0].numpy()) - 3) < 0.25
    assert rasterise([np.array([[5, 5]])], 32).min() < 200, "a dot is a drawing"
    for wrong in ([], [np.zeros((0, 2))], [np.array([[0, np.nan]])]):
        with pytest.raises(ValueError):
            rasterise(wrong, 32)


RAW = {"word": "cat", "drawing": [[[0, 10.5, 20], [0, 5, 0], [0, 7, 19]], [[3], [4], [30]]]}
SIMPLE = {"word": "cat", "drawing": [[[0, 255], [0, 128]]], "key_id": "1"}


def test_quickdraw_formats(tmp_path):
    word, strokes = parse_drawing(json.dumps(RAW))
    assert (
        word == "cat"
        and strokes[0].tolist() == [[0, 0], [10.5, 5], [20, 0]]
        and strokes[1].shape == (1, 2)
    )
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "cat.ndjson").write_text(
        json.dumps(RAW) + "\n\n" + json.dumps(SIMPLE) + "\n"
    )
    (tmp_path / "raw" / "full_simplified_ant.ndjson").write_text(
        json.dumps({**SIMPLE, "word": "ant"})
    )
    s = read_quickdraw(tmp_path, 32)
    assert (
        s.classes == ["ant", "cat"]
        and s.labels.tolist() == [0, 1, 1]
        and s.paths[2].endswith("cat.ndjson:3")
    )
    assert (
        torch.equal(s.source.pixels[1], rasterise(strokes, 32))
        and len(read_quickdraw(tmp_path, 32, per_class=1)) == 2
    )
    assert torch.equal(
        read_quickdraw(tmp_path, 32, classes=["cat"], cached=False).images(), s.images()[1:]
    )
    with pytest.raises(ValueError, match="no file for"):
        read_quickdraw(tmp_path, 32, classes=["dog"])
    (tmp_path / "simplified").mkdir()
    (tmp_path / "simplified" / "cat.ndjson").write_text(json.dumps(SIMPLE))
    with pytest.raises(ValueError, match="name one"):
        read_quickdraw(tmp_path, 32)


@pytest.mark.parametrize(
    "line, says",
    [
        ("{", "not JSON"),
        ("[]", "not a record"),
        ('{"word": "cat", "drawing": []}', "no strokes"),
        ('{"word": "cat", "drawing": [[[1, 2], [1]]]}', "lengths"),
        ('{"word": "cat", "drawing": [[[1]]]}', "stroke 0"),
        ('{"word": "cat", "drawing": [[[NaN], [1]]]}', "finite"),
        ('{"word": "cat", "drawing": [[["a"], [1]]]}', "not a number"),
        ('{"word": "dog", "drawing": [[[1], [1]]]}', "file name 'cat'"),
    ],
)
def test_broken_drawings(tmp_path, line, says):
    (tmp_path / "cat.ndjson").write_text(json.dumps(SIMPLE) + "\n" + line + "\n")
    with pytest.raises(BrokenImage, match=re.escape(says)) as e:
        read_quickdraw(tmp_path, 28)
    assert e.value.path.endswith("cat.ndjson:2")
    with pytest.warns(UserWarning, match="1 of 2"):
        s = read_quickdraw(tmp_path, 28, on_error="skip")
    assert len(s) == 1 and says in s.broken[0][1]


def test_quickdraw_bitmaps(tmp_path):
    x = np.zeros((3, 784), np.uint8)
    x[:, 100:110] = 255
    np.save(tmp_path / "full_numpy_bitmap_cat.npy", x)
    s = read_quickdraw(tmp_path, 28)
    assert s.classes == ["cat"] and torch.equal(
        s.source.pixels, torch.from_numpy(255 - x).view(3, 1, 28, 28)
    )
    assert read_quickdraw(tmp_path, 56, per_class=2).images().shape == (2, 1, 56, 56)
    np.save(tmp_path / "dog.npy", np.array([{"evil": 1}], object))
    with pytest.raises(BrokenImage, match="dog.npy.*object"):
        read_quickdraw(tmp_path, 28)
    np.save(tmp_path / "dog.npy", np.zeros((2, 783), np.uint8))
    with pytest.warns(UserWarning, match="1 of 4"):
        s = read_quickdraw(tmp_path, 28, on_error="skip")
    assert len(s) == 3 and "(2, 783)" in s.broken[0][1]


# ---- published layouts
def sketchy(root):
    for c, stem in (("airplane", "n02691156_58"), ("zebra", "n02391049_7")):
        picture(root / "photo" / "tx_000000000000" / c / f"{stem}.jpg")
        for k in (1, 2):
            picture(root / "sketch" / "tx_000000000000" / c / f"{stem}-{k}.png", 255, "L")
    return root


@pytest.mark.parametrize("inside", ("", "256x256", "rendered_256x256/256x256"))
def test_sketchy(tmp_path, inside):
    sketchy(tmp_path / inside)
    photos, sketches = read_sketchy(tmp_path, 16)
    assert (
        photos.classes == sketches.classes == ["airplane", "zebra"]
        and photos.instances.tolist() == [0, 1]
        and sketches.instances.tolist() == [0, 0, 1, 1]
    )
    assert photos.labels.tolist() == [0, 1] and sketches.labels.tolist() == [0, 0, 1, 1]


def test_sketchy_with_a_manifest_and_an_orphan(tmp_path):
    sketchy(tmp_path)
    manifest = Manifest.scan(tmp_path, "sketchy", lambda p: "unseen" if "zebra" in p else "seen")
    photos, sketches = read_sketchy(tmp_path, 16, manifest, "unseen")
    assert (
        len(photos) == 1
        and photos.instances.tolist() == [1]
        and sketches.instances.tolist() == [1, 1]
        and sketches.classes == ["airplane", "zebra"]
    )
    with pytest.raises(ValueError, match="needs a manifest"):
        read_sketchy(tmp_path, 16, split="seen")
    stray = picture(tmp_path / "sketch" / "tx_000000000000" / "zebra" / "n1_1-1.png")
    with pytest.raises(ManifestMismatch, match="extra: sketch/tx_000000000000/zebra/n1_1-1.png"):
        read_sketchy(tmp_path, 16, manifest, "seen")
    with pytest.raises(BrokenImage, match="no photo of this name"):
        read_sketchy(tmp_path, 16)
    with pytest.warns(UserWarning, match="broken"):
        assert read_sketchy(tmp_path, 16, on_error="skip")[1].broken[0][0] == str(stray)
    with pytest.raises(FileNotFoundError, match="does not look like Sketchy"):
        read_sketchy(tmp_path / "photo", 16)


def test_tuberlin(tmp_path):
    for c, k in (("airplane", 1), ("airplane", 2), ("alarm clock", 81)):
        picture(tmp_path / "png" / c / f"{k}.png", 255, "L")
    (tmp_path / "png" / "filelist.txt").write_text(
        "airplane/1.png\nairplane/2.png\nalarm clock/81.png\n"
    )
    assert (
        read_tuberlin(tmp_path, 16).classes == ["airplane", "alarm clock"]
        and len(read_tuberlin(tmp_path / "png", 16)) == 3
    )
    manifest = Manifest.scan(
        tmp_path, split_of=lambda p: "test" if p.endswith("2.png") else "train"
    )
    assert read_tuberlin(tmp_path, 16, manifest, "test").labels.tolist() == [0]
    (tmp_path / "png" / "airplane" / "2.png").rename(tmp_path / "png" / "airplane" / "3.png")
    with pytest.raises(ManifestMismatch) as e:
        read_tuberlin(tmp_path, 16)
    assert e.value.missing == ["airplane/2.png"] and e.value.extra == ["airplane/3.png"]
    with pytest.raises(FileNotFoundError, match="TU-Berlin"):
        read_tuberlin(tmp_path / "png" / "airplane", 16)


def qmul_v1(root):
    for split, n in (("train", 3), ("test", 2)):
        for folder in ("photo_edge", "sketch"):
            for i in range(n):
                picture(root / "shoes" / split / folder / f"{i:04d}.png", 60 * i + 40, "L")
    (root / "shoes" / "triplets.json").write_text(
        json.dumps({"train": [[[1, 2], [2, 1]], [], [[0, 1]]], "test": [[[0, 1]], [[1, 0]]]})
    )
    return root


def test_qmul_v1(tmp_path):
    root = qmul_v1(tmp_path)
    photos, sketches = read_qmul_v1(root, 16, "shoes", "train")
    assert (
        photos.instances.tolist() == sketches.instances.tolist() == [0, 1, 2]
        and photos.classes == ["shoes"]
        and photos[2][0].shape == (3, 16, 16)
        and sketches[2][0].shape == (1, 16, 16)
    )
    assert read_triplets(root, "shoes", "train").tolist() == [
        [0, 1, 2],
        [0, 2, 1],
        [2, 0, 1],
    ] and read_triplets(root, "shoes", "test").tolist() == [[0, 0, 1], [1, 1, 0]]
    with pytest.raises(FileNotFoundError, match="does not look like QMUL V1"):
        read_qmul_v1(root, 16, "chairs", "train")
    with pytest.raises(ValueError, match="no split 'val'"):
        read_triplets(root, "shoes", "val")
    (root / "shoes" / "triplets.json").write_text(json.dumps({"train": [[[1, 9]]]}))
    with pytest.raises(ValueError, match="names photos 0 to 9, but 'train' has 1"):
        read_triplets(root, "shoes", "train")


def test_qmul_v1_with_a_manifest(tmp_path):
    manifest = Manifest.scan(qmul_v1(tmp_path))
    assert (
        manifest.splits == ["test", "train"]
        and len(read_qmul_v1(tmp_path, 16, "shoes", "test", manifest)[0]) == 2
    )
    picture(tmp_path / "shoes" / "train" / "sketch" / "0001.png", 7, "L")
    read_qmul_v1(tmp_path, 16, "shoes", "test", manifest)
    with pytest.raises(ManifestMismatch, match="changed: shoes/train/sketch/0001.png"):
        read_qmul_v1(tmp_path, 16, "shoes", "train", manifest)


def test_a_drawing_of_a_broken_photo_is_left_out_with_it(tmp_path):
    root = qmul_v1(tmp_path)
    torn = root / "shoes" / "train" / "photo_edge" / "0001.png"
    torn.write_bytes(torn.read_bytes()[:30])
    with pytest.raises(BrokenImage, match="0001.png"):
        read_qmul_v1(root, 16, "shoes", "train")
    with pytest.warns(UserWarning, match="broken"):
        photos, sketches = read_qmul_v1(root, 16, "shoes", "train", on_error="skip", cached=True)
    assert (
        photos.instances.tolist() == sketches.instances.tolist() == [0, 2]
        and len(photos.broken) == len(sketches.broken) == 1
    )
    torn.unlink()
    with pytest.raises(BrokenImage, match="not there"):
        read_qmul_v1(root, 16, "shoes", "train")


def test_qmul_v2_has_several_sketches_a_photo(tmp_path):
    for split in ("train", "test"):
        for name in ("10_a", "11"):
            picture(tmp_path / f"{split}B" / f"{name}.png")
            for k in range(1, 4):
                picture(tmp_path / f"{split}A" / f"{name}_{k}.png", 255, "L")
    photos, sketches = read_qmul_v2(tmp_path, 16, "test")
    assert (
        [Path(p).stem for p in photos.paths] == ["10_a", "11"]
        and sketches.instances.tolist() == [0, 0, 0, 1, 1, 1]
        and photos.instances.tolist() == [0, 1]
    )
    by_letter = Manifest.scan(tmp_path, split_of=lambda p: p.split("/")[0][:-1])
    assert (
        by_letter.splits == ["test", "train"]
        and len(read_qmul_v2(tmp_path, 16, "train", by_letter)[1]) == 6
    )
    with pytest.raises(FileNotFoundError, match="ShoeV2 or ChairV2"):
        read_qmul_v2(tmp_path, 16, "val")
    assert (
        len(read_photos(tmp_path / "trainB", 16)) == 2
        and read_photos(tmp_path / "trainB", 16).instances is None
    )
    with pytest.raises(FileNotFoundError, match="holds no image"):
        read_photos(tmp_path / "none", 16)


# ---- manifests
def test_manifest_round_trip_and_mismatches(tree, tmp_path_factory):
    file = tmp_path_factory.mktemp("m") / "manifest.json"
    wrote = Manifest.scan(tree, "pets", hashed_split(0.5))
    wrote.write(file)
    read = Manifest.read(file).check(tree)
    assert (
        read == wrote
        and read.sha256 == wrote.sha256
        and sum(sum(c.values()) for c in read.counts.values()) == 6
    )
    (tree / "cat" / "0.png").unlink()
    picture(tree / "ant" / "new.png")
    picture(tree / "ant" / "1.png", 7)
    with pytest.raises(ManifestMismatch) as e:
        read.check(tree)
    assert (e.value.missing, e.value.extra, e.value.changed) == (
        ["cat/0.png"],
        ["ant/new.png"],
        ["ant/1.png"],
    )
    for line in ("missing: cat/0.png", "extra: ant/new.png", "changed: ant/1.png"):
        assert line in str(e.value)
    assert pickle.loads(pickle.dumps(e.value)).missing == ["cat/0.png"]


def test_manifest_cut_or_edited(tree, tmp_path_factory):
    file = tmp_path_factory.mktemp("m") / "manifest.json"
    Manifest.scan(tree).write(file)
    text = file.read_text()
    for wrong, says in (
        (text[:-20], "is not a manifest"),
        ("[]", "is not a manifest"),
        (text.replace("ant/0.png", "ant/7.png"), "was changed"),
        (text.replace("manifest-1", "manifest-9"), "manifest-9"),
    ):
        file.write_text(wrong)
        with pytest.raises(ValueError, match=says):
            Manifest.read(file)


def test_manifest_splits_and_leaks(tmp_path):
    for where, value in (
        ("train/cat/1", 1),
        ("train/cat/2", 2),
        ("test/cat/1", 3),
        ("test/cat/2", 2),
    ):
        picture(tmp_path / f"{where}.png", value)
    m = Manifest.scan(tmp_path)
    assert m.splits == ["test", "train"] and m.counts == {
        "test": {"test/cat": 2},
        "train": {"train/cat": 2},
    }
    assert m.leaks() == [("test/cat/2.png", "train/cat/2.png")] and m.paths("test") == [
        "test/cat/1.png",
        "test/cat/2.png",
    ]
    with pytest.raises(ValueError, match="no split 'dev'"):
        m.paths("dev")
    with pytest.raises(FileNotFoundError, match="nothing to list"):
        Manifest.scan(tmp_path_empty(tmp_path))
    share = sum(hashed_split(0.3)(f"{k}.png") == "test" for k in range(2000)) / 2000
    assert abs(share - 0.3) < 0.03


def tmp_path_empty(p):
    (p / "void").mkdir()
    return p / "void"


# ---- real data
def test_real_pacs():
    root = real("pacs")
    photos, sketches = (
        read_folder(root, "photo", 64, split="test"),
        read_folder(root, "sketch", 64, split="test"),
    )
    assert (
        (len(photos), len(sketches)) == (519, 1208)
        and photos.classes == sketches.classes
        and len(photos.classes) == 7
    )
    assert sketches.images().mean() > 0.7 and not photos.broken
    manifest = Manifest.scan(root / "test")
    assert sum(manifest.counts["all"].values()) == 1727


def test_real_quickdraw():
    root = real("quickdraw")
    s = read_quickdraw(root, 64)
    assert len(s.classes) == 40 and len(s) >= 40 and not s.broken
    assert (s.images().amin((1, 2, 3)) < 0.3).all() and s.images().mean() > 0.7


@pytest.mark.parametrize("category,train,test", (("shoes", 304, 115), ("chairs", 200, 97)))
def test_real_qmul(category, train, test):
    root = real("qmul_v1")
    for split, n in (("train", train), ("test", test)):
        photos, sketches = read_qmul_v1(root, 32, category, split, cached=False)
        assert len(photos) == len(sketches) == n and photos.instances.equal(sketches.instances)
        assert len(set(read_triplets(root, category, split)[:, 0].tolist())) == n
    assert sketches[n - 1][0].mean() > 0.5 and photos[n - 1][0].mean() > 0.5, "dark lines on white"


# ---- files of odd kinds
def test_odd_exif_is_a_broken_image(tmp_path):
    "A resolution that is text, in a photo that has to be turned: skipped and listed, not raised through."
    for k in range(2):
        picture(tmp_path / "cat" / f"{k}.png")
    exif = Image.Exif()
    exif[0x112], exif[0x11A] = 6, 72.0
    odd = picture(tmp_path / "cat" / "odd.jpg", exif=exif)
    data = bytearray(odd.read_bytes())
    at = next(data.find(tag) for tag in (b"\x01\x1a\x00\x05", b"\x1a\x01\x05\x00") if tag in data)
    kind = at + (3 if data[at] == 1 else 2)
    data[kind] = 2  # ASCII
    odd.write_bytes(data)
    with pytest.warns(UserWarning, match="1 of 3 images are broken"):
        found = read_folder(tmp_path, "photo", 16, on_error="skip")
    assert len(found) == 2 and found.broken[0][0].endswith("odd.jpg")


@pytest.mark.parametrize("top", [1.0, 255.0])
def test_float_images_run_to_one_or_to_255(tmp_path, top):
    Image.fromarray(np.full((20, 20), 0.8 * top, np.float32)).save(tmp_path / "f.tif")
    assert (open_image(tmp_path / "f.tif", "photo", 16) == 204).all()
    Image.fromarray(np.full((20, 20), np.nan, np.float32)).save(tmp_path / "n.tif")
    with pytest.raises(BrokenImage, match="NaN or infinite"):
        open_image(tmp_path / "n.tif", "photo", 16)


def test_hidden_folders_hold_no_training_images(tree):
    picture(tree / "cat" / ".thumbs" / "0.png")
    assert len(read_folder(tree, "photo", 16)) == 6


def test_modalities_in_the_plural_are_no_classes(tmp_path):
    for m in ("photos", "sketches"):
        picture(tmp_path / m / "cat" / "0.png")
    with pytest.raises(
        ValueError, match="'photos', 'sketches'.*are no classes: name them 'photo' and 'sketch'"
    ):
        read_folder(tmp_path, "photo", 16)


def test_a_split_of_names_that_are_no_text():
    assert hashed_split(0.5)(os.fsdecode(b"caf\xe9.png")) in ("train", "test")
