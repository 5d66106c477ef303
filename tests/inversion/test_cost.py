"Cost without a clock: operations of an estimator step; nothing in it waits for a device."

import pytest
import torch
from inversion.counting import Counter

from dfsbir.core.device import make_fabric
from dfsbir.core.types import MODALITIES
from dfsbir.data.procedural import procedural_objects
from dfsbir.data.toy_shapes import TOY_CLASSES
from dfsbir.inversion.buffer import ReplayBuffer
from dfsbir.inversion.estimator import PairEstimator
from dfsbir.inversion.generators import PixelGenerator, StrokeGenerator
from dfsbir.inversion.guidance import ImageGuide
from dfsbir.inversion.objective import EstimatorLoss
from dfsbir.losses.weighted_sum import WeightedLoss
from dfsbir.teachers.class_map import align_classes
from dfsbir.teachers.nets import build_net, input_of
from dfsbir.teachers.teacher import Teacher

CLASSES = list(TOY_CLASSES[:4])


def whole_estimator(students_of, batch=16, size=32, device="cpu"):
    "A stroke and a pixel generator with all terms on; teachers and guide are untrained."
    teachers = {}
    for m in MODALITIES:
        net = build_net("dfsbir", "tiny", len(CLASSES))
        teachers[m] = Teacher(net, CLASSES, input_of("dfsbir", size), m).to(device)
    guide = ImageGuide().freeze("procedural", "untrained").to(device)
    return PairEstimator(
        PixelGenerator(len(CLASSES), 3, size),
        StrokeGenerator(len(CLASSES), size),
        EstimatorLoss(teachers, align_classes(CLASSES, CLASSES), guide, students_of),
        WeightedLoss(dict.fromkeys(EstimatorLoss.TERMS, 1.0)),
        make_fabric(device),
        batch=batch,
        patience=1000,
    )


def students_on_device():
    "Students whose scale is made where the batch is."

    def log_posteriors(batch):
        scale = torch.arange(4.0, device=batch.label.device)
        brightness = {m: batch.of(m).mean((1, 2, 3))[:, None] for m in MODALITIES}
        return {m: (b * scale).log_softmax(1) for m, b in brightness.items()}

    return log_posteriors


@pytest.mark.parametrize("batch,size", [(8, 32), (64, 32), (250, 32), (4, 96)])
def test_few_operations_in_a_step_at_any_batch_size(students_of, batch, size):
    estimator = whole_estimator(students_of, batch, size)
    estimator.run_step()
    with Counter() as counter:
        estimator.run_step()
    assert counter.count < 3000


def test_nothing_in_a_step_waits_for_the_device():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: the CPU waits for nothing")
    estimator = whole_estimator(students_on_device(), device="cuda")
    buffer = ReplayBuffer(40, device="cuda")
    for _ in range(4):
        estimator.run_step()
        buffer.add(estimator.sample(16))
        buffer.sample(8)
    procedural_objects(4, device="cuda")
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        estimator.run_step()
        buffer.add(estimator.sample(16))
        buffer.sample(8)
        procedural_objects(4, device="cuda")
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    assert all(v == v for v in estimator.terms.log().values())
