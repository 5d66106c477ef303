"""Photos as lines, and small drawings that keep their ink."""

import pytest
import torch
import torch.nn.functional as F

from dfsbir.data.image_set import ImageSet
from dfsbir.finegrained.line_art import edge_maps, line_art


def test_line_art_keeps_lines_dark():
    drawing = torch.ones(1, 1, 256, 256)
    drawing[:, :, 128, 40:200] = 0
    drawing[:, :, 0] = 0.9  # a frame
    small = line_art(ImageSet(drawing, [0], ["a"], "sketch", instances=[7]), 64)
    assert small.size == 64 and small.instances.tolist() == [7]
    assert small.images().min() < 0.55
    assert small.images()[:, :, :20].min() == 1, "the frame is gone"
    averaged = F.interpolate(drawing, (64, 64), mode="area")
    assert averaged.min() > 0.7, "by averaging alone, the line all but vanishes"


def test_edge_maps():
    pytest.importorskip("skimage")
    photos = torch.ones(2, 3, 48, 48)
    photos[:, :, 12:36, 12:36] = 0.2
    edges = edge_maps(ImageSet(photos, [0, 0], ["a"], "photo", instances=[3, 4]))
    images = edges.images()
    assert edges.instances.tolist() == [3, 4] and images.unique().tolist() == [0, 1]
    assert torch.equal(images[0, 0], images[0, 2]), "three equal channels"
    dark = (images[0, 0] < 0.5).nonzero()
    assert 60 < len(dark) < 140
    from_centre = (dark - 23.5).abs().max(1).values
    assert (from_centre - 12).abs().max() <= 2, "the lines are the square's sides"
