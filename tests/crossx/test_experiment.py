"""The settings of an experiment: what is found before anything long."""

import json

import pytest
import torch
from PIL import Image

from dfsbir.app.parameters import notebook_parameters
from dfsbir.core.config import ConfigError
from dfsbir.core.types import MODALITIES
from dfsbir.crossx.experiment import (
    Setup,
    check_start,
    open_run,
    prepare_experiment,
    read_names,
    split_changes,
)
from dfsbir.crossx.trainer import weights_digest
from dfsbir.data.toy_shapes import TOY_CLASSES
from dfsbir.teachers.experiment_data import ToyData
from dfsbir.teachers.loading import save_teacher
from dfsbir.teachers.teacher_recipe import TeacherRecipe, trained_teacher

PHOTO, SKETCH = MODALITIES
RECIPE = TeacherRecipe(net="tiny", epochs=1, batch_size=20, size=28)


def parameters(folder, **changes):
    "All parameters of run_experiment.ipynb, at the toy miniature."
    return {
        "dataset": "toy",
        "name": "",
        "photo_train": "",
        "sketch_train": "",
        "photo_test": "",
        "sketch_test": "",
        "broken": "raise",
        "toy_images": 60,
        "toy_test": 40,
        "size": 28,
        "photo_teacher": "",
        "sketch_teacher": "",
        "photo_card": "",
        "sketch_card": "",
        "aliases": "",
        "teacher_net": "tiny",
        "teacher_size": 0,
        "photo_epochs": 1,
        "sketch_epochs": 1,
        "teacher_lr": 3e-3,
        "teacher_batch": 16,
        "pretrained": False,
        "preset": "dfsbir",
        "changes": "",
        "ceiling": True,
        "pairs_from": "",
        "seed": 0,
        "device": "cpu",
        "run_folder": str(folder),
        "results": "",
        **changes,
    }


# ---- settings


def test_changes_of_single_presets():
    changes = {"students.lr": 1e-3, "paper": {"schedule.rounds": 3}, "pairs": {"batch": 20}}
    shared, own = split_changes(changes, ("dfsbir", "paper"))
    assert shared == {"students.lr": 1e-3, "pairs": {"batch": 20}}
    assert own == {"dfsbir": {}, "paper": {"schedule.rounds": 3}}
    with pytest.raises(ValueError, match="'paper'"):
        split_changes({"papre": {"schedule.rounds": 3}}, ("dfsbir", "paper"))


def test_names_of_classes_are_plain():
    assert read_names(" Tea_Pot, fish ,") == ["tea pot", "fish"] and read_names("") == []


def test_layers_of_a_config(tmp_path):
    setup = Setup.of(parameters(tmp_path, seed=3))
    config = setup.config("paper", {"students.lr": 0.5}, {"pairs.photo.size": 40})
    assert (config.seed, config.device, config.students.lr) == (3, "cpu", 0.5)
    assert (config.pairs.photo.size, config.pairs.sketch.size) == (40, 28)
    objects = setup.config("dfsbir", {"pairs.kind": "objects"})
    assert set(objects.sizes.values()) == {28}, "the size holds for pairs of another kind too"
    with pytest.raises(ConfigError, match=r"students\.lr"):
        setup.config("dfsbir", {"student.lr": 1})


@pytest.mark.parametrize(
    "change, named",
    [
        ({"dataset": "toys"}, "'toy'"),
        ({"broken": "ignore"}, "skip"),
        ({"preset": "opn"}, "'open'"),
        ({"photo_train": "somewhere"}, "folders"),
        ({"dataset": "folders"}, "photo_test"),
        ({"aliases": "{automobile: car}"}, "aliases"),
        ({"photo_card": "[1]"}, "photo_card"),
        ({"changes": "none.json"}, "changes"),
        ({"changes": '{"students.rl": 1}'}, "students.lr"),
        ({"changes": '{"papre": {"students.lr": 1}}'}, "paper"),
        ({"teacher_net": "resnet18"}, "resnet18"),
        ({"photo_teacher": "nowhere.safetensors"}, "nowhere.safetensors"),
        ({"changes": '{"students.start.kind": "cold", "students.start.net": "a/b"}'}, "timm"),
    ],
    ids=str,
)
def test_mistakes_are_found_before_the_run_folder_is_made(tmp_path, change, named):
    p = parameters(tmp_path / "run", **change)
    with pytest.raises((ValueError, OSError), match=named):
        check_start(p)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "name, value",
    [
        *(
            (name, 0)
            for name in ("toy_images", "toy_test", "size", "photo_epochs", "sketch_epochs")
        ),
        ("toy_images", -5),
        ("teacher_size", -1),
        ("teacher_batch", 0),
        *(("teacher_lr", value) for value in (0.0, -1.0, float("inf"), float("nan"))),
        ("seed", -1),
        ("device", "gpu"),
        pytest.param(
            "device",
            "cuda",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a card is here"),
        ),
        ("results", "."),
    ],
)
def test_numbers_that_can_only_fail_later_are_found_at_once(name, value, tmp_path):
    "Before the run folder is made; the message names the parameter."
    with pytest.raises((ValueError, OSError), match=name):
        check_start(parameters(tmp_path / "run", **{name: value}))
    assert not (tmp_path / "run").exists()


def test_layers_that_the_net_does_not_have_are_found_before_training(tmp_path):
    changes = {
        "students.head.kind": "intermediate",
        "students.head.layers": "blocks.7.bn1",
        "students.loss.infonce": 0,
    }
    p = parameters(tmp_path / "run", preset="open", changes=json.dumps(changes))
    with pytest.raises(ValueError, match="blocks.7.bn1"):
        check_start(p)


def test_teachers_without_a_class_in_common_are_found_before_training(tmp_path):
    setup = Setup.of(parameters(tmp_path))
    with pytest.raises(ValueError, match="share no class"):
        setup.rehearse([], {PHOTO: list(TOY_CLASSES[:3]), SKETCH: list(TOY_CLASSES[4:6])})


def test_classes_without_training_images_for_the_ceiling_are_found_before_training(tmp_path):
    "Teachers of other classes than the toy set's, with the dataset left at its default."
    p = parameters(tmp_path / "run")
    for m in MODALITIES:
        p[f"{m}_teacher"] = str(tmp_path / f"{m}.safetensors")
        save_teacher(RECIPE.untrained(m, ["fish", "tench"]), p[f"{m}_teacher"])
    with pytest.raises(ValueError, match=r"\['tench'\].* -p ceiling False .*-p dataset folders"):
        check_start(p)
    assert not (tmp_path / "run").exists()
    prepare_experiment({**p, "ceiling": False})
    prepare_experiment({**p, "aliases": '{"car": "tench"}'})
    for m in MODALITIES:
        for split, name in (("train", "Fish"), ("test", "fish"), ("test", "tench")):
            (tmp_path / m / split / name).mkdir(parents=True)
            Image.new("L", (40, 40)).save(tmp_path / m / split / name / "1.png")
            p[f"{m}_{split}"] = str(tmp_path / m / split)
    with pytest.raises(ValueError, match=r"photo of 1 of 2 .*\['tench'\].*does without it$"):
        check_start({**p, "dataset": "folders"})


@pytest.mark.parametrize("classes", [21, 126])
def test_any_number_of_classes_starts_with_the_defaults(tmp_path, classes):
    names = [f"class {i}" for i in range(classes)]
    for preset in ("dfsbir", "open", "paper"):
        setup, configs = prepare_experiment(parameters(tmp_path, preset=preset))
        found = setup.rehearse(configs.values(), dict.fromkeys(MODALITIES, names))
        assert len(found.classes) == classes


def test_checks_change_no_random_number(tmp_path):
    state = torch.get_rng_state()
    check_start(parameters(tmp_path / "run"))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_teacher_that_is_brought_along(tmp_path):
    file = tmp_path / "photo.safetensors"
    own = trained_teacher(file, RECIPE, PHOTO, ToyData(60, 40, 28))
    setup = Setup.of(parameters(tmp_path, photo_teacher=str(file)))
    assert setup.trained == [SKETCH]
    assert weights_digest(setup.teacher(PHOTO, "unused")) == weights_digest(own)
    bare = RECIPE.untrained(SKETCH, list(TOY_CLASSES))
    save_teacher(bare, tmp_path / "sketch.safetensors")
    card = {
        "classes": list(TOY_CLASSES),
        "input": bare.normalizer.card(),
        "source": "dfsbir",
        "name": "tiny",
    }
    p = parameters(tmp_path, sketch_teacher=str(tmp_path / "sketch.safetensors"))
    setup = Setup.of({**p, "sketch_card": json.dumps(card)})
    assert weights_digest(setup.teacher(SKETCH, "unused")) == weights_digest(bare)


# ---- runs


def test_a_run_folder_without_results_is_begun_anew(tmp_path):
    p = parameters(tmp_path / "run")
    _, configs = prepare_experiment(p)
    open_run(p, configs["dfsbir"]).close()
    other = {**p, "seed": 1}
    _, configs = prepare_experiment(other)
    open_run(other, configs["dfsbir"]).close()
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["parameters"]["seed"] == config["parameters"]["crossx.seed"] == 1


def test_a_run_folder_with_results_lists_the_differences(tmp_path):
    p = parameters(tmp_path / "run")
    _, configs = prepare_experiment(p)
    run = open_run(p, configs["dfsbir"])
    run.log(1, loss=0.5)
    run.close()
    other = {**p, "seed": 1, "changes": '{"students.lr": 0.5}'}
    _, configs = prepare_experiment(other)
    with pytest.raises(ValueError) as e:
        open_run(other, configs["dfsbir"])
    for name in ("seed: 0 there, 1 here", "crossx.students.lr", "changes"):
        assert name in str(e.value)
    moved = {**p, "results": "elsewhere.csv"}
    open_run(moved, prepare_experiment(moved)[1]["dfsbir"]).close()


def test_pairs_are_taken_from_a_run_that_is_there(tmp_path):
    parameters = {"preset": "cold", "run_folder": str(tmp_path / "run"), "changes": ""}
    everything = {p.name: p.default for p in notebook_parameters()}
    for given, error, named in (
        ({"pairs_from": str(tmp_path)}, FileNotFoundError, "pairs_from"),
        ({"pairs_from": str(tmp_path), "preset": "both"}, ValueError, "both"),
    ):
        with pytest.raises(error, match=named):
            prepare_experiment({**everything, **parameters, **given})
