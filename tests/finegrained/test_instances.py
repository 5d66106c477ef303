"""Batches of pairs with one sketch or several, and splits by instance."""

import pytest
import torch

from dfsbir.data.image_set import ImageSet
from dfsbir.finegrained.instances import InstancePairs, ShuffledSampler, split_instances


def several(n=6, each=3):
    "n photos of value i, `each` sketches of value 50 + 10 i + k, instances 10 + i."
    values = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1)
    photos = ImageSet(
        values.expand(n, 3, 28, 28).clone(),
        [0] * n,
        ["a"],
        "photo",
        instances=[10 + i for i in range(n)],
    )
    drawn = [(i, k) for i in range(n) for k in range(each)]
    values = torch.tensor([50 + 10 * i + k for i, k in drawn], dtype=torch.uint8)
    sketches = ImageSet(
        values.view(-1, 1, 1, 1).expand(-1, 1, 28, 28).clone(),
        [0] * len(drawn),
        ["a"],
        "sketch",
        instances=[10 + i for i, _ in drawn],
    )
    return photos, sketches


def numbers_in(sketches):
    "Which photos sketches belong to, read from their pixels."
    return (sketches[:, 0, 0, 0].long() - 50) // 10


def test_several_sketches_a_photo():
    pairs = InstancePairs(*several())
    photo, sketch, other, at = pairs.batch(torch.arange(6), torch.Generator().manual_seed(0))
    assert torch.equal(photo[:, 0, 0, 0].long(), at)
    assert torch.equal(numbers_in(sketch), at) and torch.equal(numbers_in(other), at)
    assert (sketch != other).flatten(1).any(1).all(), "the positive is another sketch"


def test_every_sketch_is_drawn_sooner_or_later():
    pairs = InstancePairs(*several(2))
    generator = torch.Generator().manual_seed(0)
    seen = {int(s[0, 0, 0]) for _ in range(30) for s in pairs.batch(torch.arange(2), generator)[1]}
    assert seen == {50, 51, 52, 60, 61, 62}


def test_one_sketch_is_its_own_positive():
    pairs = InstancePairs(*several(each=1))
    _, sketch, other, _ = pairs.batch(torch.arange(6), torch.Generator())
    assert torch.equal(sketch, other)


def test_a_photo_that_nobody_drew_is_no_pair():
    photos, sketches = several()
    assert len(InstancePairs(photos, sketches.take(slice(0, 3)))) == 1


def test_pairs_that_do_not_fit_are_refused():
    photos, sketches = several()
    with pytest.raises(ValueError, match="the first is 10"):
        InstancePairs(photos.take(slice(1, None)), sketches)
    with pytest.raises(ValueError, match="1 photos repeat"):
        InstancePairs(photos.take([0, 0, 1]), sketches)
    without = ImageSet(photos.images(), photos.labels, ["a"], "photo")
    with pytest.raises(ValueError, match="instances"):
        InstancePairs(without, sketches)


def test_whole_instances_are_held_back():
    (photos, sketches), (val_photos, val_sketches) = split_instances(*several(10), 0.3, seed=1)
    assert [len(s) for s in (photos, sketches, val_photos, val_sketches)] == [7, 21, 3, 9]
    assert not set(photos.instances.tolist()) & set(val_photos.instances.tolist())
    assert set(val_sketches.instances.tolist()) == set(val_photos.instances.tolist())


def test_splits_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="3 instances"):
        split_instances(*several(3), 0.5)
    with pytest.raises(ValueError, match="1.0"):
        split_instances(*several(6), 1.0)


def test_a_sampler_gives_everything_once_a_pass_and_goes_on():
    sampler = ShuffledSampler(6, torch.Generator().manual_seed(0))
    first, second = sampler.draw(2), sampler.draw(4)
    assert sorted([*first.tolist(), *second.tolist()]) == list(range(6))
    state = sampler.state_dict()
    state = {k: v.clone() for k, v in state.items()}
    wanted = [sampler.draw(4).tolist() for _ in range(5)]
    sampler.load_state_dict(state)
    assert [sampler.draw(4).tolist() for _ in range(5)] == wanted
