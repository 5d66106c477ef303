"Two vocabularies against slow loops, ambiguous names, and posteriors at the extremes."

import pytest
import torch
from teachers.helpers import CLASSES

from dfsbir.teachers.class_map import align_classes

PHOTO = ["Beagle", "pug", "sports_car", "tree", "ship", "dog"]
SKETCH = ["tree", "dog", "Sports Car", "moon"]
ALIASES = {"beagle": "dog", "PUG": "dog"}


def slow_name(name):
    "The shared name of a class, by hand."
    clean = name.lower().replace("_", " ")
    return {"beagle": "dog", "pug": "dog"}.get(clean, clean)


def test_alignment_against_a_slow_loop():
    m = align_classes(PHOTO, SKETCH, ALIASES)
    assert m.classes == ["tree", "dog", "sports car"]
    assert m.dropped == {"photo": ["ship"], "sketch": ["moon"]}
    for names, assignment in ((PHOTO, m.photo), (SKETCH, m.sketch)):
        for i, name in enumerate(names):
            for k, shared in enumerate(m.classes):
                assert assignment[i, k] == (slow_name(name) == shared)


def test_posteriors_against_a_slow_loop():
    m, z = align_classes(PHOTO, SKETCH, ALIASES), torch.randn(5, 6) * 3
    p = (z / 2).softmax(1)
    members = [[3], [0, 1, 5], [2]]
    slow = torch.stack([sum(p[:, i] for i in group) for group in members], 1)
    wanted = slow / slow.sum(1, keepdim=True)
    torch.testing.assert_close(m.posteriors(z, "photo", 2.0), wanted, atol=1e-6, rtol=0)


def test_posteriors_stay_finite_where_no_shared_class_is_likely():
    m = align_classes(["a", "b", "c"], ["a", "b"])
    p = m.posteriors(torch.tensor([[-500.0, -501.0, 500.0]]).requires_grad_(), "photo")
    torch.testing.assert_close(p[0], torch.tensor([1.0, 0]).softmax(0))


def test_equal_vocabularies_give_the_plain_softmax():
    m, z = align_classes(CLASSES, CLASSES), torch.randn(4, 3)
    torch.testing.assert_close(m.posteriors(z, "sketch"), z.softmax(1))
    assert m.dropped == {"photo": [], "sketch": []}


def test_ambiguous_names_are_left_out_and_said():
    m = align_classes(["crane", "crane", "cup", "aeroplane"], ["crane", "cup", "airplane"])
    assert m.classes == ["cup"] and m.near == ["aeroplane / airplane"]
    assert m.ambiguous == {"photo": ["crane", "crane"], "sketch": []}
    for part in ("crane", "aeroplane / airplane", "cup"):
        assert part in str(m)


def test_an_alias_says_that_two_names_are_one():
    aliases = {"hot dog": "hot dog"}
    m = align_classes(["hot dog", "Hot_Dog", "cup"], ["hot dog", "cup"], aliases)
    assert m.photo[:, m.classes.index("hot dog")].tolist() == [1, 1, 0]


def test_vocabularies_that_cannot_be_aligned():
    with pytest.raises(ValueError, match="cup / cups"):
        align_classes(["cup"], ["cups"])
    with pytest.raises(ValueError, match="two names"):
        align_classes(["a"], ["b"], {"a": "b", "A": "c"})
