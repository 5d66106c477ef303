"""Jigsaw permutations."""

import torch

from dfsbir.finegrained.jigsaw import JIGSAW_PERMUTATIONS, shuffle_quarters


def test_every_permutation_is_another_image():
    assert len(JIGSAW_PERMUTATIONS) == 24 and JIGSAW_PERMUTATIONS[0].tolist() == [0, 1, 2, 3]
    image = torch.arange(16.0).view(1, 1, 4, 4).expand(24, -1, -1, -1)
    shuffled = shuffle_quarters(image, torch.arange(24))
    assert torch.equal(shuffled[0], image[0])
    assert len({tuple(x.flatten().tolist()) for x in shuffled}) == 24
    assert torch.equal(shuffled[23, 0, :2, :2], image[0, 0, 2:, 2:])
