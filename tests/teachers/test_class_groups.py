"""Class groups: who knows which classes, and how the shared ones are shown."""

import pytest

from dfsbir.data.toy_shapes import TOY_CLASSES, TOY_HELD_OUT
from dfsbir.teachers.class_groups import group_classes, show_classes
from dfsbir.teachers.class_map import align_classes


def photo_and_sketch_classes():
    return TOY_CLASSES[:6], (*TOY_CLASSES[2:6], TOY_CLASSES[7])


def test_groups_of_classes():
    class_map = align_classes(*photo_and_sketch_classes())
    groups = group_classes(class_map, {}, list(TOY_HELD_OUT[:2]))
    photo, sketch = map(set, photo_and_sketch_classes())
    assert set(groups["shared"]) == photo & sketch
    assert set(groups["photo-only"]) == photo - sketch
    assert set(groups["sketch-only"]) == sketch - photo
    assert groups["unseen"] == list(TOY_HELD_OUT[:2])


def test_a_class_in_two_groups_is_named():
    class_map = align_classes(*photo_and_sketch_classes())
    with pytest.raises(ValueError, match=TOY_CLASSES[3]):
        group_classes(class_map, {}, [TOY_CLASSES[3]])


def test_classes_in_common_are_a_line_where_each_is_one_of_both():
    same = align_classes(["cup", "fish"], ["fish", "cup"])
    text = show_classes(same)._repr_markdown_()
    assert "2 shared classes" in text and "|" not in text and "fish, cup" in text
    some = align_classes(["cup", "fish", "car"], ["fish", "cup", "trees"])
    text = show_classes(some)._repr_markdown_()
    assert "car" in text and "trees" in text and "|" not in text
    many = align_classes(["cup", "mug", "fish"], ["cup", "fish"], {"mug": "cup"})
    assert show_classes(many) is many
