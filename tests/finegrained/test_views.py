"""The images of a step."""

import pytest
import torch

from dfsbir.finegrained.instances import InstancePairs
from dfsbir.finegrained.views import ViewSampler


def groups_of(preset, tiny_config, toy, **changes):
    "Names of a preset's groups of images."
    config = tiny_config(preset, **changes)
    pairs = InstancePairs(*toy) if config.pairs else None
    unlabelled = toy[0] if config.unlabelled else None
    return list(ViewSampler(config, pairs, unlabelled).draw().groups)


@pytest.mark.parametrize(
    "preset, groups",
    [
        ("triplet", ["photo", "sketch"]),
        ("strong", ["photo", "sketch", "photo+", "sketch+"]),
        ("full", ["photo", "sketch", "photo+", "sketch+", "unlabelled"]),
        ("teacher", ["unlabelled", "unlabelled+"]),
        ("edge-pretext", ["unlabelled", "edge"]),
        ("jigsaw-pretext", ["unlabelled", "edge"]),
    ],
)
def test_a_step_has_the_images_that_its_terms_need(preset, groups, tiny_config, toy):
    assert groups_of(preset, tiny_config, toy) == groups


def test_an_instance_is_mirrored_with_all_its_images(tiny_config, toy):
    "Without structural changes, a photo and its positive are the same image."
    config = tiny_config("triplet-intra", **{"views.strength": 0.0, "views.positive_strength": 0.0})
    step = ViewSampler(config, InstancePairs(*toy), None).draw()
    mirrored, positions = step.places["photo"]
    assert 0 < mirrored.sum() < len(mirrored)
    photos = toy[0].images()[positions]
    photos[mirrored.bool()] = photos[mirrored.bool()].flip(3)
    assert torch.equal(step.groups["photo"], photos)
    assert torch.equal(step.groups["photo+"], photos)


def test_methods_see_the_same_instances(tiny_config, toy):
    pairs = InstancePairs(*toy)
    a = ViewSampler(tiny_config("triplet"), pairs, None)
    b = ViewSampler(tiny_config("full"), pairs, toy[0])
    for _ in range(5):
        assert torch.equal(a.draw().instances, b.draw().instances)


def test_it_goes_on_from_its_state(tiny_config, toy):
    sampler = ViewSampler(tiny_config("full"), InstancePairs(*toy), toy[0])
    sampler.draw()
    state = sampler.state_dict()
    wanted = sampler.draw().groups
    other = ViewSampler(tiny_config("full"), InstancePairs(*toy), toy[0])
    other.load_state_dict(state)
    for name, images in other.draw().groups.items():
        assert torch.equal(images, wanted[name])


def test_too_few_images_are_refused(tiny_config, toy):
    with pytest.raises(ValueError, match="17.*pairs.*16"):
        ViewSampler(tiny_config("triplet", **{"pairs.batch": 17}), InstancePairs(*toy), None)
    with pytest.raises(ValueError, match="5 for 16"):
        pseudo = toy[1].take(range(5))
        ViewSampler(tiny_config("edge-pretext"), None, toy[0], pseudo)
