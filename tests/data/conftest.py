"""Fixtures of the data tests: small image files, class folders, the toy set."""

import pytest
from PIL import Image

from dfsbir.data.toy import toy_pairs


def save_image(path, value=100, mode="RGB", size=(40, 40), **options):
    "An image file of one colour, its folders included."
    path.parent.mkdir(parents=True, exist_ok=True)
    bands = len(Image.new(mode, (1, 1)).getbands())
    colour = value if mode in ("L", "I;16") else (value,) * bands
    Image.new(mode, size, colour).save(path, **options)
    return path


@pytest.fixture(scope="session")
def picture():
    "The function picture(path, value, mode, size, **options), which saves an image of one colour."
    return save_image


@pytest.fixture
def class_folders(tmp_path):
    "A folder with the classes ant and cat, three images each."
    for name in ("cat", "ant"):
        for k in range(3):
            save_image(tmp_path / name / f"{k}.png", 50 * k + 20)
    return tmp_path


@pytest.fixture(scope="session")
def toy():
    "200 toy pairs of 32 px."
    return toy_pairs(200, 32, seed=1, split="test")
