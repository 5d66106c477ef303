"""Fixtures of the fine-grained tests: a tiny net, toy pairs, a teacher, methods by name."""

import pytest
import torch

from dfsbir.data.toy import toy_pairs
from dfsbir.finegrained.config import FineGrainedConfig
from dfsbir.finegrained.encoder import EncoderConfig
from dfsbir.finegrained.trainer import FineGrained

STAGES = {
    "embed_dims": [8, 16],
    "depths": [1, 1],
    "num_heads": [1, 2],
    "mlp_ratios": [2, 2],
    "sr_ratios": [2, 1],
}
TINY = {
    "device": "cpu",
    "encoder.size": 28,
    "training.epochs": 2,
    "training.epoch_steps": 2,
    "training.lr_warmup_steps": 1,
    **{f"encoder.backbone.{name}": values for name, values in STAGES.items()},
}
BATCHES = {"pairs.batch": 6, "unlabelled.batch": 8, "distillation.k": 3}


@pytest.fixture(scope="session")
def stages():
    "Settings of a pyramid with two small stages."
    return STAGES


@pytest.fixture(scope="session")
def tiny_config():
    "The function tiny_config(preset, **changes) -> a FineGrainedConfig that trains in a second."

    def make(preset, **changes):
        flat = FineGrainedConfig.preset(preset).flat()
        batches = {name: value for name, value in BATCHES.items() if name in flat}
        return FineGrainedConfig.preset(preset, TINY, batches, changes)

    return make


@pytest.fixture(scope="session")
def tiny_encoder():
    "The function tiny_encoder(**changes) -> an encoder with the small pyramid, in training mode."

    def make(**changes):
        backbone = {f"backbone.{name}": values for name, values in STAGES.items()}
        return EncoderConfig(size=28).changed(backbone, changes).build()

    return make


@pytest.fixture(scope="session")
def toy():
    "16 toy pairs to learn from."
    return toy_pairs(16, 28, seed=3, classes=["cup", "fish"])


@pytest.fixture(scope="session")
def test_toy():
    "8 toy pairs to test on."
    return toy_pairs(8, 28, seed=3, classes=["cup", "fish"], split="test")


@pytest.fixture(scope="session")
def teacher(tiny_encoder):
    "An untrained teacher."
    torch.manual_seed(5)
    return tiny_encoder().eval()


@pytest.fixture(scope="session")
def make_method(toy, tiny_config):
    "The function make_method(preset, teacher=None, **changes) -> a FineGrained on the toy pairs."

    def make(preset, teacher=None, **changes):
        config = tiny_config(preset, **changes)
        return FineGrained(
            config,
            *(toy if config.pairs else ()),
            unlabelled=toy[0] if config.unlabelled else None,
            teacher=teacher if config.distillation else None,
        )

    return make
