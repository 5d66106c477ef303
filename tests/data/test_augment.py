"""Random views."""

import pytest
import torch

from dfsbir.data.augment import augment_batch, sampling_grid, shift_flip


@pytest.mark.parametrize("modality", ["photo", "sketch"])
def test_views_stay_images_and_follow_their_generator(toy, modality):
    images = toy[modality == "sketch"].images()[:8]
    views = [augment_batch(images, modality, torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert views[0].shape == images.shape
    assert views[0].min() >= 0 and views[0].max() <= 1
    assert torch.equal(views[0], views[1]) and not torch.equal(views[0], views[2])
    assert not torch.equal(views[0], images)


def test_new_ground_of_a_sketch_is_white():
    views = augment_batch(torch.ones(16, 1, 32, 32), "sketch", torch.Generator().manual_seed(0))
    assert torch.allclose(views, torch.ones_like(views), atol=1e-5)


def test_a_grey_photo_stays_grey():
    views = augment_batch(torch.full((16, 3, 16, 16), 0.5), "photo")
    assert torch.allclose(views[:, 0], views[:, 2], atol=1e-6)


def test_shift_flip_moves_whole_pixels():
    "Every row of a view is a row of the image, shifted or mirrored, edges repeated."
    torch.manual_seed(0)
    ramp = torch.arange(20.0).expand(64, 1, 20, 20)
    views = shift_flip(ramp, shift=0.1)
    steps = views.diff(dim=3)
    assert set(steps.unique().tolist()) <= {-1.0, 0.0, 1.0}
    assert (views.sum(3) - ramp.sum(3)).abs().max() <= 2 * 20, "by two pixels at most"
    mirrored = (steps.sum(3) < 0).float().mean()
    assert 0.2 < mirrored < 0.8


def test_shift_flip_without_flips():
    ramp = torch.arange(20.0).expand(64, 1, 20, 20)
    assert (shift_flip(ramp, flip=0.0).diff(dim=3) >= 0).all()


def test_strokes_become_thinner_and_thicker():
    line = torch.ones(8, 1, 32, 32)
    line[..., 15:17] = 0  # 64 pixels of ink
    generators = [torch.Generator().manual_seed(seed) for seed in range(8)]
    inks = [(1 - augment_batch(line, "sketch", g)).sum((1, 2, 3)) for g in generators]
    ink = torch.cat(inks)
    assert ink.min() < 55 and ink.max() > 80


@pytest.mark.parametrize("modality", ["photo", "sketch"])
def test_mixed_precision_moves_no_pixel(modality):
    x = torch.rand(4, 3 if modality == "photo" else 1, 96, 96).round()
    wanted = augment_batch(x, modality, torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        found = augment_batch(x, modality, torch.Generator().manual_seed(0))
        identity = sampling_grid(torch.eye(2, 3)[None], x[:1])
    assert torch.equal(found, wanted)
    columns = ((identity[0, 0, :, 0] + 1) * 96 - 1) / 2
    torch.testing.assert_close(columns, torch.arange(96.0), atol=1e-4, rtol=0)
