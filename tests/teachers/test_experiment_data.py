"""Data of an experiment: the toy set and class folders give what is asked, or name what lacks."""

import json

import numpy as np
import pytest
import torch

from dfsbir.core.types import MODALITIES, Modality
from dfsbir.data.pen import measure_pen
from dfsbir.data.toy_shapes import TOY_CLASSES, TOY_HELD_OUT
from dfsbir.teachers.experiment_data import FolderData, ToyData, alternative_images
from dfsbir.teachers.teacher_recipe import teacher_classes

PHOTO, SKETCH = MODALITIES


def test_toy_training_images_are_fewer_for_fewer_classes():
    data = ToyData(images=60, test_images=40, size=28)
    assert [len(data.training(m)) for m in MODALITIES] == [60, 60]
    some = data.training(SKETCH, ["cup", "fish", "car"])
    assert len(some) == 18 and some.classes == ["cup", "fish", "car"]


def test_toy_test_images_of_known_classes_do_not_depend_on_the_unseen_ones():
    data = ToyData(images=60, test_images=40, size=28)
    alone = data.test()
    beside = data.test(TOY_CLASSES, list(TOY_HELD_OUT[:2]))
    for m in MODALITIES:
        assert len(beside[m]) == 48 and beside[m].classes[-2:] == list(TOY_HELD_OUT[:2])
        assert torch.equal(alone[m].images(), beside[m].images()[:40])
        assert set(beside[m].labels[40:].tolist()) == {10, 11}, "the unseen ones come last"


def test_toy_classes_that_do_not_exist_are_named():
    with pytest.raises(ValueError, match="zebra"):
        ToyData(60, 40, 28).check([], ["zebra"])


def test_folders(folder_data):
    data = folder_data
    data.check(MODALITIES)
    assert data.class_names(PHOTO) == sorted(TOY_CLASSES[:3]) and data.name == "photo"
    assert len(data.training(PHOTO)) == 12 and len(data.test()[SKETCH]) == 12
    assert data.training(PHOTO, ["fish", "car"]).classes == ["fish", "car"]


def test_test_sketches_are_drawn_with_the_pen_of_the_teacher(folders):
    places = {m: str(folders / "test" / m) for m in MODALITIES}
    plain, wide = (FolderData({}, places, 64, pen=pen).test() for pen in (None, 0.08))
    widths = [measure_pen(test[SKETCH].images()).median().item() for test in (plain, wide)]
    assert widths[1] > widths[0] and wide[SKETCH].size == 64
    assert torch.equal(plain[PHOTO].images(), wide[PHOTO].images())


def test_folders_that_are_not_there_are_named(folders):
    data = FolderData({m: "" for m in MODALITIES}, {m: str(folders) for m in MODALITIES}, 28)
    data.check([])
    with pytest.raises(FileNotFoundError, match="sketch_train"):
        data.check([SKETCH])


def test_alternative_images_are_of_classes_that_nobody_asks_for(folders):
    toy = ToyData(60, 40, 28)
    photos, sketches = alternative_images(toy, 60, list(TOY_CLASSES), ["boat"], ("", ""))
    assert set(photos.classes) == set(TOY_HELD_OUT) and len(sketches) == 6 * len(TOY_HELD_OUT)
    with pytest.raises(ValueError, match="unseen"):
        alternative_images(toy, 60, [*TOY_CLASSES, *TOY_HELD_OUT], [], ("", ""))
    both = tuple(str(folders / "train" / m) for m in MODALITIES)
    found = alternative_images(toy, 60, [], [TOY_CLASSES[0]], both)
    assert set(found[0].classes) == set(TOY_CLASSES[1:3])


def test_quickdraws_files_train_a_teacher(tmp_path):
    "CLASS.ndjson and CLASS.npy are training folders of sketches too."
    record = json.dumps({"word": "cat", "drawing": [[[0, 9, 4], [0, 5, 9]]]})
    (tmp_path / "cat.ndjson").write_text("\n".join([record] * 3))
    np.save(tmp_path / "ant.npy", np.zeros((4, 784), np.uint8))
    train = {Modality.PHOTO: "", Modality.SKETCH: str(tmp_path)}
    data = FolderData(train, dict(train), 28)
    assert data.class_names(Modality.SKETCH) == ["ant", "cat"]
    assert len(data.training(Modality.SKETCH)) == 7
    assert len(data.training(Modality.SKETCH, ["cat"])) == 3
    assert teacher_classes(data, Modality.SKETCH) == ["ant", "cat"]
