"""What the tests of teachers share: class folders of toy images, and the data of such folders."""

import pytest
from torchvision.utils import save_image

from dfsbir.core.types import MODALITIES
from dfsbir.data.toy import toy_pairs
from dfsbir.data.toy_shapes import TOY_CLASSES
from dfsbir.teachers.experiment_data import FolderData


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    "Class folders of toy images, by split and modality."
    top = tmp_path_factory.mktemp("folders")
    for split in ("train", "test"):
        for m, data in zip(
            MODALITIES, toy_pairs(12, size=28, classes=TOY_CLASSES[:3], split=split)
        ):
            for i, (x, label) in enumerate(data):
                folder = top / split / m / TOY_CLASSES[label]
                folder.mkdir(parents=True, exist_ok=True)
                save_image(x, folder / f"{i}.png")
    return top


@pytest.fixture
def folder_data(folders):
    "The data of an experiment in these folders."
    train, test = ({m: str(folders / split / m) for m in MODALITIES} for split in ("train", "test"))
    return FolderData(train, test, 28)
