"What the tests of the inversion folder share: one thread, one seed, small teachers, image folders."

import pytest
import torch
from torch import nn
from torchvision.utils import save_image

from dfsbir.core.types import MODALITIES, PairBatch
from dfsbir.data.toy import toy_pairs
from dfsbir.data.toy_shapes import TOY_CLASSES
from dfsbir.teachers.nets import input_of
from dfsbir.teachers.teacher import Teacher
from dfsbir.teachers.training import train_teacher

SIDE, CLASSES = 32, list(TOY_CLASSES[:4])


@pytest.fixture(autouse=True)
def one_thread_one_seed():
    "Every test starts from the same random numbers and computes on one thread."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def teachers():
    "A photo and a sketch teacher of four toy classes at 32 px."
    return {
        d.modality: train_teacher(d, net="tiny", epochs=2, progress=False)
        for d in toy_pairs(120, size=SIDE, classes=CLASSES)
    }


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    "A folder of toy photos and one of toy sketches, each with subfolders."
    top = tmp_path_factory.mktemp("guidance")
    for data in toy_pairs(25, size=SIDE, seed=9):
        for i, x in enumerate(data.images()):
            folder = top / data.modality / str(i % 3)
            folder.mkdir(parents=True, exist_ok=True)
            save_image(x, folder / f"{i}.png")
    return top / "photo", top / "sketch"


@pytest.fixture
def no_norm_teacher():
    "A function modality -> an untrained teacher without batch norm."

    def make(modality):
        net = nn.Sequential(
            nn.Conv2d(3, 4, 3, 2),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, len(CLASSES)),
        )
        return Teacher(net, CLASSES, input_of(None, SIDE), modality)

    return make


@pytest.fixture
def students_of():
    "A function PairBatch -> log posteriors that follow the brightness of the images."

    def log_posteriors(batch):
        scale = torch.arange(4.0)
        return {
            m: (batch.of(m).mean((1, 2, 3))[:, None] * scale).log_softmax(1) for m in MODALITIES
        }

    return log_posteriors


@pytest.fixture
def random_pairs():
    "A function (labels, side) -> a batch of random pairs."

    def make(labels, size=6):
        n = len(labels)
        photos, sketches = torch.rand(n, 3, size, size), torch.rand(n, 1, size, size)
        return PairBatch(photos, sketches, torch.as_tensor(labels))

    return make
