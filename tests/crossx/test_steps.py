"""What a step costs without a clock: operations, and that nothing in it waits for the device.

The meta device stands in for a graphics card: its tensors have no values, so whatever would wait
for a value or copy it to the CPU raises, and so does whatever mixes both devices.
"""

import contextlib

import pytest
import torch
from crossx.helpers import CONFIGS, make_teacher
from inversion.counting import Counter

from dfsbir.core.types import MODALITIES
from dfsbir.crossx.build import build_crossx
from dfsbir.inversion.buffer import ReplayBuffer

META = torch.device("meta")
SELDOM = {"logging.log_every": 1000}  # values are read then, which waits


class MetaFabric:
    "A fabric that moves what it sets up to the meta device; everything is built on the CPU."

    world_size, global_rank, is_global_zero = 1, 0, True
    strategy = type("strategy", (), {"precision": None})

    def __init__(self):
        self.device = torch.device("cpu")

    def setup(self, net, optimizer):
        "To the meta device, where parameters are new objects."
        before = list(net.parameters())
        new = dict(zip(map(id, before), net.to(META).parameters()))
        for group in optimizer.param_groups:
            group["params"] = [new[id(p)] for p in group["params"]]
        return net, optimizer

    def to_device(self, batch):
        return type(batch)(x.to(self.device) for x in batch)

    def autocast(self):
        return contextlib.nullcontext()

    def backward(self, loss):
        loss.backward()


@pytest.fixture
def no_autocast(monkeypatch):
    "Autocast does not know the meta device."
    known, enabled = torch.autocast, torch.is_autocast_enabled

    def autocast(kind, *args, **options):
        return contextlib.nullcontext() if kind == "meta" else known(kind, *args, **options)

    monkeypatch.setattr(torch, "autocast", autocast)
    monkeypatch.setattr(
        torch, "is_autocast_enabled", lambda kind="cuda": kind != "meta" and enabled(kind)
    )


def on_meta(config):
    "A trainer whose networks, pairs and buffer are on the meta device."
    pair = [make_teacher(m, seed=k) for k, m in enumerate(MODALITIES)]
    fabric = MetaFabric()
    buffer = ReplayBuffer(config.buffer.capacity, 0, META)
    crossx = build_crossx(*pair, config, fabric=fabric, buffer=buffer)
    fabric.device = META
    for part in (*crossx.teachers.values(), crossx.distiller.queue):
        part.to(META)
    return crossx


CHANGES = [
    {},
    {"pairs.sketch.kind": "pixel"},
    {"pairs.loss.adversarial": 1.0},
    {"pairs.loss.one_hot": 1.0, "pairs.loss.activation": 1.0, "pairs.loss.class_balance": 1.0},
    {"students.head.kind": "joint", "students.loss.infonce": 1.0},
    {"students.loss.proxy_anchor": 1.0},
    {"students.head.kind": "feature", "students.loss.contrast": 1.0},
    {"students.optimizer.kind": "sgd", "pairs.optimizer.kind": "sgd"},
    {"students.start.kind": "cold"},
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: ",".join(c) or "preset")
def test_no_action_waits_for_the_device_or_mixes_it_with_the_cpu(no_autocast, change):
    crossx = on_meta(CONFIGS["dfsbir"].changed(SELDOM, change))
    for action in ("synthesize", "fill", "synthesize", "distill", "fill", "fill", "distill"):
        crossx.run_step(action)
    with pytest.raises(NotImplementedError):  # reading the values does wait
        crossx.pairs.terms.log()


@pytest.mark.parametrize("batch", [4, 32])
def test_few_operations_in_every_action_at_any_batch_size(teachers, batch):
    changes = dict.fromkeys(("pairs.batch", "students.batch", "schedule.new_pairs"), batch)
    config = CONFIGS["dfsbir"].changed(SELDOM, changes, {"buffer.capacity": 4 * batch})
    crossx = build_crossx(*teachers, config)
    bounds = {"synthesize": 3000, "fill": 1500, "distill": 1500}
    for action in (*bounds, *bounds, *bounds):
        with Counter() as counter:
            crossx.run_step(action)
        assert counter.count < bounds[action], action
