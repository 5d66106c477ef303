"""What a folder of photos holds: names, links, formats, folders that cannot be read."""

import os

import pytest
import torch
from PIL import Image
from search.helpers import COUNT, Wrapped, index, save

from dfsbir.search.gallery import Gallery
from dfsbir.search.sources import photo_suffixes


def test_photos_without_class_folders_have_no_label(toy, encoders, tmp_path):
    for i, name in enumerate(("a b.jpg", "ünï.png", ".hidden.jpg", ".thumbs/x.jpg")):
        save(toy, i, tmp_path / "p" / name)
    gallery = index(tmp_path / "g", tmp_path / "p", encoders["photo"])
    assert [i.path for i in gallery.items] == ["a b.jpg", "ünï.png"]
    assert gallery.labels.tolist() == [-1, -1] and gallery.classes == []
    with pytest.raises(ValueError, match="class folders"):
        gallery.search(gallery.vectors[:1], label="car")
    assert gallery.search(gallery.vectors[:1]).contact_sheet().width > 96


def test_linked_folders_are_indexed_once(toy, encoders, tmp_path):
    "A link to a folder is a folder; one that leads back ends."
    save(toy, 0, tmp_path / "elsewhere" / "0.jpg")
    save(toy, 1, tmp_path / "photos" / "b" / "1.jpg")
    (tmp_path / "photos" / "a").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos" / "b" / "back").symlink_to(tmp_path / "photos")
    gallery = index(tmp_path / "gallery", tmp_path / "photos", encoders["photo"])
    found = [(i.path, i.label) for i in gallery.items]
    assert found == [("a/0.jpg", "a"), ("b/1.jpg", "b")]


def test_a_gallery_of_sketches_is_refused(toy, encoders, tmp_path):
    with pytest.raises(ValueError, match="sketch"):
        index(tmp_path / "gallery", toy[1], encoders["photo"])
    with pytest.raises(ValueError, match="empty"):
        index(tmp_path / "gallery", toy[0].take(slice(0)), encoders["photo"])


def test_folders_without_photos(gallery, encoders, tmp_path):
    before = sorted(p.name for p in gallery.folder.iterdir())
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("hello")
    for folder in ("empty", "texts", "none", "texts/a.txt"):
        with pytest.raises(FileNotFoundError, match=folder):
            index(gallery.folder, tmp_path / folder, encoders["photo"])
    (tmp_path / "texts" / "a.jpg").write_text("hello")
    with pytest.raises(ValueError, match="a.jpg.*UnidentifiedImageError"):
        index(gallery.folder, tmp_path / "texts", encoders["photo"])
    assert sorted(p.name for p in gallery.folder.iterdir()) == before


# ---- formats, folders that hold no photos, what is left out


@pytest.mark.parametrize(
    "suffix", [".jpe", ".jfif", ".JPG", ".jp2", ".avif", ".tga", ".qoi", ".dib"]
)
def test_what_pillow_reads_is_indexed(suffix, photos, encoders, tmp_path):
    if suffix.lower() not in photo_suffixes():
        pytest.skip(f"this Pillow does not read {suffix}")
    with Image.open(sorted(photos.rglob("*.jpg"))[0]) as image:
        (tmp_path / "p").mkdir()
        image.save(tmp_path / "p" / f"a{suffix}")
    gallery = index(tmp_path / "g", tmp_path / "p", encoders["photo"])
    assert [item.path for item in gallery.items] == [f"a{suffix}"] and not gallery.broken


def test_other_files_are_counted_by_kind(photos, encoders, tmp_path):
    for name in ("a.heic", "b.HEIC", "c.mp4", "readme", "d.mpg", ".hidden.txt", "x/e.txt"):
        (photos / name).parent.mkdir(exist_ok=True)
        (photos / name).write_text("hello")
    listing = index(tmp_path / "g", photos, encoders["photo"]).listing
    assert listing.other_files == {".heic": 2, ".mp4": 1, "": 1, ".mpg": 1, ".txt": 1}


@pytest.mark.parametrize(
    "folder", ["@eaDir", "__MACOSX", "System Volume Information", "node_modules", "$RECYCLE.BIN"]
)
def test_folders_that_are_no_photos_are_left_out_and_named(folder, photos, toy, encoders, tmp_path):
    for place in (photos / folder, photos / "car" / folder.upper()):
        save(toy, 0, place / "deep" / "x.jpg")
    save(toy, 0, photos / ".thumbnails" / "x.jpg")
    gallery = index(tmp_path / "g", photos, encoders["photo"])
    assert len(gallery) == COUNT
    assert sorted(gallery.listing.left_out) == sorted([folder, f"car/{folder.upper()}"])


@pytest.mark.parametrize(
    "patterns, left",
    [(["car"], 21), (["car/*"], 21), (["0?.jpg"], 14), (["car", "*/00.jpg"], 20), (["none"], 24)],
)
def test_excluded_names_and_paths(patterns, left, photos, encoders, tmp_path):
    assert len(index(tmp_path / "g", photos, encoders["photo"], exclude=patterns)) == left


def test_everything_excluded(photos, encoders, tmp_path):
    with pytest.raises(FileNotFoundError, match="24 photos"):
        index(tmp_path / "g", photos, encoders["photo"], exclude=["*.jpg"])


# ---- folders that cannot be read


def failing(monkeypatch, folder, error):
    "Listing this folder fails, as on a network drive; the test may run as an almighty user."
    scandir = os.scandir

    def scan(path="."):
        if os.path.abspath(path) == str(folder):
            raise error(5, "failed", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scan)


@pytest.mark.parametrize("error", [PermissionError, OSError, FileNotFoundError])
def test_photos_of_an_unreadable_folder_stay_and_it_is_named(
    error, gallery, photos, toy, encoders, monkeypatch
):
    save(toy, COUNT, photos / "new.jpg")
    (photos / "cup" / "03.jpg").unlink()
    failing(monkeypatch, photos / "car", error)
    encoder = Wrapped(encoders["photo"])
    after = index(gallery.folder, photos, encoder)
    ((path, reason),) = after.listing.unreadable
    assert path == "car" and error.__name__ in reason and encoder.embedded == 1
    assert len(after) == COUNT and after.changes["gone"] == 1
    assert after.classes == gallery.classes
    paths = [item.path for item in after.items]
    assert "car/01.jpg" in paths and "new.jpg" in paths and "cup/03.jpg" not in paths
    assert paths == sorted(paths, key=lambda p: p.split("/"))
    for i, item in enumerate(gallery.items):
        if item.path in paths:
            assert torch.equal(after.vectors[paths.index(item.path)], gallery.vectors[i])
    monkeypatch.undo()
    assert not index(gallery.folder, photos, encoders["photo"]).listing.unreadable


def test_a_root_that_cannot_be_listed_leaves_the_gallery(gallery, photos, encoders, monkeypatch):
    failing(monkeypatch, photos, PermissionError)
    with pytest.raises(FileNotFoundError, match="failed"):
        index(gallery.folder, photos, encoders["photo"])
    assert len(Gallery(gallery.folder)) == COUNT


@pytest.mark.parametrize("gone, warned", [(1, False), (2, False), (3, True), (20, True)])
def test_a_gallery_that_shrinks_by_more_than_a_tenth_warns(
    gone, warned, gallery, photos, encoders, recwarn
):
    for file in sorted(photos.rglob("*.jpg"))[:gone]:
        file.unlink()
    assert len(index(gallery.folder, photos, encoders["photo"])) == COUNT - gone
    messages = [str(w.message) for w in recwarn if "will be gone" in str(w.message)]
    assert bool(messages) == warned
    if warned:
        assert str(COUNT) in messages[0] and str(COUNT - gone) in messages[0]
