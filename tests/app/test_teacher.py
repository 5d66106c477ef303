"""dfsbir teacher: from class folders, or the toy set, to a file with a card."""

from app.helpers import SIDE, call, fails

from dfsbir.core.checkpoint import read_card
from dfsbir.data.toy_shapes import TOY_CLASSES
from dfsbir.teachers.loading import load_teacher

TINY = ("--size", SIDE, "--net", "tiny", "--device", "cpu")


def test_teacher_on_toy(tmp_path, capsys):
    out = tmp_path / "t" / "sketch.safetensors"
    toy = ("--images", 100, "--epochs", 2, "--test", "toy")
    assert call("teacher", "sketch", "toy", out, *toy, *TINY) == 0
    text, card = capsys.readouterr().out, read_card(out)
    assert f"test {card['accuracy']['test']:.3f}" in text
    assert set(card["accuracy"]) == {"validation", "test"}
    assert load_teacher(out).classes == list(TOY_CLASSES)


def test_teacher_on_folders(folders):
    out = folders / "t.safetensors"
    brief = ("--epochs", 1, "--batch", 2)
    assert call("teacher", "photo", folders / "photo", out, *brief, *TINY) == 0
    assert load_teacher(out).classes == sorted(TOY_CLASSES)
    assert "test" not in read_card(out)["accuracy"]


def test_teacher_mistakes(tmp_path, capsys):
    out = tmp_path / "t.safetensors"
    assert "none" in fails(capsys, "teacher", "photo", tmp_path / "none", out)
    assert "t.safetensors" in fails(capsys, "teacher", "photo", "toy", tmp_path / "t.pth")
    few = ("--images", 40, *TINY)
    assert "keras" in fails(capsys, "teacher", "photo", "toy", out, *few, "--net", "keras/x")
