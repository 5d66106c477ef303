"""Teachers of a recipe: trained once, found again by all that decides their weights."""

import threading
from types import SimpleNamespace

import pytest
import torch
from torchvision.utils import save_image

import dfsbir.teachers.teacher_recipe as module
from dfsbir.core.types import MODALITIES
from dfsbir.crossx.trainer import weights_digest
from dfsbir.data.toy_shapes import TOY_CLASSES
from dfsbir.teachers.experiment_data import ToyData
from dfsbir.teachers.teacher_recipe import TeacherRecipe, teacher_classes, trained_teacher

PHOTO, SKETCH = MODALITIES
RECIPE = TeacherRecipe(net="tiny", epochs=1, batch_size=20, size=28)


def test_a_teacher_is_trained_once(tmp_path):
    data, file = ToyData(60, 40, 28), tmp_path / "photo.safetensors"
    first = trained_teacher(file, RECIPE, PHOTO, data)
    when = file.stat().st_mtime_ns
    again = trained_teacher(file, RECIPE, PHOTO, data)
    assert file.stat().st_mtime_ns == when
    assert weights_digest(first) == weights_digest(again) and again.history == first.history


def test_another_recipe_trains_another_teacher(tmp_path):
    data, file = ToyData(60, 40, 28), tmp_path / "photo.safetensors"
    first = trained_teacher(file, RECIPE, PHOTO, data)
    other = TeacherRecipe(net="tiny", epochs=1, batch_size=20, size=28, seed=5)
    assert weights_digest(trained_teacher(file, other, PHOTO, data)) != weights_digest(first)


def test_a_key_stands_for_all_that_decides_the_weights(folders, folder_data):
    data, classes = ToyData(60, 40, 28), list(TOY_CLASSES)
    keys = {
        RECIPE.key(PHOTO, data, classes),
        RECIPE.key(SKETCH, data, classes),
        RECIPE.key(PHOTO, data, classes[:5]),
        RECIPE.key(PHOTO, ToyData(70, 40, 28), classes),
        RECIPE.key(PHOTO, ToyData(60, 40, 32), classes),
        RECIPE.key(PHOTO, folder_data, classes),
        TeacherRecipe(net="tiny", epochs=2, batch_size=20, size=28).key(PHOTO, data, classes),
    }
    assert len(keys) == 7
    assert RECIPE.key(PHOTO, ToyData(60, 90, 28), classes) in keys, "test images do not matter"
    before = RECIPE.key(PHOTO, folder_data, classes)
    extra = folders / "train" / "photo" / TOY_CLASSES[0] / "extra.png"
    save_image(torch.rand(3, 28, 28), extra)
    assert RECIPE.key(PHOTO, folder_data, classes) != before
    extra.unlink()


def test_several_processes_load_a_teacher_and_train_none(tmp_path):
    data, file, two = ToyData(60, 40, 28), tmp_path / "p.safetensors", SimpleNamespace(world_size=2)
    with pytest.raises(ValueError, match="one process .* found 2.*p.safetensors"):
        trained_teacher(file, RECIPE, PHOTO, data, fabric=two)
    first = trained_teacher(file, RECIPE, PHOTO, data)
    there = trained_teacher(file, RECIPE, PHOTO, data, fabric=two)
    assert weights_digest(there) == weights_digest(first)


def test_two_that_want_the_same_teacher_train_it_once(tmp_path, monkeypatch):
    real, trained = module.train_teacher, []

    def train(*args, **kwargs):
        trained.append(1)
        return real(*args, progress=False, **kwargs)

    monkeypatch.setattr(module, "train_teacher", train)
    data, file = ToyData(60, 40, 28), tmp_path / "photo.safetensors"
    threads = [
        threading.Thread(target=trained_teacher, args=(file, RECIPE, PHOTO, data)) for _ in range(2)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert trained == [1]


def test_a_teacher_whose_training_failed_leaves_its_folder_empty(tmp_path, monkeypatch):
    "So the run folder has no results, and another config may begin it anew."

    def fail(*args, **options):
        raise FloatingPointError("the loss is nan")

    monkeypatch.setattr(module, "train_teacher", fail)
    data, file = ToyData(60, 40, 28), tmp_path / "teachers" / "photo.safetensors"
    with pytest.raises(FloatingPointError):
        trained_teacher(file, RECIPE, PHOTO, data)
    assert not list(file.parent.iterdir())


def test_classes_of_a_teacher():
    data = ToyData(60, 40, 28)
    assert teacher_classes(data, PHOTO) == list(TOY_CLASSES)
    assert teacher_classes(data, PHOTO, ["fish", "cup"]) == [
        c for c in TOY_CLASSES if c in ("fish", "cup")
    ]
    assert "fish" not in teacher_classes(data, PHOTO, unseen=["fish"])
    with pytest.raises(ValueError, match="zebra"):
        teacher_classes(data, PHOTO, ["zebra", "fish"])
    with pytest.raises(ValueError, match="two classes"):
        teacher_classes(data, PHOTO, ["fish", "cup"], unseen=["cup"])
