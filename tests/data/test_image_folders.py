"One reader of class folders and of QuickDraw's files."

import json

import numpy as np
import pytest
from PIL import Image

from dfsbir.data.image_folders import DRAWINGS_PER_CLASS, folder_classes, read_image_folder
from dfsbir.data.pen import measure_pen


def test_class_folders(class_folders):
    images = read_image_folder(class_folders, "photo", 16)
    assert list(images.classes) == ["ant", "cat"] and len(images) == 6
    assert folder_classes(class_folders, "photo") == ["ant", "cat"]


@pytest.mark.parametrize("suffix", ["npy", "ndjson"])
def test_quickdraw_files(tmp_path, suffix):
    for word in ("cat", "ant"):
        record = json.dumps({"word": word, "drawing": [[[0, 9], [0, 5]]]})
        if suffix == "npy":
            np.save(tmp_path / f"{word}.npy", np.zeros((3, 784), np.uint8))
        else:
            (tmp_path / f"{word}.ndjson").write_text("\n".join([record] * 3))
    images = read_image_folder(tmp_path, "sketch", 28)
    assert list(images.classes) == ["ant", "cat"] and len(images) == 6
    assert folder_classes(tmp_path, "sketch") == ["ant", "cat"]
    with pytest.raises(ValueError, match="drawings"):
        read_image_folder(tmp_path, "photo", 28)


def test_large_files_are_read_in_part(tmp_path):
    np.save(tmp_path / "cat.npy", np.zeros((DRAWINGS_PER_CLASS + 5, 784), np.uint8))
    assert len(read_image_folder(tmp_path, "sketch", 28)) == DRAWINGS_PER_CLASS


def test_folders_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="none"):
        read_image_folder(tmp_path / "none", "sketch", 28)


def test_drawings_of_one_pen(tmp_path):
    record = json.dumps({"word": "cat", "drawing": [[[0, 90, 90, 0, 0], [0, 0, 90, 90, 0]]]})
    (tmp_path / "strokes").mkdir()
    (tmp_path / "strokes" / "cat.ndjson").write_text(record)
    (tmp_path / "pictures" / "cat").mkdir(parents=True)
    thin = read_image_folder(tmp_path / "strokes", "sketch", 160)
    picture = Image.fromarray((thin.images()[0, 0] * 255).byte().numpy())
    picture.save(tmp_path / "pictures" / "cat" / "1.png")
    for name in ("strokes", "pictures"):
        images = read_image_folder(tmp_path / name, "sketch", 64, pen=0.06)
        assert images.size == 64 and abs(measure_pen(images.images()).item() - 0.06) < 0.01
    with pytest.raises(ValueError, match="photo"):
        read_image_folder(tmp_path / "pictures", "photo", 64, pen=0.06)


@pytest.mark.parametrize("size", [28, 32, 56, 96])
def test_white_paper_stays_white_at_any_side(tmp_path, size):
    (tmp_path / "cat").mkdir()
    Image.new("L", (140, 120), 255).save(tmp_path / "cat" / "1.png")
    images = read_image_folder(tmp_path, "sketch", size, pen=0.053)
    assert images.size == size and (images.images() == 1).all()
