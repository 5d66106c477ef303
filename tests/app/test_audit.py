"dfsbir audit: teachers, encoders and runs, against members and non-members."

import json
from dataclasses import asdict, replace

import pytest
from app.helpers import call, fails
from torchvision.utils import save_image

from dfsbir.data.toy import toy_pairs
from dfsbir.data.toy_shapes import TOY_CLASSES
from dfsbir.evaluation.memorisation import CanaryPlan
from dfsbir.explore.runs import tiny_run
from dfsbir.teachers.loading import save_teacher
from dfsbir.teachers.private_training import PrivateRecipe, train_private_teacher
from dfsbir.teachers.training import train_teacher

CLASSES = list(TOY_CLASSES[:3])
SHORT = PrivateRecipe(
    None, noise_multiplier=2.0, epochs=2, batch_size=15, multiplicity=1, accountant="rdp"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "Folders of members and of other images, and a teacher that was fitted to the members."
    top = tmp_path_factory.mktemp("audit")
    for name, seed in (("members", 0), ("others", 5)):
        images = toy_pairs(45, 32, seed=seed, classes=CLASSES)[0]
        for i, (image, label) in enumerate(zip(images.images(), images.labels, strict=True)):
            folder = top / name / CLASSES[label]
            folder.mkdir(parents=True, exist_ok=True)
            save_image(image, folder / f"{i}.png")
    members = toy_pairs(45, 32, seed=0, classes=CLASSES)[0]
    how = dict(epochs=40, augment=False, weight_decay=0.0, progress=False)
    save_teacher(train_teacher(members, members, **how), top / "leaky.safetensors")
    private = dict(net="tiny-gn", progress=False)
    save_teacher(train_private_teacher(members, SHORT, **private), top / "private.safetensors")
    known = train_private_teacher(members, SHORT, noise_seed=0, **private)
    save_teacher(known, top / "known.safetensors")
    return top


def audit(place, target, *options):
    sets = ("--members", place / "members", "--non-members", place / "others")
    return call("audit", place / target, *sets, *options, "--device", "cpu")


def test_a_planted_leak_and_a_private_teacher(place, capsys):
    found = {}
    for name in ("leaky", "private", "known"):
        assert audit(place, f"{name}.safetensors", "--json", "-") == 0
        found[name] = json.loads(capsys.readouterr().out)
    attacks = {name: f["attacks"]["teacher, loss"] for name, f in found.items()}
    assert attacks["leaky"]["auc_low"] > 0.8
    private = attacks["known"]  # noise from a seed: secret noise leaves the interval in 1 of 20
    assert private["auc_low"] < 0.5 < private["auc_high"]
    assert "none" in found["leaky"]["promised"][0] and "epsilon" in found["private"]["promised"][0]


def test_reference_teachers(place, capsys):
    file = place / "found.json"
    assert audit(place, "leaky.safetensors", "--references", 2, "--json", file) == 0
    assert "teacher, likelihood ratio" in capsys.readouterr().out
    assert json.loads(file.read_text())["attacks"]["teacher, likelihood ratio"]["members"] == 45


def test_a_run_with_estimates(place, capsys):
    tiny_run(place / "run", CLASSES, images=45, epochs=1, warmup=3, student_steps=1)
    features = ("--features", place / "leaky.safetensors")
    sheet = place / "sheet.png"
    assert audit(place, "run", *features, "--sheet", sheet, "--json", place / "run.json") == 0
    text, found = capsys.readouterr().out, json.loads((place / "run.json").read_text())
    names = {"teacher, loss", "encoder, loss", "estimates, pixels", "estimates, features"}
    assert set(found["attacks"]) == names
    assert all(name in text for name in names) and sheet.is_file()
    assert set(found["memorisation"]) == {"pixels", "features"}
    assert audit(place, "run/encoders/photo.safetensors") == 0
    assert "encoder, loss" in capsys.readouterr().out


@pytest.fixture(scope="module")
def canaries(tmp_path_factory):
    "Two runs whose photo teachers saw canaries once and eight times, and their audits."
    top = tmp_path_factory.mktemp("canaries")
    plan = CanaryPlan((1, 8), each=8, unused=60)
    photos, sketches = toy_pairs(90, 32, seed=0, classes=CLASSES)
    infected = plan.insert(photos)
    noise = replace(SHORT, noise_multiplier=4.0)
    sketch = train_teacher(sketches, epochs=3, progress=False)
    made = {
        "as usual": train_teacher(infected, photos, epochs=8, augment=False, progress=False),
        "private": train_private_teacher(infected, noise, "tiny-gn", noise_seed=0, progress=False),
    }
    found = {}
    for name, teacher in made.items():
        teacher.card["canaries"] = asdict(plan)
        changes = {} if name == "as usual" else {"pairs.loss.bn": 0.0}
        short = dict(warmup=4, student_steps=1, teachers=(teacher, sketch), changes=changes)
        tiny_run(top / name, CLASSES, **short)
        toy = ("--members", "toy", "--non-members", "toy", "--images", 60, "--device", "cpu")
        assert call("audit", top / name, *toy, "--json", top / "found.json") == 0
        found[name] = json.loads((top / "found.json").read_text())["canaries"]
    return found


def test_a_run_is_audited_for_its_canaries(canaries):
    "By loss, by estimates and by rank in the gallery, for each number of copies."
    names = ("teacher, loss", "encoder, loss", "estimates, pixels", "encoder, rank in the gallery")
    for found in canaries.values():
        assert set(found) == {f"{name}, {times} times" for name in names for times in (1, 8)}
        assert all(a["members"] == 8 and a["others"] == 60 for a in found.values())


def test_canaries_of_a_usual_teacher_are_found_and_those_of_a_private_one_are_not(canaries):
    usual, private = canaries["as usual"], canaries["private"]
    for name in ("teacher", "encoder"):
        assert usual[f"{name}, loss, 8 times"]["auc_low"] > 0.8
        for times in (1, 8):
            found = private[f"{name}, loss, {times} times"]
            assert found["auc_low"] < 0.5 < found["auc_high"]


def test_audit_mistakes(place, capsys):
    sets = ("--members", place / "members", "--non-members", place / "others")
    file = place / "leaky.safetensors"
    assert "photo" in fails(capsys, "audit", file, *sets, "--modality", "sketch")
    assert "--sheet" in fails(capsys, "audit", file, *sets, "--sheet", place / "s.png")
    assert "even" in fails(capsys, "audit", file, *sets, "--references", 3)
    nothing = ("--members", place / "none", "--non-members", place / "others")
    assert "none" in fails(capsys, "audit", file, *nothing)
