"Two vocabularies against slow loops, ambiguous names, and posteriors at the extremes."

import pytest
import torch
from teachers.helpers import CLASSES

from dfsbir.data.image_set import ImageSet
from dfsbir.teachers.class_map import align_classes, plain_name, to_shared

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
        for name, k in zip(names, assignment.tolist(), strict=True):
            shared = slow_name(name)
            assert k == (m.classes.index(shared) if shared in m.classes else -1)


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
    hot_dog, cup = m.classes.index("hot dog"), m.classes.index("cup")
    assert m.assignment("photo").tolist() == [hot_dog, hot_dog, cup]


def test_an_empty_alias_takes_a_name_of_two_meanings_out():
    names = ["cup", "mouse", "Mouse_"]
    m = align_classes(names, ["mouse", "cup"], {"mouse": "", "Mouse ": ""})
    assert m.classes == ["cup"] and m.dropped == {"photo": [], "sketch": []}
    assert m.ambiguous == {"photo": ["mouse", "Mouse_"], "sketch": ["mouse"]}
    data = ImageSet(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), [0, 1], ["cup", "mouse"], "sketch")
    assert len(to_shared(data, m.classes, {"mouse": ""})) == 1


def test_accents_are_equal_however_they_are_encoded():
    composed, decomposed = "Caf\u00e9", "cafe\u0301"
    assert composed.casefold() != decomposed
    assert align_classes([composed], [decomposed]).classes == [plain_name(composed)]


@pytest.mark.parametrize(
    "photo, sketch",
    [("buses", "bus"), ("berries", "berry"), ("leaf", "leaves"), ("cups", "Cup"), ("axe", "ax")],
)
def test_names_that_differ_in_number_are_told_and_not_matched(photo, sketch):
    m = align_classes(["tree", photo], ["tree", sketch])
    assert m.classes == ["tree"] and m.near == [f"{photo} / {sketch}"]


def test_names_that_have_nothing_in_common_are_not_told():
    assert align_classes(["tree", "house"], ["tree", "fish"]).near == []


def test_two_names_of_one_teacher_that_differ_in_case_are_told():
    m = align_classes(["Cardigan", "cardigan", "tree"], ["tree", "cardigan"])
    assert m.classes == ["tree"] and m.ambiguous["photo"] == ["Cardigan", "cardigan"]


def test_how_many_classes_belong_to_a_shared_one():
    m = align_classes(PHOTO, SKETCH, ALIASES)
    assert m.members("photo") == [1, 3, 1] and m.members("sketch") == [1, 1, 1]
    for name in m.classes:
        assert name in str(m)


def test_an_assignment_is_copied_to_a_device_once():
    m = align_classes(PHOTO, SKETCH, ALIASES)
    assert m.assignment("photo", "meta") is m.assignment("photo", "meta")
    assert m.assignment("photo").device.type == "cpu"


def test_vocabularies_that_cannot_be_aligned():
    with pytest.raises(ValueError, match="cup / cups"):
        align_classes(["cup"], ["cups"])
    with pytest.raises(ValueError, match="two names"):
        align_classes(["a"], ["b"], {"a": "b", "A": "c"})
