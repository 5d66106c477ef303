"Cards: what they must say, and where the statistics of an input come from."

import json

import pytest

from dfsbir.teachers.card import complete_card, make_card, merge_cards

CLASSES = ["cat", "dog"]


@pytest.mark.parametrize(
    "source, name, mean",
    [
        ("torchvision", "resnet18", 0.485),
        ("timm", "resnet10t", 0.485),
        ("timm", "vit_tiny_patch16_224", 0.5),
        ("dfsbir", "small", 0.5),
    ],
)
def test_a_named_net_brings_its_statistics(source, name, mean):
    card = make_card(CLASSES, "photo", 64, source, name)
    assert card["input"]["mean"][0] == pytest.approx(mean)
    typed = {"classes": CLASSES, "modality": "photo", "input": {"size": 64}}
    assert complete_card({**typed, "source": source, "name": name}) == card
    assert complete_card({**typed, "input": 64, "source": source, "name": name}) == card
    assert json.loads(json.dumps(card)) == card


def test_statistics_are_never_guessed():
    for source, name in ((None, None), ("timm", "no_such_net"), ("torchvision", None)):
        with pytest.raises(ValueError, match="mean and std"):
            make_card(CLASSES, "photo", 64, source, name)
    with pytest.raises(ValueError, match="mean and std"):
        make_card(CLASSES, "photo", 64, mean=0.5)
    card = make_card(CLASSES, "sketch", 64, mean=0, std=1, channels=1, dark_on_light=False)
    assert card["input"] == dict(size=64, channels=1, mean=[0.0], std=[1.0], dark_on_light=False)


def test_given_statistics_come_before_the_sources():
    card = make_card(CLASSES, "photo", 64, "torchvision", "resnet18", mean=0.5, std=0.25)
    assert card["input"]["mean"] == [0.5] * 3 and card["input"]["std"] == [0.25] * 3


@pytest.mark.parametrize(
    "card, named",
    [
        ({}, "classes, modality, input"),
        ({"classes": CLASSES, "modality": "photo"}, "input"),
        ({"classes": "cat", "modality": "photo", "input": 64}, "cat"),
        ({"classes": [1, 2], "modality": "photo", "input": 64}, "names"),
        ({"classes": CLASSES, "modality": "photo", "input": {"side": 64}}, "side"),
        (
            {"classes": CLASSES, "modality": "picture", "input": {"size": 8, "mean": 0, "std": 1}},
            "picture",
        ),
    ],
)
def test_what_a_card_lacks_is_named(card, named):
    with pytest.raises(ValueError, match=named):
        complete_card(card)


def test_what_else_is_known_travels_along():
    card = make_card(CLASSES, "photo", 64, "dfsbir", "small", licence="CC0", accuracy=0.7)
    assert (card["licence"], card["accuracy"]) == ("CC0", 0.7)


def test_a_given_card_corrects_single_entries_of_a_files_own():
    own = make_card(["a", "b"], "sketch", 28, mean=0, std=1, channels=1)
    merged = merge_cards(own, {"input": {"pen": 0.053}, "licence": "MIT"})
    assert merged["input"] == {**own["input"], "pen": 0.053} and merged["licence"] == "MIT"
    assert merge_cards(own, {"input": 32})["input"]["size"] == 32
    assert merge_cards({}, {"classes": ["a"]}) == {"classes": ["a"]}
