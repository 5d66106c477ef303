"""Exact shared classes of two vocabularies, restricted posteriors, and galleries with drawings."""

import json

import pytest
import torch

from dfsbir.core.device import make_fabric
from dfsbir.core.types import MODALITIES, Normalizer
from dfsbir.crossx.two_worlds import (
    RESTRICTED,
    drawn_test,
    exact_names,
    net_costs,
    public_spaces,
    restrict_posteriors,
)
from dfsbir.data.toy import toy_pairs
from dfsbir.students.cold import cold_encoder
from dfsbir.students.heads import MetricSpace
from dfsbir.teachers.class_map import align_classes
from dfsbir.teachers.nets import build_net
from dfsbir.teachers.teacher import Teacher
from dfsbir.teachers.zoo import imagenet_names

SKETCH = ["dog", "cup", "mouse", "crane", "apple"]
LISTED = {"dog": [0, 3], "apple": [1]}


def test_the_listed_classes_are_shared_and_no_others():
    photo = ["pug", "Granny Smith", "Mouse", "beagle", "cup"]
    names, aliases = exact_names(photo, SKETCH, LISTED)
    shared = align_classes(names, SKETCH, aliases)
    assert shared.classes == ["dog", "apple"]
    assert shared.photo.tolist() == [0, 1, -1, 0, -1]
    assert shared.sketch.tolist() == [0, -1, -1, -1, 1]
    assert names[:2] == photo[:2] and names[2] != "Mouse"


def test_a_sketch_class_of_another_name():
    names, aliases = exact_names(["tabby"], ["kitten", "dog"], {"cat": [0]}, {"cat": "kitten"})
    assert align_classes(names, ["kitten", "dog"], aliases).classes == ["cat"]


@pytest.mark.parametrize(
    "photo, members, drawings, named",
    [
        (["pug"], {"cat": [0]}, None, "cat"),  # no such drawings
        (["pug"], {"dog": []}, None, "dog"),  # no photo output
        (["pug"], {"dog": [0]}, {"dog": "cup"}, "dog"),  # drawn dogs would belong to it too
        (["pug", "pug"], {"dog": [0]}, None, "pug"),  # one of two outputs of a name
    ],
)
def test_what_cannot_be_exact_is_refused(photo, members, drawings, named):
    with pytest.raises(ValueError, match=named):
        exact_names(photo, SKETCH, members, drawings)


def test_the_181_classes_of_two_public_classifiers(data_dir):
    folder = data_dir / "public181"
    table = json.loads((folder / "class_map.json").read_text())
    drawn = json.loads((folder / "sketch_teacher.json").read_text())["classes"]
    members = {c: entry["imagenet"] for c, entry in table["classes"].items()}
    sketches = {c: entry["quickdraw"] for c, entry in table["classes"].items()}
    names, aliases = exact_names(imagenet_names(), drawn, members, sketches)
    shared = align_classes(names, drawn, aliases)
    assert len(shared.classes) == 181 and max(shared.members("sketch")) == 1
    assert not set(table["photo_unseen"]) & set(shared.classes)


def test_restricted_posteriors_by_a_loop():
    p = torch.rand(4, 6).softmax(1)
    kept = torch.tensor([0, 2, 5])
    found = restrict_posteriors(p, kept)
    for row, of in zip(found, p):
        total = sum(of[k] for k in kept)
        assert row.tolist() == pytest.approx([float(of[k] / total) for k in kept])


def test_posteriors_without_any_mass_stay_finite():
    found = restrict_posteriors(torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([1, 2]))
    assert found.tolist() == [[0.5, 0.5]]


@pytest.fixture
def worlds():
    "(teachers, students, class map, gallery, drawings) of nets without training."
    names = ("cup", "fish", "star")
    teachers, students = {}, {}
    same, space = align_classes(names, names), MetricSpace.random(3, 8)
    for k, m in enumerate(MODALITIES):
        torch.manual_seed(k)
        teachers[m] = Teacher(build_net("dfsbir", "tiny", 3), names, Normalizer(16), m)
        students[m] = cold_encoder(teachers[m], same, space, "dfsbir/tiny").eval()
    photos = toy_pairs(8, size=28, classes=("cup", "fish"), split="test")[0]
    drawings = toy_pairs(12, size=28, classes=names, split="test")[1]
    return teachers, students, same, photos, drawings


def test_drawings_of_other_classes_ask_nothing(worlds):
    *_, class_map, photos, drawings = worlds
    test = drawn_test(photos, drawings, class_map.classes, {})
    assert sorted(test["sketch"].labels.unique().tolist()) == [0, 1]
    assert len(test["sketch"]) == 8 and len(test["photo"]) == 8
    with pytest.raises(ValueError, match="no drawings"):
        drawn_test(photos, drawings.take(drawings.labels == 2), class_map.classes, {})


def test_restricted_rows_are_for_known_classes_alone(worlds):
    teachers, students, class_map, photos, drawings = worlds
    test = drawn_test(photos, drawings, class_map.classes, {})
    spaces, _ = public_spaces(teachers, {"s": students}, class_map, test, make_fabric("cpu"))
    assert spaces["teacher-posteriors", RESTRICTED]["photo"].shape == (8, 2)
    roots = spaces["crossx-dfsbir", f"s, {RESTRICTED}"]["sketch"]
    torch.testing.assert_close(roots.square().sum(1), torch.ones(8))
    other = toy_pairs(8, size=28, classes=("boat", "key"), split="test")
    unseen = drawn_test(*other, [*class_map.classes, "boat", "key"], {})
    spaces, _ = public_spaces(teachers, {"s": students}, class_map, unseen, make_fabric("cpu"))
    assert not any(RESTRICTED in variant for _, variant in spaces)
    assert ("crossx-dfsbir", "s") in spaces


def test_costs_of_teachers_and_students(worlds):
    teachers, students, *_ = worlds
    costs = net_costs(teachers, {"s": students}, 16)
    assert list(costs) == [
        "photo teacher",
        "photo student (s)",
        "sketch teacher",
        "sketch student (s)",
    ]
    teacher, student = costs["photo teacher"], costs["photo student (s)"]
    assert teacher.multiplications <= student.multiplications < 1.1 * teacher.multiplications
