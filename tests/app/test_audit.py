"dfsbir audit: teachers, encoders and runs, against members and non-members."

import json

import pytest
from app.helpers import call, fails
from torchvision.utils import save_image

from dfsbir.data.toy import toy_pairs
from dfsbir.data.toy_shapes import TOY_CLASSES
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
    private = train_private_teacher(members, SHORT, "tiny-gn", progress=False)
    save_teacher(private, top / "private.safetensors")
    return top


def audit(place, target, *options):
    sets = ("--members", place / "members", "--non-members", place / "others")
    return call("audit", place / target, *sets, *options, "--device", "cpu")


def test_a_planted_leak_and_a_private_teacher(place, capsys):
    found = {}
    for name in ("leaky", "private"):
        assert audit(place, f"{name}.safetensors", "--json", "-") == 0
        found[name] = json.loads(capsys.readouterr().out)
    leaky, private = (found[name]["attacks"]["teacher, loss"] for name in ("leaky", "private"))
    assert leaky["auc_low"] > 0.5
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


def test_audit_mistakes(place, capsys):
    sets = ("--members", place / "members", "--non-members", place / "others")
    file = place / "leaky.safetensors"
    assert "photo" in fails(capsys, "audit", file, *sets, "--modality", "sketch")
    assert "--sheet" in fails(capsys, "audit", file, *sets, "--sheet", place / "s.png")
    assert "even" in fails(capsys, "audit", file, *sets, "--references", 3)
    nothing = ("--members", place / "none", "--non-members", place / "others")
    assert "none" in fails(capsys, "audit", file, *nothing)
