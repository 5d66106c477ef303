"""dfsbir teacher: from class folders, or the toy set, to a file with a card."""

import numpy as np
from app.helpers import SIDE, call, fails

from dfsbir.core.checkpoint import read_card
from dfsbir.core.privacy import guarantee_of
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


def test_teacher_with_canaries(tmp_path, capsys):
    out = tmp_path / "t.safetensors"
    brief = ("--images", 20, "--epochs", 1, "--canaries", 1, 2)
    assert call("teacher", "sketch", "toy", out, *brief, *TINY) == 0
    assert f"{20 + 8 * 3} sketch images" in capsys.readouterr().out
    assert tuple(load_teacher(out).card["canaries"]["times"]) == (1, 2)


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


def test_private_teacher(tmp_path, capsys):
    out = tmp_path / "t.safetensors"
    brief = ("--images", 60, "--epochs", 1, "--batch", 20, "--multiplicity", 1)
    private = ("--epsilon", 6, "--delta", 1e-4, "--size", SIDE, "--net", "tiny-gn")
    assert call("teacher", "sketch", "toy", out, *brief, *private, "--device", "cpu") == 0
    text, teacher = capsys.readouterr().out, load_teacher(out)
    guarantee, _ = guarantee_of(teacher.card, teacher.digest())
    assert guarantee.epsilon <= 6 and guarantee.delta == 1e-4
    assert str(guarantee) in text and "public: nothing" in text
    assert teacher.card["privacy"]["steps"] == 3


def test_private_teacher_mistakes(tmp_path, capsys):
    few = ("teacher", "photo", "toy", tmp_path / "t.safetensors", "--images", 40, "--epsilon", 8)
    assert "BatchNorm2d" in fails(capsys, *few, "--batch", 20, *TINY)
    assert "1/40" in fails(capsys, *few, "--delta", 0.1, "--size", SIDE)
    head = ("teacher", "photo", "toy", tmp_path / "t.safetensors", "--head-only")
    assert "--epsilon" in fails(capsys, *head, "--images", 40)
    assert "public" in fails(capsys, *head, "--images", 40, "--epsilon", 8)


def test_teacher_on_quickdraw_bitmaps(tmp_path):
    random = np.random.default_rng(0)
    for word, rows in (("up", slice(0, 14)), ("down", slice(14, 28))):
        drawings = np.zeros((40, 28, 28), np.uint8)
        drawings[:, rows] = random.integers(0, 256, (40, 14, 28))
        np.save(tmp_path / f"{word}.npy", drawings.reshape(40, 784))
    out = tmp_path / "q.safetensors"
    words = ("--net", "grey", "--size", 28, "--epochs", 1, "--device", "cpu")
    assert call("teacher", "sketch", tmp_path, out, *words) == 0
    assert load_teacher(out).classes == ["down", "up"]
