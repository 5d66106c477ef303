"""The dfsbir command: help for newcomers, one line for a mistake, files that come out."""

import json
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from PIL import Image

from dfsbir.app.cli import failed_cell, find_encoders, main, notebook_of_papermill, write_report
from dfsbir.app.parameters import (
    Parameter,
    check_cells,
    check_values,
    find_notebook,
    notebook_parameters,
    parse_value,
    read_parameters,
    read_table,
)
from dfsbir.core.checkpoint import read_card
from dfsbir.core.types import MODALITIES, Normalizer
from dfsbir.data.toy import toy_pairs
from dfsbir.data.toy_shapes import TOY_CLASSES
from dfsbir.evaluation.report import evaluate_retrieval
from dfsbir.evaluation.retrieval import embed
from dfsbir.search.searcher import Searcher
from dfsbir.students.encoder import encoder_from_teacher, load_encoders, save_encoders
from dfsbir.students.heads import MetricSpace
from dfsbir.teachers.class_map import align_classes
from dfsbir.teachers.loading import load_teacher
from dfsbir.teachers.nets import build_net
from dfsbir.teachers.teacher import Teacher


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A run folder with a pair of (untrained) encoders."
    folder, classes = tmp_path_factory.mktemp("run"), list(TOY_CLASSES)
    torch.manual_seed(0)
    teachers = {
        m: Teacher(
            build_net("dfsbir", "tiny", 10),
            classes,
            Normalizer(28),
            m,
            card=dict(source="dfsbir", name="tiny"),
        )
        for m in MODALITIES
    }
    space = MetricSpace.random(10, 12)
    save_encoders(
        folder / "encoders",
        {
            m: encoder_from_teacher(teachers[m], align_classes(classes, classes), space)
            for m in MODALITIES
        },
    )
    return folder


@pytest.fixture
def folders(tmp_path):
    "Toy test images as class folders, and the folder they are in."
    from torchvision.utils import save_image

    for m, data in zip(MODALITIES, toy_pairs(20, size=28, split="test")):
        for i in range(20):
            place = tmp_path / m / TOY_CLASSES[i % 10]
            place.mkdir(parents=True, exist_ok=True)
            save_image(data[i][0], place / f"{i}.png")
    return tmp_path


def fails(capsys, *words):
    "What a mistake says: no traceback, exit code 2."
    assert main([str(w) for w in words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("dfsbir: ") and "Traceback" not in said
    return said


# ---- help


@pytest.mark.parametrize(
    "command, words",
    [
        ("run", ["-p", "run_folder", "papermill" * 0, "example"]),
        ("teacher", ["--test", "--net", "example"]),
        ("evaluate", ["--photos", "--onnx", "--json", "examples"]),
        ("index", ["--gallery", "--workers", "--approximate", "runs/toy", "examples"]),
        ("search", ["--label", "--sheet", "--json", "strokes", "examples"]),
    ],
)
def test_help(capsys, command, words):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and all(w in text for w in words)


def test_run_help_lists_every_parameter_with_its_comment(capsys):
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    text = capsys.readouterr().out
    for p in notebook_parameters():
        assert p.comment and f"{p.name} = {json.dumps(p.default)}\n      {p.comment}" in text


def test_no_command_and_unknown_ones(capsys):
    for words in ([], ["fly"], ["evaluate", "--fly"]):
        with pytest.raises(SystemExit) as end:
            main(words)
        assert end.value.code == 2 and "usage" in capsys.readouterr().err


def test_as_a_process(tmp_path):
    "Exit code and message as a shell sees them."
    code = "import sys; from dfsbir.app.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, "evaluate", "nowhere"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode == 2
        and done.stderr.count("\n") == 1
        and "nowhere holds no encoders" in done.stderr
    )


def test_traceback_on_demand(tmp_path):
    with pytest.raises(FileNotFoundError):
        main(["--traceback", "evaluate", str(tmp_path)])


# ---- parameters


def test_the_parameters_cell_is_flat_and_typed():
    "One plain value a line with a comment; every kind can be told from a command line."
    parameters = notebook_parameters()
    assert len({p.name for p in parameters}) == len(parameters) and {
        "dataset",
        "seed",
        "run_folder",
        "preset",
    } <= {p.name for p in parameters}
    assert all(type(p.default) in (bool, int, float, str) and p.comment for p in parameters)
    cell = next(
        c
        for c in json.loads(find_notebook().read_text())["cells"]
        if "parameters" in c["metadata"].get("tags", [])
    )
    assert all(
        re.fullmatch(r"[a-z_]+ = \S.*  # \S.*", line.rstrip("\n"))
        or re.fullmatch(r"[a-z_]+ = .*\s# \S.*", line.rstrip("\n"))
        for line in cell["source"]
    )


def test_the_notebook_is_found(monkeypatch):
    assert find_notebook() == ROOT / "nbs" / "run_experiment.ipynb"
    with pytest.raises(FileNotFoundError, match="none.ipynb"):
        find_notebook("none.ipynb")


def test_check_values():
    ps = [
        Parameter("a", 1, ""),
        Parameter("b", 0.5, ""),
        Parameter("c", "x", ""),
        Parameter("d", True, ""),
    ]
    assert check_values(ps, {"b": 2, "d": False}) == {"a": 1, "b": 2, "c": "x", "d": False}
    for bad, says in (
        ({"e": 1}, "no parameter 'e'"),
        ({"a": 1.0}, "wants int"),
        ({"a": True}, "wants int"),
        ({"b": True}, "wants float"),
        ({"c": 3}, "wants str"),
        ({"d": 1}, "wants bool"),
        ({"d": None}, "wants bool"),
    ):
        with pytest.raises(ValueError, match=says):
            check_values(ps, bad)


def test_check_cells_sees_what_papermill_injected():
    cell = "a = 1  # one\nb = 'x'  # two"
    assert check_cells(["", cell, "# Parameters\na = 2\n", "import os\nzzz = 3"]) == {
        "a": 2,
        "b": "x",
    }
    assert check_cells(["", cell, "from x import y\ncheck(In)"]) == {"a": 1, "b": "x"}
    assert check_cells(["", cell, cell.replace("1", "5", 1)])["a"] == 5, (
        "a cell that was edited and run again"
    )
    with pytest.raises(ValueError, match="did you mean 'b'"):
        check_cells(["", cell, "# Parameters\nbb = 'y'\n"])
    with pytest.raises(ValueError, match="from its top"):
        check_cells(["", "import os"])


@pytest.mark.parametrize(
    "default, text, value",
    [
        (1, "-3", -3),
        (0.1, "1e-3", 1e-3),
        (0.1, "2", 2.0),
        ("", "2024", "2024"),
        ("", "", ""),
        (True, "false", False),
        (False, "True", True),
    ],
)
def test_parse_value(default, text, value):
    got = parse_value(Parameter("x", default, ""), text)
    assert got == value and type(got) is type(value)


def test_mistaken_parameters_end_before_anything_starts(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "did you mean 'seed'" in fails(capsys, "run", "-p", "sead", 1)
    assert "wants int" in fails(capsys, "run", "-p", "seed", "one")
    assert "true or false" in fails(capsys, "run", "-p", "ceiling", "maybe")
    assert not list(tmp_path.iterdir())


def test_a_missing_extra_is_named(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "papermill", None)
    assert "dfsbir[run]" in fails(capsys, "run")


def test_read_parameters_refuses_what_is_not_plain():
    with pytest.raises(ValueError):
        read_parameters("a = f(1)  # no")


def test_read_table(tmp_path):
    (tmp_path / "t.json").write_text('{"a": "b"}')
    assert read_table(str(tmp_path / "t.json"), "x") == read_table('{"a": "b"}', "x") == {"a": "b"}
    for bad in ("{a}", str(tmp_path / "none.json"), str(tmp_path)):
        with pytest.raises(ValueError, match="the table is JSON"):
            read_table(bad, "the table")


# ---- reports


def notebook(tmp_path, *cells):
    code = {"cell_type": "code", "metadata": {}, "execution_count": 3}
    nb = {
        "cells": [{"cell_type": "markdown", "metadata": {}, "source": ["# Title\n", "text"]}]
        + [code | {"source": [s], "outputs": o} for s, o in cells],
        "metadata": {},
        "nbformat": 4,
        "nbformat_minor": 4,
    }
    (tmp_path / "n.ipynb").write_text(json.dumps(nb))
    return tmp_path / "n.ipynb"


def test_failed_cell(tmp_path):
    assert failed_cell(notebook(tmp_path, ("1", []))) == ""
    error = {"output_type": "error", "ename": "ValueError", "evalue": "no", "traceback": []}
    assert (
        failed_cell(notebook(tmp_path, ("1", []), ("f()", [error])))
        == 'cell [3] under "Title" stopped: ValueError: no'
    )


def test_write_report(tmp_path):
    page = write_report(
        notebook(
            tmp_path,
            ("1 + 1", [{"output_type": "stream", "name": "stdout", "text": ["seen & shown"]}]),
        ),
        tmp_path / "out" / "r.html",
    ).read_text()
    assert "seen &amp; shown" in page and "Title" in page


def test_not_under_papermill():
    assert notebook_of_papermill() is None


# ---- teacher


def test_teacher_on_toy(tmp_path, capsys):
    out = tmp_path / "t" / "sketch.safetensors"
    assert (
        main(
            [
                "teacher",
                "sketch",
                "toy",
                str(out),
                "--images",
                "100",
                "--size",
                "28",
                "--net",
                "tiny",
                "--epochs",
                "2",
                "--test",
                "toy",
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    said, card = capsys.readouterr().out, read_card(out)
    assert f"test {card['accuracy']['test']:.3f}" in said and set(card["accuracy"]) == {
        "validation",
        "test",
    }
    assert load_teacher(out).classes == list(TOY_CLASSES)


def test_teacher_on_folders(folders, capsys):
    out = folders / "t.safetensors"
    assert (
        main(
            [
                "teacher",
                "photo",
                str(folders / "photo"),
                str(out),
                "--size",
                "28",
                "--net",
                "tiny",
                "--epochs",
                "1",
                "--batch",
                "2",
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    assert (
        load_teacher(out).classes == sorted(TOY_CLASSES)
        and "test" not in read_card(out)["accuracy"]
    )


def test_teacher_mistakes(tmp_path, capsys):
    assert "not a folder" in fails(
        capsys, "teacher", "photo", tmp_path / "none", tmp_path / "t.safetensors"
    )
    assert "t.safetensors" in fails(capsys, "teacher", "photo", "toy", tmp_path / "t.pth")
    assert "nets come from" in fails(
        capsys,
        "teacher",
        "photo",
        "toy",
        tmp_path / "t.safetensors",
        "--net",
        "keras/x",
        "--images",
        "40",
        "--size",
        "28",
    )


# ---- evaluate


def test_find_encoders(run, tmp_path):
    assert find_encoders(run) == find_encoders(run / "encoders") == run / "encoders"
    with pytest.raises(FileNotFoundError, match="interrupted"):
        find_encoders(tmp_path)


def test_evaluate_on_toy_is_the_report(run, tmp_path, capsys):
    assert (
        main(
            [
                "evaluate",
                str(run),
                "--images",
                "40",
                "--json",
                str(tmp_path / "r.json"),
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    said, got = capsys.readouterr().out, json.loads((tmp_path / "r.json").read_text())
    encoders, sets = (
        load_encoders(run / "encoders"),
        dict(zip(MODALITIES, toy_pairs(40, size=28, split="test"))),
    )
    report = evaluate_retrieval(
        *(embed(encoders[m], sets[m]) for m in ("sketch", "photo")),
        *(sets[m].labels for m in ("sketch", "photo")),
        classes=list(TOY_CLASSES),
    )
    assert (
        got["metrics"] == pytest.approx(report.metrics) and got["queries"] == got["gallery"] == 40
    )
    assert f"**{report.metrics['mAP@all']:.3f}**" in said and all(c in said for c in TOY_CLASSES)


def test_evaluate_files_on_folders_with_an_alias(run, folders, capsys):
    (folders / "photo" / TOY_CLASSES[0]).rename(folders / "photo" / "zeppelin")
    pair = [
        "--photo-encoder",
        run / "encoders" / "photo.safetensors",
        "--sketch-encoder",
        run / "encoders" / "sketch.safetensors",
        "--photos",
        folders / "photo",
        "--sketches",
        folders / "sketch",
    ]
    assert main(["evaluate", *map(str, pair), "--device", "cpu"]) == 0
    assert (
        "2 of 20 photo images are of classes that the encoders do not know"
        in capsys.readouterr().out
    )
    assert (
        main(
            [
                "evaluate",
                *map(str, pair),
                "--aliases",
                json.dumps({"zeppelin": TOY_CLASSES[0]}),
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    assert "left out" not in capsys.readouterr().out


def test_evaluate_exports_onnx(run, tmp_path, capsys):
    assert (
        main(
            [
                "evaluate",
                str(run),
                "--images",
                "20",
                "--onnx",
                str(tmp_path / "o"),
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    assert (
        sorted(p.name for p in (tmp_path / "o").iterdir()) == ["photo.onnx", "sketch.onnx"]
        and "differ from ours by" in capsys.readouterr().out
    )


def test_evaluate_mistakes(run, folders, capsys):
    photo, sketch = (run / "encoders" / f"{m}.safetensors" for m in MODALITIES)
    assert "run folder, or both" in fails(capsys, "evaluate")
    assert "run folder, or both" in fails(capsys, "evaluate", "--photo-encoder", photo)
    assert "run folder, or both" in fails(
        capsys, "evaluate", run, "--photo-encoder", photo, "--sketch-encoder", sketch
    )
    assert "photo first" in fails(
        capsys, "evaluate", "--photo-encoder", sketch, "--sketch-encoder", photo
    )
    assert "both photos and sketches" in fails(
        capsys, "evaluate", run, "--photos", folders / "photo"
    )
    assert "alias table" in fails(capsys, "evaluate", run, "--aliases", "{x}")


# ---- index and search


@pytest.fixture
def gallery(run, folders, capsys):
    "The folder that `dfsbir index` made of 20 photos."
    assert (
        main(
            [
                "index",
                str(folders / "photo"),
                "--run",
                str(run),
                "--gallery",
                str(folders / "gallery"),
                "--workers",
                "0",
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    said = capsys.readouterr().out
    assert "20 photos, 20 embedded, 0 known, 0 gone, 0 broken" in said
    return folders / "gallery"


def test_index_then_search(gallery, folders, run, capsys, tmp_path):
    sketch = next((folders / "sketch").rglob("*.png"))
    gallery.rename(tmp_path / "moved")  # with its encoders
    files = [tmp_path / "out" / name for name in ("found.png", "found.json")]
    assert (
        main(
            [
                "search",
                str(sketch),
                "--gallery",
                str(tmp_path / "moved"),
                "-k",
                "7",
                "--sheet",
                str(files[0]),
                "--json",
                str(files[1]),
            ]
        )
        == 0
    )
    said, found = (
        capsys.readouterr().out.splitlines(),
        json.loads(files[1].read_text())["queries"][0],
    )
    hits = Searcher(tmp_path / "moved", run / "encoders").by_sketch(sketch, 7)
    assert len(said) == 7 and [h["index"] for h in found] == hits.indices[0].tolist()
    for n, (line, item) in enumerate(zip(said, hits.items()), 1):
        assert line.split() == [
            str(n),
            f"{hits.scores[0, n - 1]:.3f}",
            item.label,
            str((folders / "photo" / item.path).resolve()),
        ]
    with Image.open(files[0]) as sheet:
        assert sheet.format == "PNG" and sheet.size == hits.contact_sheet().size


def test_search_by_strokes_by_photo_and_by_label(gallery, folders, capsys):
    (folders / "s.json").write_text("[[[0.1, 0.1], [0.9, 0.9]], [[0.5, 0.2]]]")
    assert (
        main(["search", str(folders / "s.json"), "--gallery", str(gallery), "-k", "3"]) == 0
        and len(capsys.readouterr().out.splitlines()) == 3
    )
    photo = next((folders / "photo").rglob("*.png"))
    assert (
        main(
            [
                "search",
                str(photo),
                "--photo",
                "--gallery",
                str(gallery),
                "--label",
                photo.parent.name,
            ]
        )
        == 0
    )
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and all(f"  {photo.parent.name}  " in line for line in said)


def test_index_again_with_more(gallery, folders, run, capsys):
    (folders / "photo" / "bad.jpg").write_text("hello")
    next((folders / "photo").rglob("*.png")).unlink()
    words = [
        "index",
        str(folders / "photo"),
        "--run",
        str(run),
        "--gallery",
        str(gallery),
        "--workers",
        "0",
        "--device",
        "cpu",
    ]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert (
        "19 photos, 0 embedded, 19 known, 1 gone, 1 broken" in said
        and "broken: bad.jpg: UnidentifiedImageError: cannot identify image file\n" in said
    )
    for module in ("faiss", "pyarrow"):
        pytest.importorskip(module, reason=f"{module} is not installed (extra: search)")
    assert main([*words, "--approximate", "--parquet", str(folders / "g.parquet")]) == 0
    assert (
        "approximate index: recall@10 1.0" in capsys.readouterr().out
        and (folders / "g.parquet").is_file()
    )
    assert (
        main(
            [
                "search",
                str(next((folders / "sketch").rglob("*.png"))),
                "--gallery",
                str(gallery),
                "--approximate",
            ]
        )
        == 0
    )


def test_index_and_search_mistakes(gallery, folders, run, capsys, tmp_path):
    sketch = next((folders / "sketch").rglob("*.png"))
    assert (
        "holds no encoders"
        in fails(
            capsys,
            "index",
            folders / "photo",
            "--run",
            tmp_path / "none",
            "--gallery",
            tmp_path / "new",
        )
        and not (tmp_path / "new").exists()
    )
    assert "is not a folder of photos" in fails(
        capsys, "index", folders / "none", "--run", run, "--gallery", tmp_path / "new"
    )
    assert "holds no gallery" in fails(capsys, "search", sketch, "--gallery", tmp_path / "none")
    assert "there is no sketch" in fails(
        capsys, "search", tmp_path / "none.png", "--gallery", gallery
    )
    assert "blank" in fails(capsys, "search", blank(tmp_path / "blank.png"), "--gallery", gallery)
    assert "no photo has the label 'unicorn'" in fails(
        capsys, "search", sketch, "--gallery", gallery, "--label", "unicorn"
    )
    assert "has no approximate index" in fails(
        capsys, "search", sketch, "--gallery", gallery, "--approximate"
    )
    assert (
        "unknown file extension"
        in fails(
            capsys, "search", sketch, "--gallery", gallery, "--sheet", tmp_path / "s.xyz"
        ).lower()
    )
    for text, said in (
        ("[[[0.1, 0.2]", "not JSON of strokes"),
        ("[]", "no strokes"),
        ('{"a": 1}', "points"),
        ("[[[200, 300]]]", "points are in [0,1]"),
    ):
        (tmp_path / "s.json").write_text(text)
        assert said in fails(capsys, "search", tmp_path / "s.json", "--gallery", gallery)


def blank(path):
    "An empty page."
    Image.new("L", (40, 40), 255).save(path)
    return path
