"""The steps of an experiment: what is found before anything long, and what is never done twice."""

import json
import threading

import numpy as np
import pytest
import torch
from torchvision.utils import save_image

from dfsbir.app.parameters import notebook_parameters
from dfsbir.core.config import ConfigError
from dfsbir.core.types import MODALITIES, Modality
from dfsbir.crossx.experiment import (
    FolderData,
    Record,
    Setup,
    TeacherRecipe,
    ToyData,
    alternative_images,
    append_once,
    chance_warning,
    check_start,
    embed_test,
    group_classes,
    is_near_chance,
    open_run,
    plan_questions,
    prepare_experiment,
    read_names,
    result_rows,
    show_classes,
    split_changes,
    teacher_classes,
    trained_teacher,
    whole_question,
)
from dfsbir.crossx.trainer import weights_digest
from dfsbir.data.pen import measure_pen
from dfsbir.data.toy import toy_pairs
from dfsbir.data.toy_shapes import TOY_CLASSES, TOY_HELD_OUT
from dfsbir.evaluation.results import read_results
from dfsbir.teachers.class_map import align_classes, to_shared
from dfsbir.teachers.loading import save_teacher

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


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    "Class folders of toy images, by split and modality."
    top = tmp_path_factory.mktemp("folders")
    for split in ("train", "test"):
        for m, data in zip(
            MODALITIES, toy_pairs(12, size=28, classes=TOY_CLASSES[:3], split=split)
        ):
            for i, (x, label) in enumerate(data):
                folder = top / split / m / TOY_CLASSES[label]
                folder.mkdir(parents=True, exist_ok=True)
                save_image(x, folder / f"{i}.png")
    return top


def folder_data(folders, **without):
    train = {m: str(folders / "train" / m) for m in MODALITIES}
    return FolderData(train, {m: str(folders / "test" / m) for m in MODALITIES}, 28)


# ---- images


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


def test_folders(folders):
    data = folder_data(folders)
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


# ---- teachers


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


def test_a_key_stands_for_all_that_decides_the_weights(folders):
    data, classes = ToyData(60, 40, 28), list(TOY_CLASSES)
    keys = {
        RECIPE.key(PHOTO, data, classes),
        RECIPE.key(SKETCH, data, classes),
        RECIPE.key(PHOTO, data, classes[:5]),
        RECIPE.key(PHOTO, ToyData(70, 40, 28), classes),
        RECIPE.key(PHOTO, ToyData(60, 40, 32), classes),
        RECIPE.key(PHOTO, folder_data(folders), classes),
        TeacherRecipe(net="tiny", epochs=2, batch_size=20, size=28).key(PHOTO, data, classes),
    }
    assert len(keys) == 7
    assert RECIPE.key(PHOTO, ToyData(60, 90, 28), classes) in keys, "test images do not matter"
    before = RECIPE.key(PHOTO, folder_data(folders), classes)
    extra = folders / "train" / "photo" / TOY_CLASSES[0] / "extra.png"
    save_image(torch.rand(3, 28, 28), extra)
    assert RECIPE.key(PHOTO, folder_data(folders), classes) != before
    extra.unlink()


def test_two_that_want_the_same_teacher_train_it_once(tmp_path, monkeypatch):
    import dfsbir.crossx.experiment as module

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


def test_a_teacher_whose_training_failed_leaves_its_folder_empty(tmp_path, monkeypatch):
    "So the run folder has no results, and another config may begin it anew."

    def fail(*args, **options):
        raise FloatingPointError("the loss is nan")

    monkeypatch.setattr("dfsbir.crossx.experiment.train_teacher", fail)
    data, file = ToyData(60, 40, 28), tmp_path / "teachers" / "photo.safetensors"
    with pytest.raises(FloatingPointError):
        trained_teacher(file, RECIPE, PHOTO, data)
    assert not list(file.parent.iterdir())


def test_layers_that_the_net_does_not_have_are_found_before_training(tmp_path):
    changes = {
        "students.head.kind": "intermediate",
        "students.head.layers": "blocks.7.bn1",
        "students.loss.infonce": 0,
    }
    p = parameters(tmp_path / "run", preset="open", changes=json.dumps(changes))
    with pytest.raises(ValueError, match="blocks.7.bn1"):
        check_start(p)


def test_teachers_without_a_class_in_common_are_found_before_training(folders, tmp_path):
    setup = Setup.of(parameters(tmp_path))
    with pytest.raises(ValueError, match="share no class"):
        setup.rehearse([], {PHOTO: list(TOY_CLASSES[:3]), SKETCH: list(TOY_CLASSES[4:6])})


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


def test_stages_are_remembered(tmp_path, capsys):
    record = Record(tmp_path)
    with record.stage("first"):
        pass
    with pytest.raises(RuntimeError), record.stage("second"):
        raise RuntimeError
    again = Record(tmp_path)
    assert again["done"] == ["first"] and again["run_id"] == record["run_id"]
    assert set(again["seconds"]) == {"first", "second"}
    seconds = again["seconds"]["first"]
    with again.stage("first"):
        pass
    assert Record(tmp_path)["seconds"]["first"] == seconds, "what is done before does not count"
    with again.stage("second"):
        pass
    assert Record(tmp_path)["done"] == ["first", "second"]
    assert "second" in capsys.readouterr().out


# ---- teachers near chance


@pytest.mark.parametrize("classes", [2, 7, 10, 345, 1000])
@pytest.mark.parametrize("images", [200, 5000])
def test_guessing_is_near_chance_and_knowing_is_not(classes, images):
    "A net that guesses is found by all seeds; twice chance and a fifth of the way are beyond it."
    torch.manual_seed(0)
    for _ in range(20):
        right = torch.randint(classes, (images,)) == torch.randint(classes, (images,))
        assert is_near_chance(right.float().mean().item(), images, classes)
    assert not is_near_chance(max(2.5 / classes, 1 / classes + 0.2), images, classes)
    assert not is_near_chance(1.0, images, classes)


@pytest.mark.parametrize(
    "accuracy, near", [(0.0, True), (0.16, True), (0.37, False), (0.82, False)]
)
def test_what_users_met_is_told_apart(accuracy, near):
    "A net of 82% that fell to 16% of seven classes by a wrong mean and std."
    assert is_near_chance(accuracy, 5000, 7) == near
    assert bool(chance_warning(PHOTO, accuracy, 5000, 7)) == near


@pytest.mark.parametrize("modality", MODALITIES)
def test_a_warning_says_what_was_found_what_chance_is_and_what_to_check(modality):
    text = chance_warning(modality, 0.163, 500, 7)
    for fact in (f"{modality} teacher", "16.3%", "500", "14.3%", "mean and std", "order"):
        assert fact in text, fact
    assert ("white on black" in text) == (modality == SKETCH)
    estimates = chance_warning(modality, 0.163, 80, 7, estimates=True)
    assert "own 80 estimates" in estimates and "pairs.warmup_steps" in estimates


def test_warnings_are_kept_for_the_report_and_looked_for_anew(tmp_path, capsys):
    record = Record(tmp_path)
    record.warn("the teacher guesses")
    assert "WARNING: the teacher guesses" in capsys.readouterr().out
    kept = json.loads((tmp_path / "record.json").read_text())
    assert kept["warnings"] == ["the teacher guesses"]
    assert Record(tmp_path)["warnings"] == []


# ---- questions and rows


def test_classes_in_common_are_a_line_where_each_is_one_of_both():
    same = align_classes(["cup", "fish"], ["fish", "cup"])
    text = show_classes(same)._repr_markdown_()
    assert "2 shared classes" in text and "|" not in text and "fish, cup" in text
    some = align_classes(["cup", "fish", "car"], ["fish", "cup", "trees"])
    text = show_classes(some)._repr_markdown_()
    assert "car" in text and "trees" in text and "|" not in text
    many = align_classes(["cup", "mug", "fish"], ["cup", "fish"], {"mug": "cup"})
    assert show_classes(many) is many


def photo_and_sketch_classes():
    return TOY_CLASSES[:6], (*TOY_CLASSES[2:6], TOY_CLASSES[7])


@pytest.fixture(scope="module")
def asked():
    "Class map, groups, test images and questions of teachers that share four of seven classes."
    unseen = list(TOY_HELD_OUT[:2])
    class_map = align_classes(*photo_and_sketch_classes())
    groups = group_classes(class_map, {}, unseen)
    names = [c for g in groups.values() for c in g]
    found = ToyData(60, 40, 28).test(names, unseen)
    test = {m: to_shared(found[m], names) for m in MODALITIES}
    return groups, names, test, plan_questions("toy", groups, test)


def test_groups_of_classes(asked):
    groups, _, _, _ = asked
    photo, sketch = map(set, photo_and_sketch_classes())
    assert set(groups["shared"]) == photo & sketch
    assert set(groups["photo-only"]) == photo - sketch
    assert set(groups["sketch-only"]) == sketch - photo
    assert groups["unseen"] == list(TOY_HELD_OUT[:2])


def test_a_class_in_two_groups_is_named():
    class_map = align_classes(*photo_and_sketch_classes())
    with pytest.raises(ValueError, match=TOY_CLASSES[3]):
        group_classes(class_map, {}, [TOY_CLASSES[3]])


def test_questions_against_a_slow_loop(asked):
    groups, names, test, questions = asked
    known = [c for g in ("shared", "photo-only", "sketch-only") for c in groups[g]]
    wanted = {
        "toy": (groups["shared"], groups["shared"]),
        "toy/all": (known, known),
        "toy/photo-only": (groups["photo-only"], known),
        "toy/sketch-only": (groups["sketch-only"], known),
        "toy/unseen": (groups["unseen"], groups["unseen"]),
    }
    assert [q.dataset for q in questions] == list(wanted)
    for q in questions:
        for m, classes in zip((SKETCH, PHOTO), wanted[q.dataset]):
            slow = [i for i, k in enumerate(test[m].labels.tolist()) if names[k] in classes]
            assert q.places[m].tolist() == slow


def test_answers_are_measured_among_the_asked_images_alone(asked):
    _, names, test, questions = asked
    space = {m: torch.nn.functional.one_hot(test[m].labels, len(names)).float() for m in MODALITIES}
    for q in questions:
        report = q.ask(space, test)
        assert report.metrics["mAP@all"] == 1.0 and report.classes == names
        assert len(report.query_labels) == len(q.places[SKETCH])
    whole = whole_question("toy", test)
    assert len(whole.places[PHOTO]) == len(test[PHOTO])


def test_a_class_without_test_images_is_named(asked):
    groups, names, test, _ = asked
    without = {**test, SKETCH: test[SKETCH].take(test[SKETCH].labels != 0)}
    with pytest.raises(ValueError, match=names[0]):
        plan_questions("toy", groups, without)


def test_rows_are_appended_once(tmp_path):
    metrics = {
        ("random", ""): {"mAP@all": 0.1, "Prec@100": 0.2, "Prec@200": 0.3},
        ("crossx-dfsbir", "x"): {"mAP@all": 0.5, "Prec@100": 0.6, "Prec@200": 0.7},
    }
    rows = result_rows("toy", metrics, {("crossx-dfsbir", "x"): 9.0}, 1, "cpu", "run-1")
    file = tmp_path / "shared" / "results.csv"
    append_once(file, rows)
    append_once(file, rows)
    found = read_results(file)
    assert len(found) == 6 and {r["seconds"] for r in found} == {0.0, 9.0}
    assert {(r["method"], r["variant"], r["seed"]) for r in found} == {
        ("random", "", 1),
        ("crossx-dfsbir", "x", 1),
    }


def test_embeddings_of_the_test_images(asked):
    from dfsbir.core.device import make_fabric

    _, names, test, _ = asked
    encoders = {m: RECIPE.untrained(m, names).net for m in MODALITIES}

    class Encoder(torch.nn.Module):
        def __init__(self, modality):
            super().__init__()
            self.net, self.modality = encoders[modality], modality

        def forward(self, x):
            return self.net(x.expand(-1, 3, -1, -1))

    space = embed_test({m: Encoder(m).eval() for m in MODALITIES}, test, make_fabric("cpu"))
    assert [len(space[m]) for m in MODALITIES] == [len(test[m]) for m in MODALITIES]
    assert Modality.PHOTO in space


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


def test_pairs_are_taken_from_a_run_that_is_there(tmp_path):
    parameters = {"preset": "cold", "run_folder": str(tmp_path / "run"), "changes": ""}
    everything = {p.name: p.default for p in notebook_parameters()}
    for given, error, named in (
        ({"pairs_from": str(tmp_path)}, FileNotFoundError, "pairs_from"),
        ({"pairs_from": str(tmp_path), "preset": "both"}, ValueError, "both"),
    ):
        with pytest.raises(error, match=named):
            prepare_experiment({**everything, **parameters, **given})
