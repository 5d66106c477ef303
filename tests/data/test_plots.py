"""Grids of images."""

import pytest
import torch

from dfsbir.core.types import PairBatch
from dfsbir.data.plots import show_images, show_pairs


def test_a_grid_has_whole_rows(toy):
    photos, _ = toy
    frames = ["g", None, None, None, "r", None, None]
    fig = show_images(photos.take(range(7)), columns=5, frames=frames)
    assert len(fig.axes) == 10
    titles = [ax.get_title() for ax in fig.axes[:7]]
    assert titles == [photos.classes[label] for label in photos.labels[:7]]


def test_pairs_of_a_batch_and_of_sets(toy):
    photos, sketches = toy
    batch = PairBatch(photos.images()[:4], sketches.images()[:4], photos.labels[:4])
    assert len(show_pairs(batch, n=3).axes) == 6
    assert len(show_pairs(toy, n=5).axes) == 10


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 2, 8, 8), (0, 3, 8, 8)])
def test_what_is_no_batch_of_images_is_refused(shape):
    with pytest.raises(ValueError, match=str(shape[0])):
        show_images(torch.zeros(shape))


def test_unequal_numbers_are_refused(toy):
    with pytest.raises(ValueError, match="200 and 1"):
        show_pairs((toy[0], toy[1].take([0])))
