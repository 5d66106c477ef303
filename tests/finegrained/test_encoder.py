"""The encoder: unit vectors, heads, backbones by name, attention maps."""

import pytest
import torch

from dfsbir.core.config import ConfigError
from dfsbir.finegrained.encoder import EncoderConfig, attention_maps


@pytest.mark.parametrize(
    "name,size",
    (
        ("resnet10t", 32),
        ("vit_tiny_patch16_224", 32),
        ("vgg16", 32),
        ("inception_v3", 96),
        ("resnet50", 48),
        ("deit_tiny_patch16_224", 48),
        ("swin_tiny_patch4_window7_224", 64),
        ("coatnet_nano_rw_224", 64),
    ),
)
def test_other_backbones_by_name(name, size):
    "Those that the publication compares with, as timm offers them."
    encoder = EncoderConfig(size=size, backbone={"kind": "timm", "name": name}).build()
    ((a, b),) = encoder.outputs([torch.rand(2, 3, 40, 40)])
    assert a.shape == b.shape and torch.allclose(a.norm(dim=1), torch.ones(2), atol=1e-5)
    with pytest.raises(ValueError, match="pvt"):
        attention_maps(encoder, torch.rand(1, 3, 32, 32))


def test_attention_maps(tiny_encoder):
    encoder = tiny_encoder()
    maps = attention_maps(encoder, torch.rand(3, 1, 48, 48))
    assert set(maps) == {"discriminative", "distillation"} and encoder.training
    for images in maps.values():
        assert images.shape == (3, 48, 48) and (images >= 0).all()
        assert torch.allclose(images.sum((1, 2)), torch.ones(3), atol=1e-4)


@pytest.mark.parametrize("head,dim", (("discriminative", 16), ("distillation", 16), ("both", 32)))
def test_heads(tiny_encoder, head, dim):
    embedding = tiny_encoder(head=head)(torch.rand(2, 1, 28, 28))
    assert embedding.shape == (2, dim)
    assert torch.allclose(embedding.norm(dim=1), torch.ones(2), atol=1e-5)


@pytest.mark.parametrize("setting, value", [("head", "third"), ("channels", 2), ("size", 3)])
def test_settings_that_fit_no_encoder_are_refused(setting, value):
    with pytest.raises(ConfigError, match=setting):
        EncoderConfig(**{setting: value})
