"Nets by name, their pretrained weights, and the input that their sources know."

from urllib.error import URLError

import pytest
import timm
import torch
import torchvision
from teachers.helpers import noise

from dfsbir.teachers.nets import build_net, input_of, source_statistics

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5,) * 3,) * 2


def test_unknown_nets_are_named():
    with pytest.raises(ValueError, match="hub"):
        build_net("hub", "x", 3)
    with pytest.raises(ValueError, match="huge"):
        build_net("dfsbir", "huge", 3)


@pytest.mark.parametrize(
    "name",
    [
        "small",
        "wide",
        "medium",
        "deep",
        "fine",
        "plain",
        "grey",
        "tiny",
        "small-gn",
        "grey-gn",
        "tiny-gn",
    ],
)
def test_our_nets_give_logits(name):
    net = build_net("dfsbir", name, 4).eval()
    channels = 1 if name.startswith("grey") else 3
    assert net(noise(2, channels, 28)).shape == (2, 4)


def test_pretrained_weights_of_torchvision(monkeypatch):
    weights = torchvision.models.MobileNet_V3_Small_Weights
    made = torchvision.models.mobilenet_v3_small().state_dict()
    monkeypatch.setattr(weights, "get_state_dict", lambda self, *a, **k: made)
    net = build_net("torchvision", "mobilenet_v3_small", 5, pretrained=True)
    assert torch.equal(net.features[0][0].weight, made["features.0.0.weight"])
    assert net.classifier[3].out_features == 5


def test_weights_that_cannot_be_fetched(monkeypatch):
    def broken(self, *a, **k):
        raise URLError("no route")

    monkeypatch.setattr(torchvision.models.MobileNet_V3_Small_Weights, "get_state_dict", broken)
    with pytest.raises(
        ConnectionError, match="mobilenet_v3_small.*no route.*dfsbir inspect.*load_teacher"
    ):
        build_net("torchvision", "mobilenet_v3_small", 5, pretrained=True)

    def offline(*a, **k):
        raise OSError("offline")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ConnectionError, match="timm/test_resnet.*offline"):
        build_net("timm", "test_resnet", 5, pretrained=True)


def test_a_net_of_timm():
    assert build_net("timm", "test_resnet", 5)(noise(1, size=64)).shape == (1, 5)


@pytest.mark.parametrize(
    "source, name, wanted",
    [
        ("torchvision", "resnet18", IMAGENET),
        ("torchvision", "mobilenet_v2", IMAGENET),
        ("torchvision", "efficientnet_v2_l", HALF),
        ("timm", "resnet10t", IMAGENET),
        ("timm", "vit_tiny_patch16_224", HALF),
        ("dfsbir", "small", HALF),
        ("efficientnet-lite", "lite0", HALF),
        ("timm", "no_such_net", None),
    ],
)
def test_the_statistics_that_a_source_knows(source, name, wanted):
    assert source_statistics(source, name) == wanted


def test_the_input_of_a_net():
    vit = input_of("timm", 224, name="vit_tiny_patch16_224")
    assert vit.mean.flatten().tolist() == [0.5] * 3 and vit.size == 224
    with pytest.raises(ValueError, match="name"):
        input_of("torchvision", 224)
    assert input_of("dfsbir", 28, build_net("dfsbir", "grey", 3)).channels == 1
