"""dfsbir index and search: a gallery of one's own photos, brought up to date, moved, and asked."""

import json
import sys

import pytest
from app.helpers import call, fails
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
    (folders / "s.json").write_text("[[[0.1, 0.1], [0.9, 0.9]], [[0.5, 0.2]]]")
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
