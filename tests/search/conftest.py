"""Fixtures of the tests of searching: encoders, toy photos in folders, a gallery of them."""

import pytest
import torch
from search.helpers import COUNT, index, make_encoders, save

from dfsbir.data.toy import toy_pairs
from dfsbir.data.toy_shapes import TOY_CLASSES


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def encoders():
    "An untrained pair, {modality: Encoder}."
    return make_encoders()


@pytest.fixture(scope="session")
def toy():
    "(photos, sketches) of the toy test set, six more than the gallery holds."
    return toy_pairs(COUNT + 6, size=40, split="test")


@pytest.fixture
def photos(tmp_path, toy):
    "Toy photos as JPEG files in class folders."
    for i in range(COUNT):
        save(toy, i, tmp_path / "photos" / TOY_CLASSES[i % 10] / f"{i:02d}.jpg")
    return tmp_path / "photos"


@pytest.fixture
def gallery(tmp_path, photos, encoders):
    "A gallery of those photos, in a folder beside them."
    return index(tmp_path / "gallery", photos, encoders["photo"])
