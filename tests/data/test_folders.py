"""Class folders: layouts, broken files, memory."""

import pickle
from pathlib import Path

import pytest
import torch

from dfsbir.data.folders import read_folder
from dfsbir.data.image_files import BrokenImage
from dfsbir.data.manifest import Manifest


def break_files(folder, picture):
    "Adds five files that cannot be read, and gives their names."
    jpeg = picture(folder / "whole.jpg", size=(300, 300))
    png = picture(folder / "whole.png", size=(300, 300))
    jpeg_bytes, png_bytes = jpeg.read_bytes(), png.read_bytes()
    jpeg.unlink()
    png.unlink()
    contents = {
        "cut.jpg": jpeg_bytes[: len(jpeg_bytes) // 2],
        "cut.png": png_bytes[: len(png_bytes) - 30],
        "empty.png": b"",
        "text.jpg": b"not an image",
        "garbled.png": png_bytes[:40] + b"\0" * 60 + png_bytes[100:],
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return sorted(contents)


@pytest.mark.parametrize("workers", (0, 2))
@pytest.mark.parametrize("cached", (True, False))
def test_broken_images_stop_or_are_listed(class_folders, picture, cached, workers):
    names = break_files(class_folders / "cat", picture)
    with pytest.raises(BrokenImage) as e:
        read_folder(class_folders, "photo", 16, cached=True, workers=workers)
    assert str(class_folders) in str(e.value) and "on_error" in str(e.value)
    with pytest.warns(UserWarning, match="5 of 11"):
        images = read_folder(
            class_folders, "photo", 16, on_error="skip", cached=cached, workers=workers
        )
    assert len(images) == 6 and images.labels.tolist() == [0] * 3 + [1] * 3
    assert sorted(Path(path).name for path, _ in images.broken) == names
    assert all(reason for _, reason in images.broken)
    assert len(images.images()) == 6 and len(images.take([0]).broken) == 5
    assert "5 broken" in images._repr_markdown_()


def test_a_set_on_demand_names_the_broken_image_when_it_is_met(class_folders):
    (class_folders / "cat" / "0.png").write_bytes(b"")
    images = read_folder(class_folders, "photo", 16, cached=False)
    assert len(images) == 6 and images[0][0].shape == (3, 16, 16)
    with pytest.raises(BrokenImage, match="0.png"):
        images[3]
    with pytest.raises(BrokenImage, match="0.png"):
        images.images()


def test_a_folder_in_memory_and_on_demand(class_folders, picture):
    (class_folders / ".DS_Store").write_text("")
    (class_folders / "cat" / "notes.txt").write_text("")
    picture(class_folders / "cat" / "deeper" / "9.JPG")
    images = read_folder(class_folders, "sketch", 16)
    assert images.classes == ["ant", "cat"] and images.labels.tolist() == [0] * 3 + [1] * 4
    assert images.paths[0].endswith("0.png") and images.pixels().shape == (7, 1, 16, 16)
    lazy = read_folder(class_folders, "sketch", 16, cached=False)
    assert torch.equal(lazy.images(), images.images()) and lazy.digest() == images.digest()
    assert len(pickle.loads(pickle.dumps(lazy))) == 7


@pytest.mark.parametrize("limit, opened", [(6 * 3 * 16 * 16, 0), (6 * 3 * 16 * 16 - 1, 6)])
def test_what_exceeds_the_limit_of_bytes_is_opened_on_demand(
    class_folders, monkeypatch, limit, opened
):
    "How many of six images cannot be read once their files are gone."
    monkeypatch.setattr("dfsbir.data.folders.CACHE_BYTES", limit)
    images = read_folder(class_folders, "photo", 16)
    for path in images.paths:
        Path(path).unlink()
    failed = 0
    for i in range(6):
        try:
            images[i]
        except BrokenImage:
            failed += 1
    assert failed == opened


@pytest.mark.parametrize("layout", ("test", "test/photo", "photo/test"))
def test_folders_with_splits(tmp_path, picture, layout):
    picture(tmp_path / layout / "cat" / "1.png", 99)
    picture(tmp_path / layout.replace("test", "train") / "cat" / "1.png", 9)
    images = read_folder(tmp_path, "photo", 16, split="test").images()
    assert images.mean().item() == pytest.approx(99 / 255)
    with pytest.raises(FileNotFoundError, match="'dev'"):
        read_folder(tmp_path, "photo", 16, split="dev")
    with pytest.raises(ValueError, match="split="):
        read_folder(tmp_path, "photo", 16)


def test_what_is_no_folder_of_classes_is_refused(tmp_path, picture):
    with pytest.raises(FileNotFoundError, match="no"):
        read_folder(tmp_path / "no", "photo", 16)
    with pytest.raises(FileNotFoundError, match="CLASS/image.png"):
        read_folder(tmp_path, "photo", 16)
    (tmp_path / "void").mkdir()
    with pytest.raises(ValueError, match="void"):
        read_folder(tmp_path, "photo", 16)
    picture(tmp_path / "void" / "1.png")
    with pytest.raises(ValueError, match="'ignore'"):
        read_folder(tmp_path, "photo", 16, on_error="ignore")


def test_hidden_folders_hold_no_training_images(class_folders, picture):
    picture(class_folders / "cat" / ".thumbs" / "0.png")
    assert len(read_folder(class_folders, "photo", 16)) == 6


def test_modalities_in_the_plural_are_no_classes(tmp_path, picture):
    for modality in ("photos", "sketches"):
        picture(tmp_path / modality / "cat" / "0.png")
    with pytest.raises(ValueError, match="'photos', 'sketches'"):
        read_folder(tmp_path, "photo", 16)


def test_real_pacs(data_dir):
    photos = read_folder(data_dir / "pacs", "photo", 64, split="test")
    sketches = read_folder(data_dir / "pacs", "sketch", 64, split="test")
    assert (len(photos), len(sketches)) == (519, 1208)
    assert photos.classes == sketches.classes and len(photos.classes) == 7
    assert sketches.images().mean() > 0.7 and not photos.broken
    manifest = Manifest.scan(data_dir / "pacs" / "test")
    assert sum(manifest.counts["all"].values()) == 1727
