"Procedural photos and objects: canonical, reproducible, and with outlines in common."

import pytest
import torch
import torch.nn.functional as F

from dfsbir.core.types import MODALITIES, Modality
from dfsbir.data.pen import measure_pen
from dfsbir.data.procedural import procedural_images, procedural_objects, procedural_photos


@pytest.fixture(autouse=True)
def one_seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("size", [16, 32, 48])
def test_photos_are_canonical(size):
    x = procedural_photos(6, size)
    assert x.shape == (6, 3, size, size) and x.isfinite().all() and not x.requires_grad
    assert x.min() >= 0 and x.max() <= 1


@pytest.mark.parametrize("size, parts", [(24, 1), (33, 2), (48, 5)])
def test_objects_are_canonical_pairs(size, parts):
    made = procedural_objects(7, size, parts)
    assert made.photo.shape == (7, 3, size, size) and made.sketch.shape == (7, 1, size, size)
    assert made.label.tolist() == list(range(7)) and made.photo_target is None
    for x in (made.photo, made.sketch):
        assert x.isfinite().all() and x.min() >= 0 and x.max() <= 1 and not x.requires_grad


def test_objects_come_from_the_global_random_numbers():
    def made(seed):
        torch.manual_seed(seed)
        return procedural_objects(4, 24)

    a, b, c = made(1), made(1), made(2)
    assert torch.equal(a.photo, b.photo) and torch.equal(a.sketch, b.sketch)
    assert not torch.equal(a.photo, c.photo) and not torch.equal(a.sketch, c.sketch)


@pytest.mark.parametrize("make", [procedural_objects, procedural_photos])
def test_a_generator_stands_for_the_global_random_numbers(make):
    "The same seed gives the same images either way, and the global numbers stay where they were."
    torch.manual_seed(5)
    expected = make(4, 24)
    state = torch.get_rng_state()
    made = make(4, 24, generator=torch.Generator().manual_seed(5))
    assert torch.equal(torch.get_rng_state(), state)
    if make is procedural_objects:
        expected, made = expected.photo, made.photo
    assert torch.equal(expected, made)


def test_objects_are_lines_on_paper_and_differ():
    made = procedural_objects(100)
    ink = (1 - made.sketch).mean((1, 2, 3))
    assert 0.02 < ink.mean() < 0.4
    assert (ink > 0.005).float().mean() > 0.95  # hardly ever an empty paper
    assert (made.photo[0] - made.photo[1]).abs().mean() > 0.05


def edges(photos):
    "Size of the colour gradient of blurred photos."
    x = F.avg_pool2d(photos, 3, 1)
    down, across = x[..., 1:, :-1] - x[..., :-1, :-1], x[..., :-1, 1:] - x[..., :-1, :-1]
    return (down**2 + across**2).sum(1, keepdim=True).sqrt()


def unit_cells(x):
    "Mean brightness of 12 x 12 cells, centred and of unit length."
    x = F.adaptive_avg_pool2d(x, 12).flatten(1)
    return F.normalize(x - x.mean(1, keepdim=True), dim=1)


def test_photo_and_drawing_of_an_object_share_outlines():
    "A photo's edges are nearest to its own drawing far more often than one time in fifty."
    made = procedural_objects(50, 48)
    similarity = unit_cells(edges(made.photo)) @ unit_cells(1 - made.sketch).T
    own = similarity.diag()
    others = similarity[~torch.eye(50, dtype=torch.bool)]
    assert own.mean() > others.mean() + 0.2
    assert (similarity.argmax(1) == torch.arange(50)).float().mean() > 0.2


def test_sketches_are_drawn_with_a_pen():
    "The same objects with thinner and thicker lines; photos and the objects stay the same."

    def drawn(pen):
        return procedural_objects(24, 96, generator=torch.Generator().manual_seed(0), pen=pen)

    plain, thin, thick = (drawn(pen) for pen in (None, 0.028, 0.056))
    torch.testing.assert_close(plain.sketch, thin.sketch)
    assert torch.equal(plain.photo, thick.photo)
    widths = [measure_pen(pairs.sketch).median().item() for pairs in (thin, thick)]
    assert 1.4 < widths[1] / widths[0] < 2.2


@pytest.mark.parametrize("modality", MODALITIES)
def test_objects_of_one_modality_are_like_those_of_pairs(modality):
    "As bright and as varied as in pairs; sketches with the pen that is asked for."
    pen = 0.05 if modality is Modality.SKETCH else None
    alone = procedural_images(modality, 100, 48, pen=pen)
    paired = procedural_objects(100, 48, pen=pen).of(modality)
    assert alone.shape == paired.shape
    assert alone.mean().item() == pytest.approx(paired.mean().item(), abs=0.05)
    assert alone.std(0).mean().item() == pytest.approx(paired.std(0).mean().item(), rel=0.15)
    if pen:
        widths = [measure_pen(x).median().item() for x in (alone, paired)]
        assert widths[0] == pytest.approx(widths[1], rel=0.15)


@pytest.mark.parametrize("modality", MODALITIES)
def test_objects_of_one_modality_are_their_generators(modality):
    def made(seed):
        return procedural_images(modality, 3, 24, generator=torch.Generator().manual_seed(seed))

    before = torch.get_rng_state()
    first = made(1)
    assert torch.equal(first, made(1)) and not torch.equal(first, made(2))
    assert torch.equal(before, torch.get_rng_state())
