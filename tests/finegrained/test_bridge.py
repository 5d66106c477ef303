"""From CrossX encoders to a fine-grained one."""

import math

import pytest
import torch

from dfsbir.core.types import MODALITIES
from dfsbir.finegrained.bridge import bridge_encoder
from dfsbir.finegrained.evaluation import embed_pair
from dfsbir.finegrained.saving import load_fine, save_fine
from dfsbir.finegrained.trainer import FineGrained
from dfsbir.students.encoder import HeadSpec, encoder_from_teacher, save_encoders
from dfsbir.students.heads import MetricSpace
from dfsbir.teachers.class_map import align_classes
from dfsbir.teachers.nets import build_net, input_of
from dfsbir.teachers.teacher import Teacher


def crossx_encoders(folder, kind):
    "Untrained CrossX encoders with a kind of head, written to a folder."
    classes = ["cup", "fish", "house"]
    class_map, space = align_classes(classes, classes), MetricSpace.random(3, 8)
    layers = ["blocks.0.bn1"] if kind == "intermediate" else []
    encoders = {}
    for modality in MODALITIES:
        net, card = build_net("dfsbir", "tiny", 3), dict(source="dfsbir", name="tiny")
        teacher = Teacher(net, classes, input_of("dfsbir", 28), modality, card=card)
        head = HeadSpec(kind, layers=layers)
        encoders[modality] = encoder_from_teacher(teacher, class_map, space, head)
    save_encoders(folder, encoders)
    return encoders


@pytest.fixture(params=("posterior", "feature", "joint", "intermediate"))
def crossx(tmp_path, request):
    "(folder, encoders) of a CrossX run."
    return tmp_path / "crossx", crossx_encoders(tmp_path / "crossx", request.param)


def same(a, b):
    return all(torch.equal(value, b[name]) for name, value in a.items())


def test_it_starts_from_the_trained_nets(crossx, tiny_config):
    folder, encoders = crossx
    config = tiny_config("triplet-intra")
    bridged, fresh = (bridge_encoder(folder, config, warm) for warm in (True, False))
    for modality, encoder in encoders.items():
        trained = encoder.state_dict()
        assert same(trained, bridged.features.nets[modality].state_dict())
        assert not same(trained, fresh.features.nets[modality].state_dict())


def test_it_is_trained_and_kept_as_any_other(crossx, tiny_config, toy, tmp_path):
    config = tiny_config("triplet-intra")
    bridged = bridge_encoder(crossx[0], config).eval()
    first, second = zip(*bridged.outputs([images.images()[:3] for images in toy]))
    assert all(feature.shape == (3, 128) for feature in (*first, *second))
    method = FineGrained(config, *toy, start=bridged)
    assert all(math.isfinite(value) for value in method.step().values())
    assert method.encoder is bridged
    save_fine(tmp_path / "bridged.safetensors", bridged)
    again = load_fine(tmp_path / "bridged.safetensors")
    for a, b in zip(embed_pair(bridged, *toy), embed_pair(again, *toy)):
        assert torch.equal(a, b)


def test_it_can_have_the_higher_order_distance(tmp_path, tiny_config, toy):
    crossx_encoders(tmp_path / "crossx", "posterior")
    bridged = bridge_encoder(tmp_path / "crossx", tiny_config("holef")).eval()
    save_fine(tmp_path / "bridged.safetensors", bridged)
    again = load_fine(tmp_path / "bridged.safetensors")
    for a, b in zip(embed_pair(bridged, *toy), embed_pair(again, *toy)):
        assert a.shape[1] == 129 and torch.equal(a, b)
