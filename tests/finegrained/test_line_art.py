"""Photos as lines, and small drawings that keep their ink."""

import pytest
import torch
import torch.nn.functional as F

from dfsbir.data.image_set import ImageSet
from dfsbir.finegrained.line_art import edge_maps, frame_objects, line_art


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


@pytest.mark.parametrize("modality, channels", (("photo", 3), ("sketch", 1)))
def test_objects_are_framed_whatever_their_place_and_size(modality, channels):
    images = torch.ones(4, channels, 64, 64)
    images[0, :, 2:12, 40:60] = 0.3  # twice as wide as high
    images[1, :, 10:40, 2:62] = 0.3  # the same thing, larger
    images[2, :, 30:40, 20:25] = 0.3  # twice as high as wide
    framed = frame_objects(ImageSet(images, [0] * 4, ["a"], modality, instances=[5, 6, 7, 8]), 40)
    assert framed.size == 40 and framed.instances.tolist() == [5, 6, 7, 8]
    wide, wide_too, high, empty = (image[0] < 0.6 for image in framed.images())
    assert (wide == wide_too).float().mean() > 0.98
    assert [wide.any(k).sum().item() for k in (0, 1)] == [36, 18], ".9 of 40, and half of it"
    assert [high.any(k).sum().item() for k in (0, 1)] == [18, 36]
    assert torch.equal(wide, wide.flip(0)) and torch.equal(wide, wide.flip(1)), "in the middle"
    assert framed.images()[3].min() == 1, "an empty image stays empty"


@pytest.mark.parametrize("share", (0, 1.2))
def test_a_frame_has_room_for_its_object(share):
    images = ImageSet(torch.ones(1, 1, 8, 8), [0], ["a"], "sketch")
    with pytest.raises(ValueError, match="share"):
        frame_objects(images, 8, share)
