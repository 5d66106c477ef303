"""Sketch normalisation: pictures of every kind are found as well as the clean drawing."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from dfsbir.core.types import MODALITIES, Modality
from dfsbir.data.folders import read_folder
from dfsbir.data.image_files import BrokenImage, open_image
from dfsbir.data.quickdraw import rasterise
from dfsbir.data.sketch_normalisation import (
    PROBLEMS,
    is_canonical,
    normalise_batch,
    normalise_set,
    normalise_sketch,
)
from dfsbir.data.toy import toy_pairs
from dfsbir.evaluation.retrieval import embed
from dfsbir.students.encoder import encoder_from_teacher
from dfsbir.students.heads import MetricSpace
from dfsbir.teachers.class_map import align_classes
from dfsbir.teachers.training import train_teacher

SIDE, COUNT = 32, 20  # px of the encoders' input; drawings that are asked for
rng = np.random.default_rng(0)


def image_of(values):
    "Values in [0,1] as a picture of 8 bits a channel."
    return Image.fromarray((np.clip(values, 0, 1) * 255).round().astype(np.uint8))


def file_of(image, format="PNG", **options):
    "The content of an image file."
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def png(values):
    return file_of(image_of(values))


# ---- what can happen to a drawing: functions of its values (H,W) in [0,1]; -> a file's content


def coloured(paper, ink):
    return lambda x: png(
        (x[..., None] * np.array(paper) + (1 - x[..., None]) * np.array(ink)) / 255
    )


def light(f):
    "Lit by f(y, x), each in [0,1]."

    def change(x):
        y_and_x = np.mgrid[0 : x.shape[0], 0 : x.shape[1]] / x.shape[0]
        return png(x * f(*y_and_x))

    return change


def frame(width, level=0.0, inset=0):
    def change(x):
        x = x.copy()
        inner = x[inset : len(x) - inset, inset : len(x) - inset]
        for edge in (inner[:width], inner[-width:], inner[:, :width], inner[:, -width:]):
            edge[:] = level
        return png(x)

    return change


def title_bar(x):
    return png(np.concatenate([np.full((len(x) // 9, len(x)), 0.2), x]))


def place(scale, across, down, canvas=(1, 1)):
    def change(x):
        side = round(len(x) * scale)
        small = image_of(x).resize((side, side))
        size = (round(len(x) * canvas[0]), round(len(x) * canvas[1]))
        page = Image.new("L", size, 255)
        page.paste(small, (round((size[0] - side) * across), round((size[1] - side) * down)))
        return file_of(page)

    return change


def resized(side):
    return lambda x: file_of(image_of(x).resize((side, side), Image.Resampling.LANCZOS))


def noise(deviation):
    return lambda x: png(x + rng.normal(0, deviation, x.shape))


def specks(share):
    def change(x):
        thrown = rng.random(x.shape)
        return png(np.where(thrown < share / 2, 0, np.where(thrown > 1 - share / 2, 1, x)))

    return change


def jpeg(x):
    return file_of(image_of(x), "JPEG", quality=15)


def transparent(ink):
    def change(x):
        values = np.ones((*x.shape, 4))
        values[..., :3], values[..., 3] = np.array(ink) / 255, 1 - x
        return png(values)

    return change


def deep(largest, format):
    return lambda x: file_of(Image.fromarray((x * largest).round().astype(np.uint16)), format)


def floats(x):
    return file_of(Image.fromarray(x.astype(np.float32)), "TIFF")


def phone(table=False):
    "A photo of a page: turned a little, lit from one side, with grain; perhaps on a dark table."

    def change(x):
        page = image_of(0.15 + 0.85 * x).resize((260, 260))
        page = page.rotate(rng.uniform(-6, 6), fillcolor=255).filter(ImageFilter.GaussianBlur(1))
        page = np.asarray(page)[..., None] / 255 * np.array([1, 0.96, 0.88])
        angle, (v, u) = rng.uniform(0, 2 * np.pi), np.mgrid[0:260, 0:260] / 260 - 0.5
        page = page * (0.7 + 0.3 * (np.cos(angle) * u + np.sin(angle) * v))[..., None]
        if table:
            page = np.pad(page, ((30, 30), (30, 30), (0, 0)), constant_values=0.2)
        page = page + rng.normal(0, 0.02, page.shape)
        return file_of(image_of(page), "JPEG", quality=80)

    return change


BLACK, WHITE = (0, 0, 0), (255, 255, 255)
KINDS = {
    **{f"grey paper {p}": coloured((p,) * 3, BLACK) for p in (250, 245, 240, 220, 180, 128, 90)},
    "cream paper": coloured((250, 240, 210), (30, 30, 60)),
    "yellow paper": coloured((250, 230, 80), BLACK),
    "red on green": coloured((60, 160, 70), (190, 40, 40)),
    "ballpoint": coloured((252, 250, 245), (70, 80, 190)),
    "yellow ink": coloured(WHITE, (240, 220, 40)),
    "pencil": coloured(WHITE, (150,) * 3),
    "faint pencil": coloured((235,) * 3, (195,) * 3),
    "light from one side": light(lambda y, x: 1 - 0.5 * x),
    "strong light": light(lambda y, x: 1 - 0.75 * y),
    "dark corners": light(lambda y, x: 1 - 0.9 * ((x - 0.5) ** 2 + (y - 0.5) ** 2)),
    "soft shadow": light(lambda y, x: 1 - 0.4 / (1 + np.exp(25 * (x - 0.4 + 0.2 * y)))),
    "hard shadow": light(lambda y, x: np.where(x + 0.6 * y < 0.75, 0.6, 0.95)),
    "phone": phone(),
    "phone, table": phone(table=True),
    "white on black": coloured(BLACK, WHITE),
    "chalk": coloured((45, 70, 55), (225, 225, 220)),
    "blueprint": coloured((30, 60, 140), (240,) * 3),
    "grey on dark": coloured((60,) * 3, (130,) * 3),
    **{f"frame {n}": frame(n) for n in (1, 3, 6, 10)},
    "grey frame": frame(3, 0.6),
    "inset frame": frame(2, 0.0, inset=3),
    "title bar": title_bar,
    "corner, half": place(0.5, 0, 0),
    "corner, small": place(0.35, 1, 1),
    "half size": place(0.5, 0.5, 0.5),
    "quarter size": place(0.25, 0.3, 0.7),
    "at the edge": place(0.6, 1, 0.5),
    "canvas 3:1": place(1, 0.5, 0.5, (3, 1)),
    "canvas 1:3": place(1, 0.5, 0, (1, 3)),
    "canvas 8:1": place(1, 0.2, 0.5, (8, 1)),
    "64 px": resized(64),
    "900 px": resized(900),
    **{f"noise {n}": noise(n) for n in (0.03, 0.07, 0.12)},
    "few specks": specks(0.002),
    "many specks": specks(0.02),
    "jpeg": jpeg,
    "black on transparent": transparent(BLACK),
    "white on transparent": transparent(WHITE),
    "red on transparent": transparent((220, 30, 30)),
    "16 bits": deep(65535, "PNG"),
    "12 bits in a PNG": deep(4095, "PNG"),
    "12 bits in a TIFF": deep(4095, "TIFF"),
    "floats": floats,
}


@pytest.fixture(scope="module")
def drawings():
    "Toy drawings (H,W) in [0,1] and their set."
    _, sketches = toy_pairs(COUNT, size=128, split="test")
    return [x[0].numpy().astype(np.float64) for x, _ in sketches], sketches


@pytest.fixture(scope="module")
def precision(drawings):
    "Share of right photos among the first ten of 200, for canonical sketches (N,1,S,S) uint8."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    sets = toy_pairs(600, size=SIDE)
    teachers = [train_teacher(s, epochs=6, seed=k, progress=False) for k, s in enumerate(sets)]
    torch.set_num_threads(threads)
    classes = align_classes(*(t.classes for t in teachers))
    space = MetricSpace.random(len(classes.classes), 16)
    encoders = {m: encoder_from_teacher(t, classes, space) for m, t in zip(MODALITIES, teachers)}
    gallery, _ = toy_pairs(200, size=SIDE, split="test")
    vectors = embed(encoders["photo"], gallery)

    def measure(pixels):
        scores = embed(encoders["sketch"], pixels.float() / 255) @ vectors.T
        found = gallery.labels[scores.topk(10, dim=1).indices]
        return (found == drawings[1].labels[:, None]).float().mean().item()

    return measure


@pytest.fixture(scope="module")
def clean_precision(drawings, precision):
    "Of the clean drawings; the floor is 0.1."
    clean = [normalise_sketch(png(x), SIDE).pixels for x in drawings[0]]
    return precision(torch.stack(clean))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_found_as_well_as_the_clean_drawing(
    kind, drawings, precision, clean_precision
):
    "Within 0.1 in P@10; hardly any is said to be unreadable."
    found = [normalise_sketch(KINDS[kind](x), SIDE) for x in drawings[0]]
    assert sum(sketch.problem is not None for sketch in found) <= 1
    pixels = torch.stack([sketch.pixels for sketch in found])
    assert clean_precision > 0.4 and precision(pixels) > clean_precision - 0.1


def test_it_says_what_it_did(drawings):
    for kind, step in (
        ("white on black", "inverted"),
        ("frame 3", "frame"),
        ("hard shadow", "light"),
        ("many specks", "specks"),
        ("noise 0.12", "grain"),
        ("corner, small", "middle"),
        ("pencil", "levels"),
    ):
        sketch = normalise_sketch(KINDS[kind](drawings[0][9]), SIDE)
        assert any(step in s for s in sketch.steps), kind
        assert sketch.problem is None and all(s in sketch.note for s in sketch.steps)


# ---- what is canonical stays as it is


@pytest.mark.parametrize("size", [28, 32, 64, 128, 224])
def test_clean_toy_drawings_pass_unchanged(size):
    "Nearly all: a few are smaller, or farther from the middle, than the others."
    _, sketches = toy_pairs(60 if size == 224 else 150, size=size, split="test")
    changed = 0
    for x, _ in sketches:
        content = png(x[0].numpy())
        sketch = normalise_sketch(content, 64)
        if sketch.steps:
            changed += 1
            continue
        assert torch.equal(sketch.pixels, open_image(io.BytesIO(content), "sketch", 64))
        assert sketch.problem is None and not sketch.note
    assert changed <= 0.03 * len(sketches)


@pytest.mark.parametrize("seed", range(8))
def test_rasterised_strokes_pass_unchanged(seed):
    strokes = np.random.default_rng(seed).uniform(0, 1, (4, 5, 2)).cumsum(1)
    for size in (28, 64, 224):
        pixels = rasterise(list(strokes), size)[None] / 255
        result, (report,) = normalise_batch(pixels)
        assert torch.equal(result, pixels) and not report.steps


@pytest.mark.parametrize("folder", ["pacs/test", "qmul_v1/chairs/test"])
def test_data_sets_of_clean_drawings_pass_unchanged(data_dir, folder):
    files = sorted((data_dir / folder).glob("sketch/**/*.png"))[::10][:100]
    if not files:
        pytest.skip(f"no sketches in {folder}")
    assert not [file for file in files if normalise_sketch(file, 64).steps]


def test_a_batch_is_normalised_one_by_one(drawings):
    clean = drawings[1].images()[:4]
    mixed = torch.stack([clean[0], 1 - clean[1], 0.8 * clean[2], clean[3]])
    result, reports = normalise_batch(mixed)
    assert torch.equal(result[0], clean[0]) and torch.equal(result[3], clean[3])
    assert [bool(report.steps) for report in reports] == [False, True, True, False]
    assert result.shape == mixed.shape and result.min() >= 0 and result.max() <= 1
    assert all(is_canonical(x.expand(3, -1, -1)) for x in result)


def test_what_was_normalised_is_canonical(drawings):
    for kind in KINDS:
        sketch = normalise_sketch(KINDS[kind](drawings[0][9]), 64)
        _, (report,) = normalise_batch(sketch.pixels[None] / 255)
        assert not sketch.steps or not report.steps, kind


# ---- what cannot be read


UNREADABLE = {
    "blank": [
        np.ones((90, 90)),
        np.zeros((90, 90)),
        np.full((50, 200), 0.7),
        np.linspace(1, 0.3, 200)[None].repeat(200, 0),
        0.8 + 0.02 * rng.standard_normal((150, 150)),
    ],
    "noise": [
        rng.random((128, 128)),
        rng.random((128, 128, 3)),
        0.5 + 0.15 * rng.standard_normal((120, 160)),
    ],
}


@pytest.mark.parametrize("problem", UNREADABLE)
def test_blank_and_noisy_pictures_are_named(problem):
    for values in UNREADABLE[problem]:
        sketch = normalise_sketch(png(values), SIDE)
        assert sketch.problem == problem and PROBLEMS[problem] in sketch.note


@pytest.mark.parametrize("size", [64, 192])
def test_colour_photos_are_named(size):
    photos, _ = toy_pairs(40, size=size, split="test")
    found = [normalise_sketch(png(x.permute(1, 2, 0).numpy()), SIDE) for x, _ in photos]
    assert sum(sketch.problem == "photo" for sketch in found) >= 0.9 * len(found)


def test_real_photos_are_named(data_dir):
    files = sorted((data_dir / "pacs" / "test").glob("photo/**/*.jpg"))[::20][:60]
    if not files:
        pytest.skip("no photos of PACS")
    found = [normalise_sketch(file, SIDE).problem for file in files]
    assert found.count("photo") >= 0.9 * len(found)


def test_what_is_no_image_raises():
    for content in (b"", b"hello"):
        with pytest.raises(BrokenImage):
            normalise_sketch(content, SIDE)


@pytest.mark.parametrize("shape", [(1, 1), (3, 40), (15, 15), (16, 16), (16, 600), (700, 20)])
@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_pictures_of_any_shape_are_read(shape, level):
    values = np.full(shape, level)
    values[shape[0] // 3 : shape[0] // 2, shape[1] // 3 : 2 * shape[1] // 3] = 1 - level / 2
    sketch = normalise_sketch(png(values), SIDE)
    assert sketch.pixels.shape == (1, SIDE, SIDE) and sketch.pixels.dtype == torch.uint8


# ---- sets


def test_a_set_of_files_is_normalised(tmp_path, drawings):
    for i, x in enumerate(drawings[0][:6]):
        place_of = tmp_path / f"class{i % 2}" / f"{i}.png"
        place_of.parent.mkdir(exist_ok=True)
        place_of.write_bytes(png(1 - x if i == 3 else x))
    images = read_folder(tmp_path, Modality.SKETCH, SIDE)
    normalised, reports = normalise_set(images)
    changed = [i for i, report in enumerate(reports) if report.steps]
    assert [images.paths[i].endswith("3.png") for i in changed] == [True]
    assert normalised.paths == images.paths and torch.equal(normalised.labels, images.labels)
    for i in range(6):
        same = torch.equal(normalised.images()[i], images.images()[i])
        assert same == (i not in changed)
    photos, sketches = toy_pairs(2, size=SIDE)
    for wrong in (photos, sketches):
        with pytest.raises(ValueError):
            normalise_set(wrong)
