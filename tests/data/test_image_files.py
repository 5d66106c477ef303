"""Image files of every kind become canonical images; damaged ones are named."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from dfsbir.core.data_guard import DataFreeViolation, data_free
from dfsbir.data.folders import read_folder
from dfsbir.data.image_files import BrokenImage, open_image


@pytest.mark.parametrize(
    "name, value, mode, wanted",
    [
        ("a.png", 100, "RGB", 100),
        ("b.png", 100, "L", 100),
        ("cmyk.jpg", 0, "CMYK", 255),
        ("deep.png", 100 * 257, "I;16", 100),
        ("clear.png", 0, "RGBA", 255),
        ("clear.png", 0, "LA", 255),
    ],
)
@pytest.mark.parametrize("modality", ["photo", "sketch"])
def test_kinds_of_files(tmp_path, picture, name, value, mode, wanted, modality):
    "16 bits become 8, CMYK becomes RGB, and transparent pixels become white."
    image = open_image(picture(tmp_path / name, value, mode), modality, 16)
    assert image.float().mean().item() == pytest.approx(wanted, abs=3)
    assert image.shape == (3 if modality == "photo" else 1, 16, 16) and image.dtype == torch.uint8


def test_transparent_palette(tmp_path):
    Image.new("P", (9, 9), 0).save(tmp_path / "p.png", transparency=0)
    assert (open_image(tmp_path / "p.png", "sketch", 16) == 255).all()


@pytest.mark.parametrize("top", [1.0, 255.0])
def test_float_images_run_to_one_or_to_255(tmp_path, top):
    Image.fromarray(np.full((20, 20), 0.8 * top, np.float32)).save(tmp_path / "f.tif")
    assert (open_image(tmp_path / "f.tif", "photo", 16) == 204).all()


def test_nan_pixels_are_broken(tmp_path):
    Image.fromarray(np.full((20, 20), np.nan, np.float32)).save(tmp_path / "n.tif")
    with pytest.raises(BrokenImage, match="NaN"):
        open_image(tmp_path / "n.tif", "photo", 16)


def test_a_photo_is_turned_upright(tmp_path):
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, :40] = 255  # left half white
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise to see it upright
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    photo = open_image(tmp_path / "turned.png", "photo", 20).float()
    assert photo[:, :9].mean() > 250 and photo[:, 11:].mean() < 5, "white is on top"


def test_a_sketch_is_padded_and_a_photo_is_cropped(tmp_path):
    Image.fromarray(np.zeros((40, 80), np.uint8)).save(tmp_path / "wide.png")
    sketch = open_image(tmp_path / "wide.png", "sketch", 20)[0]
    assert sketch[:4].min() == 255 and sketch[16:].min() == 255 and sketch[8:12].max() == 0
    assert open_image(tmp_path / "wide.png", "photo", 20).max() == 0


def test_a_whole_photo_is_padded_with_white(tmp_path):
    file = tmp_path / "wide.png"
    Image.new("RGB", (40, 20), (200, 0, 0)).save(file)
    photo = open_image(file, "photo", 40, whole=True)
    assert photo.shape == (3, 40, 40)
    assert (photo[:, :9] == 255).all() and (photo[:, -9:] == 255).all()
    assert (photo[:, 12:28] == torch.tensor([200, 0, 0]).view(3, 1, 1)).all()


def test_an_unknown_modality_is_no_broken_image(tmp_path, picture):
    with pytest.raises(ValueError, match="video") as e:
        open_image(picture(tmp_path / "a.png"), "video", 16)
    assert not isinstance(e.value, BrokenImage)


def test_a_forbidden_file_is_no_broken_image(tmp_path, picture):
    "It could be skipped otherwise, and nobody would hear that the law was broken."
    file = picture(tmp_path / "a.png")
    with data_free(), pytest.raises(DataFreeViolation):
        open_image(file, "photo", 16)


def test_a_broken_image_survives_pickling():
    e = pickle.loads(pickle.dumps(BrokenImage("a", "b")))
    assert (e.path, e.reason) == ("a", "b")


def test_decompression_bombs(class_folders, monkeypatch):
    "Refused by our limit and by Pillow's."
    monkeypatch.setattr("dfsbir.data.image_files.MAX_PIXELS", 1000)
    with pytest.raises(BrokenImage, match="bomb"):
        read_folder(class_folders, "photo", 16)
    monkeypatch.undo()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(BrokenImage, match="DecompressionBomb"):
        read_folder(class_folders, "photo", 16)


def test_odd_exif_is_a_broken_image(tmp_path, picture):
    "A resolution that is text, in a photo that has to be turned: skipped and listed."
    for k in range(2):
        picture(tmp_path / "cat" / f"{k}.png")
    exif = Image.Exif()
    exif[0x112], exif[0x11A] = 6, 72.0
    odd = picture(tmp_path / "cat" / "odd.jpg", exif=exif)
    data = bytearray(odd.read_bytes())
    tags = (b"\x01\x1a\x00\x05", b"\x1a\x01\x05\x00")  # resolution, a rational number
    at = next(data.find(tag) for tag in tags if tag in data)
    kind = at + (3 if data[at] == 1 else 2)
    data[kind] = 2  # ASCII
    odd.write_bytes(data)
    with pytest.warns(UserWarning, match="1 of 3"):
        found = read_folder(tmp_path, "photo", 16, on_error="skip")
    assert len(found) == 2 and found.broken[0][0].endswith("odd.jpg")
