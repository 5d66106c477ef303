"""Fixtures of the tests of the commands: a notebook to sweep, a run with encoders, toy files."""

import pytest
from app.helpers import BODY, PARAMETERS, SIDE, call, notebook_of, untrained_pair
from conftest import ROOT
from torchvision.utils import save_image

from dfsbir.core.types import MODALITIES
from dfsbir.data.toy import toy_pairs
from dfsbir.data.toy_shapes import TOY_CLASSES
from dfsbir.students.encoder import save_encoders


@pytest.fixture
def place(tmp_path, monkeypatch):
    "A folder with a small experiment, small.ipynb, in which the test runs."
    (tmp_path / "small.ipynb").write_text(notebook_of(PARAMETERS, BODY))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    "A run folder with a pair of untrained encoders."
    folder = tmp_path_factory.mktemp("run")
    save_encoders(folder / "encoders", untrained_pair())
    return folder


@pytest.fixture
def folders(tmp_path):
    "Toy test images as class folders of photos and sketches, and the folder they are in."
    for m, data in zip(MODALITIES, toy_pairs(20, size=SIDE, split="test")):
        for i in range(20):
            place = tmp_path / m / TOY_CLASSES[i % 10]
            place.mkdir(parents=True, exist_ok=True)
            save_image(data[i][0], place / f"{i}.png")
    return tmp_path


@pytest.fixture
def gallery(run, folders, capsys):
    "The folder that `dfsbir index` made of 20 photos."
    words = ("--workers", 0, "--device", "cpu")
    place = folders / "gallery"
    assert call("index", folders / "photo", "--run", run, "--gallery", place, *words) == 0
    text = capsys.readouterr().out
    assert "20 photos, 20 embedded, 0 known, 0 gone, 0 broken" in text
    return place
