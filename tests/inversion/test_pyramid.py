"""The pyramid estimator: slow oracles of its parts, exact resuming, and what it must refuse."""

import copy
import warnings

import pytest
import torch
from torch import nn

from dfsbir.core.config import ConfigError
from dfsbir.core.device import make_fabric
from dfsbir.core.types import MODALITIES, Modality, Normalizer
from dfsbir.inversion.pyramid import (
    Pyramid,
    PyramidConfig,
    PyramidEstimator,
    pyramid_sides,
)
from dfsbir.teachers.class_map import align_classes
from dfsbir.teachers.nets import build_net
from dfsbir.teachers.teacher import Teacher

NAMES = ("cup", "fish", "star")


class Plain(nn.Module):
    "A classifier without batch norm."

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, 2)
        self.fc = nn.Linear(6, len(NAMES))

    def forward(self, x):
        return self.fc(self.conv(x).relu().mean((2, 3)))


def teacher(modality, net=None):
    torch.manual_seed(0 if modality == "photo" else 1)
    net = net or build_net("dfsbir", "tiny", len(NAMES))
    return Teacher(net, NAMES, Normalizer(16), modality)


def estimator(teachers=None, strokes=0, redraws=0, generator=0, **changes):
    teachers = teachers or {m: teacher(m) for m in MODALITIES}
    lines = {"strokes": strokes, "redraws": redraws, "generator": 0 if strokes else generator}
    configs = {
        Modality.PHOTO: PyramidConfig(size=16, generator=generator),
        Modality.SKETCH: PyramidConfig(size=16, bias=2.5, **lines),
    }
    settings = {"steps": 4, "batch": 6, "seed": 0, **changes}
    return PyramidEstimator(
        teachers, align_classes(NAMES, NAMES), configs, make_fabric("cpu"), **settings
    )


@pytest.mark.parametrize("size", [4, 5, 16, 28, 64, 224])
def test_sides_double_and_end_at_the_picture(size):
    sides = pyramid_sides(size)
    assert sides[0] == 4 and sides[-1] == size
    assert sides == sorted(set(sides))
    assert all(b == 2 * a for a, b in zip(sides[:-2], sides[1:-1]))


def test_a_picture_is_the_sigmoid_of_its_resolutions():
    start = Pyramid.draw_start(2, 1, 16, torch.Generator().manual_seed(0))
    pyramid = Pyramid(start, bias=0.5)
    total = 0.5 + start[-1]
    for grid in start[:-1]:
        total = total + nn.Upsample(16, mode="bilinear")(grid)
    torch.testing.assert_close(pyramid(), total.sigmoid())


def test_each_finished_pair_is_given_once_in_order():
    e = estimator(snapshots=(0.5, 1.0))
    e.synthesize(8)
    assert e.waiting() == 24
    first, rest = e.sample(5), e.sample(19)
    assert e.waiting() == 0
    assert len(first) == 5 and len(rest) == 19
    assert set(rest.label.tolist()) == {0, 1, 2}
    with pytest.raises(ValueError, match="finished"):
        e.sample(1)


@pytest.mark.parametrize("at", [0, 2, 4, 6])
def test_resumes_to_the_same_pictures(at):
    whole = estimator()
    whole.synthesize(8)
    first = estimator()
    first.synthesize(at) if at else None
    second = estimator()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    second.synthesize(8 - at)
    for a, b in zip(vars(whole.sample(12)).values(), vars(second.sample(12)).values()):
        assert a is b is None or torch.equal(a, b)


def test_every_term_has_a_switch_and_a_gradient():
    e = estimator(
        modality=1.0,
        guidance=lambda x: x.mean((1, 2, 3)),
        adversarial=1.0,
        students=lambda m, x: x.mean((2, 3))[:, :1].expand(-1, 3) * torch.arange(3.0),
    )
    e.synthesize(1)
    names = {name.split("/")[-1] for name in e.terms.log()}
    assert names == {
        *("class", "bn", "total_variation", "modality", "adversarial", "align", "total")
    }
    bare = estimator(align=0.0)
    bare.synthesize(1)
    assert not {"align", "modality"} & {name.split("/")[-1] for name in bare.terms.log()}


def test_a_teacher_without_batch_norm_is_named():
    teachers = {m: teacher(m, Plain()) for m in MODALITIES}
    with pytest.warns(UserWarning, match="batch norm"):
        e = estimator(teachers)
    e.synthesize(4)
    assert "photo/bn" not in e.terms.log()
    assert torch.isfinite(e.sample(6).photo).all()


def test_modalities_of_other_sizes_share_a_start():
    teachers = {m: teacher(m) for m in MODALITIES}
    configs = {
        Modality.PHOTO: PyramidConfig(size=24),
        Modality.SKETCH: PyramidConfig(size=16, bias=2.5),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        e = PyramidEstimator(
            teachers, align_classes(NAMES, NAMES), configs, make_fabric("cpu"), 2, 3
        )
        e.synthesize(2)
    pairs = e.sample(3)
    assert pairs.photo.shape == (3, 3, 24, 24) and pairs.sketch.shape == (3, 1, 16, 16)


@pytest.mark.parametrize(
    "change",
    [{"modality": 1.0}, {"adversarial": 1.0}, {"snapshots": ()}, {"snapshots": (2.0, 1.0)}],
)
def test_what_is_missing_is_named(change):
    with pytest.raises(ValueError):
        estimator(**change)


@pytest.mark.parametrize("change", [{"lr": 0.0}, {"bn_decay": 1.0}, {"size": 3}, {"roll": 0.5}])
def test_settings_out_of_range(change):
    with pytest.raises(ConfigError):
        PyramidConfig(**change)


def test_sketches_of_strokes_resume_exactly():
    whole, first, second = (estimator(strokes=3) for _ in range(3))
    whole.synthesize(8)
    first.synthesize(6)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    second.synthesize(2)
    assert torch.equal(whole.sample(6).sketch, first.sample(6).sketch)
    found, want = second.sample(12), whole.sample(6)
    assert torch.equal(found.sketch[6:], want.sketch)
    assert torch.equal(found.photo[6:], want.photo)


def test_a_finished_batch_is_drawn_again():
    e = estimator(strokes=3, redraws=2)
    e.synthesize(7)  # a batch, and three steps of the next one
    assert e.waiting() == 18
    pairs = e.sample(18)
    first, *again = (pairs[i : i + 6] for i in (0, 6, 12))
    for other in again:
        assert torch.equal(other.photo, first.photo) and torch.equal(other.label, first.label)
        assert not torch.equal(other.sketch, first.sketch)
    assert not torch.equal(again[0].sketch, again[1].sketch)


def test_drawing_again_changes_nothing_of_the_batch():
    first, second = (estimator(strokes=3, redraws=n) for n in (0, 2))
    for e in (first, second):
        e.synthesize(4)
    assert torch.equal(first.sample(6).sketch, second.sample(6).sketch)


def test_drawings_again_resume_exactly():
    whole, first, second = (estimator(strokes=3, redraws=1) for _ in range(3))
    whole.synthesize(8)
    first.synthesize(6)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    second.synthesize(2)
    assert torch.equal(second.sample(24).sketch, whole.sample(24).sketch)


def test_pixels_are_not_drawn_again():
    with pytest.raises(ConfigError, match="strokes=0, evolved=0 and redraws=2"):
        PyramidConfig(redraws=2)


def test_photos_beside_strokes_begin_as_they_would_without():
    made = [estimator(strokes=n) for n in (0, 3)]
    for e in made:
        e._begin()
    assert torch.equal(*(e.sides[Modality.PHOTO].canvas.grids[0] for e in made))


def test_strokes_have_the_pen_of_the_card():
    teachers = {m: teacher(m) for m in MODALITIES}
    teachers[Modality.SKETCH].normalizer.pen = 0.09
    e = estimator(teachers, strokes=3)
    e.run_step()
    assert e.sides[Modality.SKETCH].canvas.width == 0.09


def test_total_variation_is_for_pixels():
    e = estimator(strokes=3)
    e.run_step()
    assert "sketch/total_variation" not in e.terms.log()
    assert "photo/total_variation" in e.terms.log()


def test_photos_are_not_made_of_strokes():
    photo = teacher(Modality.PHOTO)
    configs = {Modality.PHOTO: PyramidConfig(size=16, strokes=3)}
    with pytest.raises(ValueError, match="wanted strokes = 0 for photos; found 3"):
        PyramidEstimator(
            {Modality.PHOTO: photo}, align_classes(NAMES, NAMES), configs, make_fabric("cpu")
        )


@pytest.mark.parametrize(
    "ways", [("drawn", "strokes"), ("drawn", "generator"), ("strokes", "generator")]
)
def test_pictures_are_made_in_one_way(ways):
    with pytest.raises(ConfigError, match="set one of the four"):
        PyramidConfig(**dict.fromkeys(ways, 3) | ({"drawn": True} if "drawn" in ways else {}))


@pytest.mark.parametrize("at", [0, 2, 4, 6])
def test_a_renewed_generator_resumes_to_the_same_pictures(at):
    whole = estimator(generator=4)
    whole.synthesize(8)
    first = estimator(generator=4)
    first.synthesize(at) if at else None
    second = estimator(generator=4)
    torch.manual_seed(at)  # torch's own random numbers have no part in it
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    second.synthesize(8 - at)
    for a, b in zip(vars(whole.sample(12)).values(), vars(second.sample(12)).values()):
        assert a is b is None or torch.equal(a, b)


def test_every_batch_has_a_generator_of_its_own():
    e = estimator(generator=4)
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    weights = []
    for _ in range(2):
        e.synthesize(1)
        weights.append({m: side.canvas.values()[1:] for m, side in e.sides.items()})
        e.synthesize(3)
    assert torch.equal(before, torch.random.get_rng_state())
    for m in MODALITIES:
        assert not torch.allclose(weights[0][m][1], weights[1][m][1], atol=0.05)


def test_generators_of_a_pair_share_the_noise_that_they_begin_with():
    e = estimator(generator=4)
    e._begin()
    photo, sketch = (e.sides[m].canvas.noise for m in MODALITIES)
    assert torch.equal(photo, sketch)


def test_a_generator_of_photos_beside_sketches_of_strokes():
    e = estimator(strokes=3, generator=4)
    e.synthesize(1)
    before = e.preview(6).photo
    e.synthesize(3)
    assert not torch.equal(e.preview(6).photo, before)
    pairs = e.sample(6)
    assert pairs.photo.shape == (6, 3, 16, 16) and pairs.sketch.shape == (6, 1, 16, 16)
