"""What a folder of photos is taken to hold: names, links, hidden files, labels."""

import pytest
from search.helpers import index, save


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
