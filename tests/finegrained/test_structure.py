"""Structural changes: reproducible, in range, and blind to colour."""

import pytest
import torch

from dfsbir.core.config import ConfigError
from dfsbir.finegrained.structure import Structure


def test_a_change_follows_its_generator_and_stays_in_range():
    images, structure = torch.rand(4, 3, 32, 32), Structure()
    a, b = (structure(images, 1.0, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(a, b) and a.shape == images.shape
    assert a.min() >= 0 and a.max() <= 1
    assert not torch.allclose(a, images, atol=0.05)


def test_strength_0_changes_nothing():
    images = torch.rand(4, 3, 32, 32)
    assert Structure()(images, 0.0) is images


def test_colour_is_left_alone_and_new_ground_is_the_border():
    colours = torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1)
    one_colour = torch.full((3, 3, 32, 32), 0.3) * colours
    assert torch.allclose(Structure()(one_colour), one_colour, atol=1e-5)


@pytest.mark.parametrize("side", [64, 256])
def test_lines_grow_by_the_same_share_at_any_size(side):
    "By up to `width` pixels of 64 on each side of a bar that is 8 wide, either way."
    width_alone = Structure(turn=0, stretch=0, shear=0, shift=0, bend=0, drop=0)
    bar = torch.ones(200, 1, side, side)
    bar[..., side // 2 - side // 16 : side // 2 + side // 16] = 0
    changed = width_alone(bar, 1.0, torch.Generator().manual_seed(0))
    ink = (1 - changed[:, 0, side // 2]).sum(1) * 64 / side
    assert 6.3 <= ink.min() < 7.1 and 9.4 < ink.max() <= 9.7


@pytest.mark.parametrize("setting, value", [("drop", 1.0), ("turn", -1.0), ("bend", "much")])
def test_ranges(setting, value):
    with pytest.raises(ConfigError, match=setting):
        Structure(**{setting: value})
