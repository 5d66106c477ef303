"""Pairs of a photo and its drawings: QMUL V1 and V2, shoes3, photos that nobody has drawn."""

import json
from collections import Counter
from pathlib import Path

import pytest

from dfsbir.data.image_files import BrokenImage
from dfsbir.data.instance_pairs import (
    read_photos,
    read_qmul_v1,
    read_qmul_v2,
    read_shoes3,
    read_triplets,
)
from dfsbir.data.manifest import Manifest, ManifestMismatch


@pytest.fixture
def qmul_v1(tmp_path, picture):
    "Three training pairs and two test pairs, judged."
    for split, n in (("train", 3), ("test", 2)):
        for folder in ("photo_edge", "sketch"):
            for i in range(n):
                picture(tmp_path / "shoes" / split / folder / f"{i:04d}.png", 60 * i + 40, "L")
    judged = {"train": [[[1, 2], [2, 1]], [], [[0, 1]]], "test": [[[0, 1]], [[1, 0]]]}
    (tmp_path / "shoes" / "triplets.json").write_text(json.dumps(judged))
    return tmp_path


def test_qmul_v1(qmul_v1):
    photos, sketches = read_qmul_v1(qmul_v1, 16, "shoes", "train")
    assert photos.instances.tolist() == sketches.instances.tolist() == [0, 1, 2]
    assert photos.classes == ["shoes"]
    assert photos[2][0].shape == (3, 16, 16) and sketches[2][0].shape == (1, 16, 16)
    with pytest.raises(FileNotFoundError, match="QMUL V1"):
        read_qmul_v1(qmul_v1, 16, "chairs", "train")


def test_triplets(qmul_v1):
    assert read_triplets(qmul_v1, "shoes", "train").tolist() == [[0, 1, 2], [0, 2, 1], [2, 0, 1]]
    assert read_triplets(qmul_v1, "shoes", "test").tolist() == [[0, 0, 1], [1, 1, 0]]
    with pytest.raises(ValueError, match="'val'"):
        read_triplets(qmul_v1, "shoes", "val")
    (qmul_v1 / "shoes" / "triplets.json").write_text(json.dumps({"train": [[[1, 9]]]}))
    with pytest.raises(ValueError, match="0 to 9"):
        read_triplets(qmul_v1, "shoes", "train")
    (qmul_v1 / "shoes" / "triplets.json").write_text(json.dumps({"train": [[], []]}))
    assert read_triplets(qmul_v1, "shoes", "train").shape == (0, 3)


def test_qmul_v1_with_a_manifest(qmul_v1, picture):
    manifest = Manifest.scan(qmul_v1)
    assert manifest.splits == ["test", "train"]
    assert len(read_qmul_v1(qmul_v1, 16, "shoes", "test", manifest)[0]) == 2
    picture(qmul_v1 / "shoes" / "train" / "sketch" / "0001.png", 7, "L")
    read_qmul_v1(qmul_v1, 16, "shoes", "test", manifest)
    with pytest.raises(ManifestMismatch) as e:
        read_qmul_v1(qmul_v1, 16, "shoes", "train", manifest)
    assert e.value.changed == ["shoes/train/sketch/0001.png"]


def test_a_drawing_of_a_broken_photo_is_left_out_with_it(qmul_v1):
    torn = qmul_v1 / "shoes" / "train" / "photo_edge" / "0001.png"
    torn.write_bytes(torn.read_bytes()[:30])
    with pytest.raises(BrokenImage, match="0001.png"):
        read_qmul_v1(qmul_v1, 16, "shoes", "train")
    with pytest.warns(UserWarning, match="broken"):
        photos, sketches = read_qmul_v1(qmul_v1, 16, "shoes", "train", on_error="skip")
    assert photos.instances.tolist() == sketches.instances.tolist() == [0, 2]
    assert len(photos.broken) == len(sketches.broken) == 1
    torn.unlink()
    with pytest.raises(BrokenImage) as e:
        read_qmul_v1(qmul_v1, 16, "shoes", "train")
    assert e.value.path == str(qmul_v1 / "shoes" / "train" / "sketch" / "0001.png")


def test_qmul_v2_has_several_sketches_a_photo(tmp_path, picture):
    for split in ("train", "test"):
        for name in ("10_a", "11"):
            picture(tmp_path / f"{split}B" / f"{name}.png")
            for k in range(1, 4):
                picture(tmp_path / f"{split}A" / f"{name}_{k}.png", 255, "L")
    photos, sketches = read_qmul_v2(tmp_path, 16, "test")
    assert [Path(path).stem for path in photos.paths] == ["10_a", "11"]
    assert photos.instances.tolist() == [0, 1]
    assert sketches.instances.tolist() == [0, 0, 0, 1, 1, 1]
    by_letter = Manifest.scan(tmp_path, split_of=lambda path: path.split("/")[0][:-1])
    assert by_letter.splits == ["test", "train"]
    assert len(read_qmul_v2(tmp_path, 16, "train", by_letter)[1]) == 6
    with pytest.raises(FileNotFoundError, match="'val'"):
        read_qmul_v2(tmp_path, 16, "val")


@pytest.fixture
def shoes3(tmp_path, picture):
    "Two training photos with three and two drawings, one test photo with one."
    drawings = {"train": {"001": 3, "002": 2}, "test": {"009": 1}}
    for split, counts in drawings.items():
        for name, count in counts.items():
            picture(tmp_path / split / "photo" / f"{name}.jpg", int(name), size=(136, 102))
            for k in range(1, count + 1):
                value = 10 * int(name) + k
                picture(tmp_path / split / "sketch" / f"{name}-{k}.png", value, "L")
    return tmp_path


def test_shoes3_has_up_to_three_sketches_a_photo(shoes3):
    photos, sketches = read_shoes3(shoes3, 16, "train")
    assert photos.classes == sketches.classes == ["shoes"]
    assert photos.instances.tolist() == [0, 1]
    assert sketches.instances.tolist() == [0, 0, 0, 1, 1]
    assert photos[0][0].shape == (3, 16, 16) and sketches[0][0].shape == (1, 16, 16)
    assert [len(images) for images in read_shoes3(shoes3, 16, "test")] == [1, 1]
    with pytest.raises(FileNotFoundError, match="'val'"):
        read_shoes3(shoes3, 16, "val")


def test_shoes3_with_a_manifest(shoes3, picture):
    manifest = Manifest.scan(shoes3)
    assert manifest.splits == ["test", "train"] and not manifest.leaks()
    picture(shoes3 / "train" / "sketch" / "001-2.png", 9, "L")
    read_shoes3(shoes3, 16, "test", manifest)
    with pytest.raises(ManifestMismatch) as e:
        read_shoes3(shoes3, 16, "train", manifest)
    assert e.value.changed == ["train/sketch/001-2.png"]


@pytest.mark.parametrize("cached", [True, False])
def test_all_drawings_of_a_broken_photo_are_left_out(shoes3, cached):
    (shoes3 / "train" / "photo" / "001.jpg").write_bytes(b"")
    with pytest.warns(UserWarning, match="broken"):
        photos, sketches = read_shoes3(shoes3, 16, "train", on_error="skip", cached=cached)
    assert photos.instances.tolist() == [1] and sketches.instances.tolist() == [1, 1]
    assert len(sketches.broken) == 3


def test_photos_that_nobody_has_drawn(shoes3):
    photos = read_photos(shoes3 / "train" / "photo", 16)
    assert len(photos) == 2 and photos.instances is None and photos.classes == ["photo"]
    with pytest.raises(FileNotFoundError, match="none"):
        read_photos(shoes3 / "none", 16)


@pytest.mark.parametrize("category,train,test", (("shoes", 304, 115), ("chairs", 200, 97)))
def test_real_qmul(data_dir, category, train, test):
    root = data_dir / "qmul_v1"
    for split, n in (("train", train), ("test", test)):
        photos, sketches = read_qmul_v1(root, 32, category, split, cached=False)
        assert len(photos) == len(sketches) == n and photos.instances.equal(sketches.instances)
        assert len(set(read_triplets(root, category, split)[:, 0].tolist())) == n
    assert sketches[n - 1][0].mean() > 0.5 and photos[n - 1][0].mean() > 0.5, "dark on white"


def test_real_shoes3(data_dir):
    root = data_dir / "shoes3"
    if not root.is_dir():
        pytest.skip(f"{root} is not there")
    manifest = Manifest.scan(root)
    assert manifest.splits == ["test", "train"]
    assert manifest.leaks() == [("test/photo/273.jpg", "train/photo/216.jpg")], "one shoe twice"
    for split, photo_count, sketch_count in (("train", 190, 564), ("test", 64, 188)):
        photos, sketches = read_shoes3(root, 32, split, manifest)
        assert (len(photos), len(sketches)) == (photo_count, sketch_count)
        drawings = Counter(sketches.instances.tolist())
        assert set(drawings) == set(photos.instances.tolist())
        assert set(drawings.values()) == {2, 3}
        assert sketches.images().mean() > 0.7, "dark lines on white"
