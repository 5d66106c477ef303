"""dfsbir evaluate: the figures of the report, for run folders, files, aliases and ONNX."""

import json

import pytest
from app.helpers import SIDE, call, fails
from PIL import Image, ImageOps

from dfsbir.app.inputs import find_encoders, read_images
from dfsbir.core.types import MODALITIES, Modality
from dfsbir.data.toy import toy_pairs
from dfsbir.data.toy_shapes import TOY_CLASSES
from dfsbir.evaluation.report import evaluate_retrieval
from dfsbir.evaluation.retrieval import embed
from dfsbir.students.encoder import load_encoders

CPU = ("--device", "cpu")


def test_find_encoders(run, tmp_path):
    assert find_encoders(run) == find_encoders(run / "encoders") == run / "encoders"
    with pytest.raises(FileNotFoundError, match=tmp_path.name):
        find_encoders(tmp_path)


def test_evaluate_on_toy_is_the_report(run, tmp_path, capsys):
    assert call("evaluate", run, "--images", 40, "--json", tmp_path / "r.json", *CPU) == 0
    text, got = capsys.readouterr().out, json.loads((tmp_path / "r.json").read_text())
    encoders = load_encoders(run / "encoders")
    photos, sketches = toy_pairs(40, size=SIDE, split="test")
    report = evaluate_retrieval(
        embed(encoders["sketch"], sketches),
        embed(encoders["photo"], photos),
        sketches.labels,
        photos.labels,
        classes=list(TOY_CLASSES),
    )
    assert got["metrics"] == pytest.approx(report.metrics)
    assert got["queries"] == got["gallery"] == 40
    assert f"{report.metrics['mAP@all']:.3f}" in text and all(c in text for c in TOY_CLASSES)


def test_evaluate_files_on_folders_with_an_alias(run, folders, capsys):
    (folders / "photo" / TOY_CLASSES[0]).rename(folders / "photo" / "zeppelin")
    words = []
    for m in MODALITIES:
        words += [f"--{m}-encoder", run / "encoders" / f"{m}.safetensors"]
    words += ["--photos", folders / "photo", "--sketches", folders / "sketch", *CPU]
    assert call("evaluate", *words) == 0
    assert "2 of 20 photo images" in capsys.readouterr().err
    aliases = json.dumps({"zeppelin": TOY_CLASSES[0]})
    assert call("evaluate", *words, "--aliases", aliases) == 0
    assert "left out" not in capsys.readouterr().err


def test_sketches_of_folders_are_normalised(run, folders, capsys):
    "What was changed is counted; the figures are those of the clean drawings, but for rounding."
    words = ("evaluate", run, "--photos", folders / "photo", "--sketches", folders / "sketch")
    assert call(*words, *CPU) == 0
    assert "canonical" not in capsys.readouterr().err
    for file in sorted((folders / "sketch").rglob("*.png"))[::2]:
        with Image.open(file) as image:
            ImageOps.invert(image.convert("L")).save(file)
    assert call(*words, *CPU) == 0
    text = capsys.readouterr().err
    assert "10 of 20 sketches" in text and "inverted 10" in text


def test_evaluate_exports_onnx(run, tmp_path, capsys):
    assert call("evaluate", run, "--images", 20, "--onnx", tmp_path / "o", *CPU) == 0
    names = sorted(p.name for p in (tmp_path / "o").iterdir())
    assert names == ["photo.onnx", "sketch.onnx"] and "onnxruntime" in capsys.readouterr().err


def test_evaluate_mistakes(run, folders, capsys):
    photo, sketch = (run / "encoders" / f"{m}.safetensors" for m in MODALITIES)
    pair = ("--photo-encoder", photo, "--sketch-encoder", sketch)
    swapped = ("--photo-encoder", sketch, "--sketch-encoder", photo)
    for words, fact in (
        ([], "run folder"),
        (["--photo-encoder", photo], "run folder"),
        ([run, *pair], "run folder"),
        (swapped, "photo"),
        ([run, "--photos", folders / "photo"], "sketches"),
        ([run, "--aliases", "{x}"], "alias"),
    ):
        assert fact in fails(capsys, "evaluate", *words)


def test_json_on_request_is_all_that_is_printed(run, folders, capsys):
    "Whatever else there is to say goes to the error stream."
    (folders / "photo" / TOY_CLASSES[0]).rename(folders / "photo" / "zeppelin")
    words = ("--photos", folders / "photo", "--sketches", folders / "sketch")
    assert call("evaluate", run, *words, "--json", "-", *CPU) == 0
    printed = capsys.readouterr()
    content = json.loads(printed.out)
    assert content["gallery"] == 18 and "2 of 20" in printed.err
    assert {"metrics", "floor", "ceiling", "per_class", "R_min"} <= set(content)


def test_the_table_fits_a_terminal_and_explains_its_bound_once(run, capsys):
    assert call("evaluate", run, "--images", 40, *CPU) == 0
    text = capsys.readouterr().out
    assert "|" not in text and text.count("R_min") == 1
    assert all(len(line) <= 100 for line in text.splitlines())


@pytest.mark.parametrize("modality", ["photo", "sketch"])
def test_a_broken_image_stops_or_is_left_out(modality, run, folders, capsys):
    file = next((folders / modality).rglob("*.png"))
    file.write_text("no image")
    words = ("evaluate", run, "--photos", folders / "photo", "--sketches", folders / "sketch")
    text = fails(capsys, *words, *CPU)
    assert file.name in text and "--on-error skip" in text
    assert call(*words, "--on-error", "skip", *CPU) == 0
    printed = capsys.readouterr()
    assert f"1 broken {modality}" in printed.err and "mAP@all" in printed.out


def test_sketches_are_redrawn_with_the_pen_of_the_encoder(folders):
    plain = read_images(folders / "sketch", Modality.SKETCH, 64)
    wide = read_images(folders / "sketch", Modality.SKETCH, 64, normalise=True, pen=0.1)
    assert wide.images().mean() < plain.images().mean() and list(wide.classes) == plain.classes
