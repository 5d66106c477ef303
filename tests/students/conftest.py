"One thread, one seed, and two untrained teachers."

import pytest
import torch
from students.helpers import PHOTO, SIDE, SKETCH

from dfsbir.core.types import MODALITIES
from dfsbir.teachers.nets import build_net, input_of
from dfsbir.teachers.teacher import Teacher


@pytest.fixture(autouse=True)
def one_thread_one_seed():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def teachers():
    torch.manual_seed(0)
    found = {}
    for m, names in zip(MODALITIES, (PHOTO, SKETCH), strict=True):
        net, card = build_net("dfsbir", "tiny", len(names)), dict(source="dfsbir", name="tiny")
        found[m] = Teacher(net, names, input_of("dfsbir", SIDE), m, card=card)
    return found
