"""What the tests of the crossx folder share: one thread, two teachers that have seen pictures."""

import pytest
import torch
from crossx.helpers import CLASSES, make_teacher

from dfsbir.core.types import MODALITIES
from dfsbir.data.toy import toy_pairs


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def teachers():
    "Two small nets whose batch norms have seen pictures."
    made = [make_teacher(m, seed=k) for k, m in enumerate(MODALITIES)]
    for teacher, data in zip(made, toy_pairs(40, size=28, classes=CLASSES)):
        teacher.net.train()
        with torch.no_grad():
            for _ in range(20):
                teacher.net(teacher.normalizer(data.images()))
        teacher.net.eval()
    return made
