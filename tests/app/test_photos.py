"""dfsbir index and search: a gallery of one's own photos, brought up to date, moved, and asked."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from app.helpers import call, fails
from conftest import ROOT
from PIL import Image

from dfsbir.search.searcher import Searcher


@pytest.fixture
def sketch(folders):
    return next((folders / "sketch").rglob("*.png"))


def test_index_then_search(gallery, folders, run, sketch, capsys, tmp_path):
    moved = gallery.rename(tmp_path / "moved")  # with its encoders
    sheet, found = tmp_path / "out" / "found.png", tmp_path / "out" / "found.json"
    words = ("--gallery", moved, "-k", 7, "--sheet", sheet, "--json", found)
    assert call("search", sketch, *words) == 0
    lines = capsys.readouterr().out.splitlines()
    hits = Searcher(moved, run / "encoders").by_sketch(sketch, 7)
    places = [hit["index"] for hit in json.loads(found.read_text())["queries"][0]]
    assert len(lines) == 7 and places == hits.indices[0].tolist()
    for rank, (line, item) in enumerate(zip(lines, hits.items()), 1):
        score, path = hits.scores[0, rank - 1], (folders / "photo" / item.path).resolve()
        assert line.split() == [str(rank), f"{score:.3f}", item.label, str(path)]
    with Image.open(sheet) as image:
        assert image.format == "PNG" and image.size == hits.contact_sheet().size


def test_a_gallery_without_encoders_says_how_to_search_it(gallery, sketch, capsys):
    "As one that was made from Python."
    shutil.rmtree(gallery / "encoders")
    text = fails(capsys, "search", sketch, "--gallery", gallery)
    assert "Searcher" in text and "dfsbir index --run RUN" in text and "interrupted" not in text


def test_what_was_done_to_a_drawing_is_said(gallery, sketch, capsys, tmp_path):
    "On the error stream, so that the list of photos stays a list."
    with Image.open(sketch) as image:
        image.convert("L").resize((90, 90)).point(lambda v: 200 - v // 2).save(tmp_path / "s.png")
    assert call("search", sketch, "--gallery", gallery) == 0
    assert not capsys.readouterr().err
    assert call("search", tmp_path / "s.png", "--gallery", gallery, "-k", 4) == 0
    printed = capsys.readouterr()
    assert "inverted" in printed.err and len(printed.out.splitlines()) == 4


def test_search_by_strokes_by_photo_and_by_label(gallery, folders, capsys):
    strokes = "[[[0.1, 0.1], [0.9, 0.9]], [[0.5, 0.2]]]"
    (folders / "s.json").write_text(strokes, encoding="utf-8-sig")  # as Windows' editor does
    assert call("search", folders / "s.json", "--gallery", gallery, "-k", 3) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    photo = next((folders / "photo").rglob("*.png"))
    label = photo.parent.name
    assert call("search", photo, "--photo", "--gallery", gallery, "--label", label) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(f"  {label}  " in line for line in lines)


def test_index_again_with_more(gallery, folders, run, sketch, capsys):
    (folders / "photo" / "bad.jpg").write_text("hello")
    next((folders / "photo").rglob("*.png")).unlink()
    words = ["index", folders / "photo", "--run", run, "--gallery", gallery]
    words += ["--workers", 0, "--device", "cpu"]
    assert call(*words) == 0
    text = capsys.readouterr().out
    assert "19 photos, 0 embedded, 19 known, 1 gone, 1 broken" in text
    assert "bad.jpg: UnidentifiedImageError" in text
    for module in ("faiss", "pyarrow"):
        pytest.importorskip(module, reason=f"{module} is not installed (extra: search)")
    assert call(*words, "--approximate", "--parquet", folders / "g.parquet") == 0
    assert "recall@10 1.0" in capsys.readouterr().out and (folders / "g.parquet").is_file()
    assert call("search", sketch, "--gallery", gallery, "--approximate") == 0


def test_index_mistakes(folders, run, capsys, tmp_path):
    new = tmp_path / "new"
    words = ("index", folders / "photo", "--run", tmp_path / "none", "--gallery", new)
    assert "none" in fails(capsys, *words) and not new.exists()
    words = ("index", folders / "none", "--run", run, "--gallery", new)
    assert "none" in fails(capsys, *words)


def test_search_mistakes(gallery, sketch, capsys, tmp_path):
    blank = tmp_path / "blank.png"
    Image.new("L", (40, 40), 255).save(blank)
    here = ("--gallery", gallery)
    for words, fact in (
        ((sketch, "--gallery", tmp_path / "none"), "none"),
        ((tmp_path / "none.png", *here), "none.png"),
        ((blank, *here), "blank"),
        ((sketch, *here, "--label", "unicorn"), "'unicorn'"),
        ((sketch, *here, "--approximate"), "dfsbir index --approximate"),
        ((sketch, *here, "--sheet", tmp_path / "s.xyz"), "s.xyz"),
    ):
        assert fact in fails(capsys, "search", *words)


@pytest.mark.parametrize(
    "text, fact",
    [
        ("[[[0.1, 0.2]", "JSON"),
        ("[]", "no strokes"),
        ('{"a": 1}', "points"),
        ("[[[200, 300]]]", "[0,1]"),
    ],
)
def test_files_of_strokes_that_are_none(text, fact, gallery, capsys, tmp_path):
    (tmp_path / "s.json").write_text(text)
    assert fact in fails(capsys, "search", tmp_path / "s.json", "--gallery", gallery)


def test_a_missing_extra_is_named(gallery, folders, run, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    words = ("index", folders / "photo", "--run", run, "--gallery", gallery, "--workers", 0)
    text = fails(capsys, *words, "--device", "cpu", "--parquet", folders / "g.parquet")
    assert "dfsbir[search]" in text


# ---- odd names, moved folders, folders that cannot be read, cut pipes


def odd_gallery(folders, run, name):
    "A gallery of photos of which one has this name, as bytes."
    data = next((folders / "photo").rglob("*.png")).read_bytes()
    with open(os.path.join(os.fsencode(folders / "photo"), name), "wb") as file:
        file.write(data)
    words = ("--workers", 0, "--device", "cpu", "--run", run, "--gallery", folders / "gallery")
    assert call("index", folders / "photo", *words) == 0
    return folders / "gallery"


def process(*words, encoding="utf-8"):
    "The finished command, whose console has an encoding."
    return subprocess.run(
        [sys.executable, "-m", "dfsbir.app.cli", *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding},
        capture_output=True,
    )


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "cp1252"])
@pytest.mark.parametrize("name", [b"caf\xe9.png", b"a\nb\x1b[31m.png", "猫.png".encode()])
def test_odd_names_end_no_search(name, encoding, folders, run, sketch, capsys):
    gallery, files = odd_gallery(folders, run, name), [folders / "f.json", folders / "f.png"]
    words = ("--gallery", gallery, "-k", 40, "--json", files[0], "--sheet", files[1])
    done = process("search", sketch, *words, encoding=encoding)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.decode(encoding).splitlines()
    assert len(lines) == 21 and all(line.isprintable() for line in lines)
    assert all(file.stat().st_size for file in files)
    paths = [hit["path"] for hit in json.loads(files[0].read_text())["queries"][0]]
    assert os.fsdecode(name) in paths


def test_a_moved_folder_is_noticed_and_named(gallery, folders, sketch, capsys, tmp_path):
    moved = (folders / "photo").rename(tmp_path / "elsewhere")
    assert call("search", sketch, "--gallery", gallery, "-k", 4) == 0
    printed = capsys.readouterr()
    assert "4 of 4" in printed.err and "--root" in printed.err
    assert call("search", sketch, "--gallery", gallery, "-k", 4, "--root", moved) == 0
    printed = capsys.readouterr()
    assert "--root" not in printed.err
    assert all(f"  {moved.resolve()}/" in line for line in printed.out.splitlines())
    text = fails(capsys, "search", sketch, "--gallery", gallery, "--root", tmp_path / "nowhere")
    assert "nowhere" in text


def test_an_unreadable_folder_is_named_and_the_exit_code_says_so(
    gallery, folders, run, capsys, monkeypatch
):
    label = sorted(p.name for p in (folders / "photo").iterdir())[0]
    scandir = os.scandir

    def scan(path="."):
        if os.path.basename(path) == label:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scan)
    words = ("--workers", 0, "--device", "cpu", "--run", run, "--gallery", gallery)
    assert call("index", folders / "photo", *words) == 1
    text = capsys.readouterr().out
    assert "20 photos" in text and f"{label}: PermissionError" in text


def test_what_is_no_photo_is_counted(gallery, folders, run, capsys):
    for name in ("a.heic", "b.heic", "c.mp4", "@eaDir/d.png"):
        (folders / "photo" / name).parent.mkdir(exist_ok=True)
        (folders / "photo" / name).write_text("hello")
    words = ("--workers", 0, "--device", "cpu", "--run", run, "--gallery", gallery)
    assert call("index", folders / "photo", *words, "--exclude", "0.png") == 0
    text = capsys.readouterr().out
    assert "2 .heic" in text and "1 .mp4" in text and "@eaDir" in text
    assert "--exclude: 1" in text and "19 photos" in text
    assert call("index", folders / "photo", *words, "--verify") == 0


def test_a_cut_pipe_ends_quietly(gallery, sketch):
    "As in `dfsbir search ... | head -1`."
    words = ["search", sketch, "--gallery", gallery, "-k", "20"]
    with subprocess.Popen(
        [sys.executable, "-m", "dfsbir.app.cli", *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as done:
        done.stdout.close()
        error = done.stderr.read()
    assert done.returncode == 141 and not error


def test_a_shrinking_gallery_warns_in_a_line(gallery, folders, run, capsys):
    for file in sorted((folders / "photo").rglob("*.png"))[:9]:
        file.unlink()
    words = ("--workers", 0, "--device", "cpu", "--run", run, "--gallery", gallery)
    assert call("index", folders / "photo", *words) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(lines) == 1 and "20 photos" in lines[0] and ".py" not in lines[0]
