"""Fine-grained retrieval: oracles of the token net, the losses and the ranks; what the trainer promises."""

import json
import math
import os
import subprocess
import sys
from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision

from dfsbir.core.checkpoint import read_card, save_state
from dfsbir.core.run_folder import RunFolder
from dfsbir.core.types import MODALITIES
from dfsbir.data.image_set import ImageSet
from dfsbir.data.toy import toy_pairs
from dfsbir.evaluation.results import read_results
from dfsbir.evaluation.retrieval import accuracy_at
from dfsbir.finegrained.backbone import FineEncoder, TokenPVT, _attend, _mix
from dfsbir.finegrained.bridge import bridge_encoder, pretext_of
from dfsbir.finegrained.config import FINE_PRESETS, FineGrainedConfig
from dfsbir.finegrained.evaluation import (
    InstanceReport,
    bootstrap,
    embed_pair,
    evaluate_instances,
    true_ranks,
)
from dfsbir.finegrained.instances import PERMUTATIONS, InstancePairs, puzzle, split_instances
from dfsbir.finegrained.losses import (
    HigherOrder,
    distances,
    neighbour_loss,
    relational_loss,
    triplet_loss,
)
from dfsbir.finegrained.plots import compare_runs, sensitivity, show_ranks, stability
from dfsbir.finegrained.structure import Structure, edge_maps, line_art
from dfsbir.finegrained.trainer import FineGrained, load_fine, save_fine, spread

SMALL = {
    "embed_dims": [8, 16],
    "depths": [1, 1],
    "num_heads": [1, 2],
    "mlp_ratios": [2, 2],
    "sr_ratios": [2, 1],
}
TINY = dict(
    backbone_args=json.dumps(SMALL),
    size=28,
    batch=6,
    unlabelled_batch=8,
    k=3,
    epochs=2,
    epoch_steps=2,
    warmup=1,
    device="cpu",
)


@pytest.fixture(scope="module")
def toy():
    return toy_pairs(16, 28, seed=3, classes=["cup", "fish"])


@pytest.fixture(scope="module")
def test_toy():
    return toy_pairs(8, 28, seed=3, classes=["cup", "fish"], split="test")


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(5)
    return FineEncoder(size=28, channels=1, args=SMALL).eval()


def make(preset, toy, teacher=None, **changes):
    config = FineGrainedConfig.preset(preset, **{**TINY, **changes})
    return FineGrained(
        config,
        *(toy if config.labelled else ()),
        unlabelled=toy[0] if config.unlabelled else None,
        teacher=teacher if config.distils else None,
    )


# ---- the token net


def small_pvt(**changes):
    torch.manual_seed(0)
    return TokenPVT("pvt_v2_b0", **{**{k: tuple(v) for k, v in SMALL.items()}, **changes}).eval()


@pytest.mark.parametrize("linear", (False, True))
@torch.no_grad()
def test_without_a_token_it_is_timms_net(linear):
    net, x = small_pvt(linear=linear, sr_ratios=(4, 1)), torch.rand(2, 3, 64, 64)
    y, none = net.net.patch_embed(x), lambda y: y[:, :0]
    for i, stage in enumerate(net.net.stages):
        if i:
            y = stage.downsample(y)
        size = tuple(y.shape[1:3])
        y = y.flatten(1, 2)
        for b in stage.blocks:
            h = b.norm1(y)
            y = y + _attend(b.attn, h, none(h), size, None)
            h = b.norm2(y)
            y = y + _mix(b.mlp, h, none(h), size)
        y = stage.norm(y).transpose(1, 2).unflatten(2, size)
    assert torch.allclose(y, net.net.forward_features(x), atol=1e-5)


@torch.no_grad()
def test_attention_with_the_token_slowly():
    "Every patch and the token ask; the answers come from each window of the map, and from the token."
    attn = small_pvt().net.stages[0].blocks[0].attn
    patches, token, r = torch.randn(1, 16, 8), torch.randn(1, 1, 8), 2
    windows = [
        attn.norm(
            attn.sr(
                patches.view(1, 4, 4, 8).permute(0, 3, 1, 2)[:, :, i : i + r, j : j + r]
            ).flatten()
        )
        for i in (0, 2)
        for j in (0, 2)
    ]
    answer = torch.stack([*windows, token[0, 0]])
    k, v = attn.kv(answer).split(8, 1)
    slow = []
    for ask in torch.cat([patches, token], 1)[0]:
        w = torch.softmax(attn.q(ask) @ k.T / math.sqrt(8), 0)
        slow.append(attn.proj(sum(w[j] * v[j] for j in range(5))))
    seen = []
    out = _attend(attn, patches, token, (4, 4), seen)[0]
    assert torch.allclose(out, torch.stack(slow), atol=1e-5)
    assert (
        seen[0][0].shape == (1, 17, 5)
        and seen[0][1] == (2, 2)
        and torch.allclose(seen[0][0].sum(2), torch.ones(1, 17))
    )


@torch.no_grad()
def test_the_depthwise_convolution_sees_the_token_as_one_pixel():
    mlp = small_pvt().net.stages[0].blocks[0].mlp
    token = torch.randn(2, 1, 8)
    assert torch.allclose(
        _mix(mlp, torch.zeros(2, 4, 8), token, (2, 2))[:, -1:], mlp(token, (1, 1)), atol=1e-6
    )


@pytest.mark.parametrize("size", ((28, 28), (33, 50), (64, 64), (97, 20)))
def test_any_input_size(size):
    net = small_pvt(sr_ratios=(8, 4)).train()
    first, second = net(torch.rand(2, 3, *size))
    assert first.shape == second.shape == (2, 16)
    (first.sum() + second.sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_the_token_is_carried_through_every_stage():
    net, x = small_pvt(), torch.rand(2, 3, 32, 32)
    first, second = net(x)
    with torch.no_grad():
        net.tokens[0].add_(5 * torch.randn(net.tokens[0].shape))
    one, two = net(x)
    assert (two - second).abs().max() > 1e-5 and (one - first).abs().max() > 1e-5, (
        "the first stage's token reaches the last, and the patches see it"
    )
    assert (second[0] - second[1]).abs().max() > 1e-6, "the token depends on the image"


def test_a_token_wants_a_pvt():
    with pytest.raises(ValueError, match="pvt_v2"):
        TokenPVT("resnet18")


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
    encoder = FineEncoder(name, size, 1)
    ((a, b),) = encoder.outputs([torch.rand(2, 3, 40, 40)])
    assert a.shape == b.shape and torch.allclose(a.norm(dim=1), torch.ones(2), atol=1e-5)
    with pytest.raises(ValueError, match="token net"):
        encoder.attention(torch.rand(1, 3, 32, 32))


def test_a_backbone_that_wants_larger_pictures():
    with pytest.raises(ValueError, match="inception_v3 cannot take pictures of 48 px"):
        FineEncoder("inception_v3", 48, 1)


def test_attention_maps():
    encoder, x = FineEncoder(size=32, args=SMALL), torch.rand(3, 1, 48, 48)
    maps = encoder.attention(x)
    assert set(maps) == {"discriminative", "distillation"} and encoder.training
    for m in maps.values():
        assert (
            m.shape == (3, 48, 48)
            and torch.allclose(m.sum((1, 2)), torch.ones(3), atol=1e-4)
            and (m >= 0).all()
        )


@pytest.mark.parametrize(
    "readout,dim", (("discriminative", 16), ("distillation", 16), ("both", 32))
)
def test_readouts(readout, dim):
    f = FineEncoder(size=28, args=SMALL, readout=readout)(torch.rand(2, 1, 28, 28))
    assert f.shape == (2, dim) and torch.allclose(f.norm(dim=1), torch.ones(2), atol=1e-5)
    with pytest.raises(ValueError, match="readout"):
        FineEncoder(size=28, args=SMALL, readout="third")


# ---- losses


@pytest.mark.parametrize("margin", (0.0, 0.3, 2.0))
def test_triplet_loss_slowly(margin):
    torch.manual_seed(1)
    a, b, ids = torch.randn(5, 6), torch.randn(7, 6), torch.tensor([0, 1, 2, 3, 4])
    other = torch.tensor([0, 1, 2, 3, 4, 1, 9])
    u, v = F.normalize(a, dim=1), F.normalize(b, dim=1)
    terms = [
        max(0.0, margin + (u[i] - v[j]).norm().item() - (u[i] - v[k]).norm().item())
        for i in range(5)
        for j in range(7)
        for k in range(7)
        if other[j] == ids[i] and other[k] != ids[i]
    ]
    on = [t for t in terms if t > 0]
    assert triplet_loss(a, b, ids, other, margin).item() == pytest.approx(
        sum(on) / len(on), abs=1e-4
    )


def test_triplet_loss_where_both_sides_have_one_tensor_of_ids():
    "The library takes the same tensor to mean the same set, and finds no positive in it."
    torch.manual_seed(2)
    a, b, ids = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6), torch.arange(4)
    loss = triplet_loss(a, b, ids, ids, 0.5)
    assert (
        loss.item() == pytest.approx(triplet_loss(a, b, ids, ids.clone(), 0.5).item())
        and loss > 0.1
    )
    loss.backward()
    assert a.grad.abs().sum() > 0
    assert triplet_loss(b, b, ids, ids, 0.01).item() == 0, "a perfect embedding costs nothing"


def test_batch_hard_slowly():
    torch.manual_seed(3)
    a, b, ids = (
        F.normalize(torch.randn(5, 6), dim=1),
        F.normalize(torch.randn(5, 6), dim=1),
        torch.arange(5),
    )
    d = torch.cdist(a, b)
    terms = [d[i, i] - min(d[i, k] for k in range(5) if k != i) + 1.0 for i in range(5)]
    on = [t for t in terms if t > 0]
    assert triplet_loss(a, b, ids, ids, 1.0, "batch-hard").item() == pytest.approx(
        (sum(on) / len(on)).item(), abs=1e-4
    )
    with pytest.raises(ValueError, match="miner"):
        triplet_loss(a, b, ids, ids, 1.0, "soft")


def test_neighbour_loss_slowly():
    torch.manual_seed(4)
    s, t, tau, k = torch.rand(4, 4) + 0.1, torch.rand(4, 4) + 0.1, 0.2, 2
    itself, total = torch.eye(4, dtype=torch.bool), 0.0
    for i in range(4):
        near = sorted((j for j in range(4) if j != i), key=lambda j: t[i, j])[:k]
        p, q = (torch.softmax(torch.stack([-x[i, j] / tau for j in near]), 0) for x in (t, s))
        total += (p * (p / q).log()).sum() / 4
    assert neighbour_loss(s, t, k, tau, itself).item() == pytest.approx(total.item(), abs=1e-5)
    assert neighbour_loss(t, t, k, tau, itself).item() == pytest.approx(0.0, abs=1e-6)
    assert neighbour_loss(t + 3.0, t, k, tau, itself).item() == pytest.approx(0.0, abs=1e-5), (
        "distances count among each other"
    )
    for k, says in ((1, "wanted 2 to 3"), (4, "wanted 2 to 3")):
        with pytest.raises(ValueError, match=says):
            neighbour_loss(s, t, k, tau, itself)
    with pytest.raises(ValueError, match="same anchors"):
        neighbour_loss(s, t[:3], 2)


def test_gradients_of_the_distillation():
    x = F.normalize(torch.randn(6, 4), dim=1).requires_grad_()
    for loss in (
        lambda d: neighbour_loss(d, torch.rand(6, 6), 3, 0.1, torch.eye(6, dtype=torch.bool)),
        lambda d: relational_loss(d, torch.rand(6, 6)),
    ):
        (g,) = torch.autograd.grad(loss(distances(x, x)), x)
        assert g.isfinite().all() and g.abs().sum() > 0


def test_relational_loss_has_no_unit():
    torch.manual_seed(5)
    d = torch.rand(5, 5) + 0.1
    assert (
        relational_loss(7 * d, d).item() == pytest.approx(0.0, abs=1e-6)
        and relational_loss(torch.rand(5, 5) + 0.1, d) > 0
    )


def test_higher_order_slowly():
    torch.manual_seed(6)
    h, s, p = (
        HigherOrder(3),
        F.normalize(torch.randn(4, 3), dim=1),
        F.normalize(torch.randn(5, 3), dim=1),
    )
    assert torch.allclose(h.assignment(s, p), torch.cdist(s, p), atol=1e-3), (
        "the identity at first: Euclidean distance"
    )
    with torch.no_grad():
        h.offset.normal_()
    slow = torch.tensor(
        [
            [
                math.sqrt(
                    sum(
                        h.weight[i, j].item() * (a[i] - b[j]).item() ** 2
                        for i in range(3)
                        for j in range(3)
                    )
                )
                for b in p
            ]
            for a in s
        ]
    )
    assert torch.allclose(h.assignment(s, p), slow, atol=1e-4)
    assert ((h.query(s) @ h.gallery(p).T).argsort(1, descending=True) == slow.argsort(1)).all(), (
        "an inner product ranks alike"
    )
    ids = torch.arange(4)
    loss = triplet_loss(s, p[:4], ids, ids, 0.5, metric=h.metric())
    terms = [
        max(0.0, 0.5 + slow[i, i].item() - slow[i, k].item())
        for i in range(4)
        for k in range(4)
        if i != k
    ]
    assert loss.item() == pytest.approx(
        sum(t for t in terms if t > 0) / sum(t > 0 for t in terms), abs=1e-4
    )
    loss.backward()
    assert h.offset.grad.abs().sum() > 0


# ---- pictures


def test_structure():
    x, s = torch.rand(4, 3, 32, 32), Structure()
    assert s(x, 0.0) is x
    a, b = (s(x, 1.0, torch.Generator().manual_seed(1)) for _ in range(2))
    assert (
        torch.equal(a, b)
        and a.shape == x.shape
        and a.min() >= 0
        and a.max() <= 1
        and not torch.allclose(a, x, atol=0.05)
    )
    one = torch.full((3, 3, 32, 32), 0.3) * torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1)
    assert torch.allclose(s(one), one, atol=1e-5), (
        "colour is left alone, and new ground is the border's"
    )


def test_lines_grow_by_the_same_share_at_any_size():
    "Up to `width` pixels in 64 either way, on each side of a bar."
    width = Structure(turn=0, stretch=0, shear=0, shift=0, bend=0, drop=0)

    def spread(side):
        x = torch.ones(200, 1, side, side)
        x[..., side // 2 - side // 16 : side // 2 + side // 16] = 0
        ink = (
            (1 - width(x, 1.0, torch.Generator().manual_seed(0))[:, 0, side // 2]).sum(1)
            * 64
            / side
        )
        return ink.min().item(), ink.max().item()

    small, large = spread(64), spread(256)
    assert (
        small[0] < 7.1
        and small[1] > 9.4
        and large[0] < 7.1
        and large[1] > 9.4
        and max(small[1], large[1]) <= 9.7
        and min(small[0], large[0]) >= 6.3
    )


def test_line_art_keeps_lines_dark():
    x = torch.ones(1, 1, 256, 256)
    x[:, :, 128, 40:200] = 0
    x[:, :, 0] = 0.9  # a frame
    small = line_art(ImageSet(x, [0], ["a"], "sketch", instances=[7]), 64)
    assert (
        small.size == 64
        and small.instances.tolist() == [7]
        and small.images().min() < 0.55
        and small.images()[:, :, :20].min() == 1
    )
    assert F.interpolate(x, (64, 64), mode="area").min() > 0.7, (
        "made smaller alone, the line all but vanishes"
    )


def test_edge_maps(toy):
    pytest.importorskip("skimage")
    x = torch.ones(2, 3, 48, 48)
    x[:, :, 12:36, 12:36] = 0.2
    e = edge_maps(ImageSet(x, [0, 0], ["a"], "photo", instances=[3, 4])).images()
    dark = (e[0, 0] < 0.5).nonzero()
    assert e.unique().tolist() == [0, 1] and 60 < len(dark) < 140 and torch.equal(e[0, 0], e[0, 2])
    assert ((dark - 23.5).abs().max(1).values - 12).abs().max() <= 2, (
        "the lines are the square's sides"
    )


def test_puzzles():
    assert len(PERMUTATIONS) == 24 and PERMUTATIONS[0].tolist() == [0, 1, 2, 3]
    x = torch.arange(16.0).view(1, 1, 4, 4).expand(24, -1, -1, -1)
    y = puzzle(x, torch.arange(24))
    assert (
        torch.equal(y[0], x[0])
        and len({tuple(v.flatten().tolist()) for v in y}) == 24
        and torch.equal(y[23, 0, :2, :2], x[0, 0, 2:, 2:])
    )


# ---- pairs


def several(n=6, each=3):
    photos = ImageSet(
        torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 3, 28, 28).clone(),
        [0] * n,
        ["a"],
        "photo",
        instances=[10 + i for i in range(n)],
    )
    ids = [i for i in range(n) for _ in range(each)]
    pixels = (
        torch.tensor([50 + 10 * i + k for i in range(n) for k in range(each)], dtype=torch.uint8)
        .view(-1, 1, 1, 1)
        .expand(-1, 1, 28, 28)
        .clone()
    )
    return photos, ImageSet(
        pixels, [0] * len(ids), ["a"], "sketch", instances=[10 + i for i in ids]
    )


def test_several_sketches_a_photo():
    pairs = InstancePairs(*several())
    photo, first, second, at = pairs.draw(torch.arange(6), torch.Generator().manual_seed(0))
    assert (
        torch.equal((first[:, 0, 0, 0].long() - 50) // 10, at)
        and torch.equal((second[:, 0, 0, 0].long() - 50) // 10, at)
        and torch.equal(photo[:, 0, 0, 0].long(), at)
    )
    assert (first != second).all(), "the positive is another sketch"
    _, first, second, _ = InstancePairs(*several(each=1)).draw(torch.arange(6), torch.Generator())
    assert torch.equal(first, second), "where there is one alone, it is its own"


def test_pairs_refuse():
    photos, sketches = several()
    with pytest.raises(ValueError, match="have no photo, the first is 10"):
        InstancePairs(photos.take(slice(1, None)), sketches)
    with pytest.raises(ValueError, match="repeat an instance"):
        InstancePairs(photos.take([0, 0, 1]), sketches)
    with pytest.raises(ValueError, match="with instances"):
        InstancePairs(ImageSet(photos.images(), photos.labels, ["a"], "photo"), sketches)
    assert len(InstancePairs(photos, sketches.take(slice(0, 3)))) == 1, (
        "a photo that nobody drew is no pair"
    )


def test_split_instances():
    photos, sketches = several(10)
    (p, s), (vp, vs) = split_instances(photos, sketches, 0.3, seed=1)
    assert len(p) == 7 and len(s) == 21 and len(vp) == 3 and len(vs) == 9
    with pytest.raises(ValueError, match="3 instances cannot be parted"):
        split_instances(*several(3), 0.5)
    assert not set(p.instances.tolist()) & set(vp.instances.tolist()) and set(
        vs.instances.tolist()
    ) == set(vp.instances.tolist())


# ---- measuring


def test_ranks_against_accuracy_at():
    torch.manual_seed(7)
    q, g, ids = torch.randn(30, 4), torch.randn(20, 4), torch.randperm(40)[:20]
    own = ids[torch.randint(20, (30,))]
    ranks = true_ranks(q, g, own, ids)
    for k in (1, 5, 10):
        assert (ranks <= k).double().mean().item() == pytest.approx(
            accuracy_at(q, g, own, ids, (k,))[f"Acc@{k}"]
        )
    assert true_ranks(torch.zeros(2, 4), g, ids[[0, 5]], ids).tolist() == [1, 6], (
        "ties in gallery order"
    )
    with pytest.raises(ValueError, match="no true photo"):
        true_ranks(q, g[:1], own, ids[:1])
    with pytest.raises(ValueError, match="repeat"):
        true_ranks(q, g, own, ids * 0)
    with pytest.raises(ValueError, match="NaN"):
        true_ranks(q * math.nan, g, own, ids)


def test_bootstrap():
    assert bootstrap(torch.ones(50)) == (1.0, 1.0)
    low, high = bootstrap((torch.arange(400) % 2).double())
    assert (
        low == pytest.approx(0.45, abs=0.02)
        and high == pytest.approx(0.55, abs=0.02)
        and bootstrap(torch.arange(9.0)) == bootstrap(torch.arange(9.0))
    )
    assert bootstrap(torch.tensor([[0.0, 1.0] * 50, [1.0, 0.0] * 50])) == (0.5, 0.5), (
        "seeds are averaged before sketches are drawn"
    )


def test_report():
    report = InstanceReport(
        torch.tensor([1, 1, 4, 12]),
        20,
        torch.tensor([0.5, 1.0, math.nan, 0.0], dtype=torch.float64),
    )
    assert report.metrics == {
        "Acc@1": 0.5,
        "Acc@5": 0.75,
        "Acc@10": 0.75,
        "mean rank": 4.5,
        "triplets": 0.5,
    }
    low, high = report.interval("Acc@5")
    assert low <= 0.75 <= high and "| Acc@1 | 0.050 | **0.500** |" in report._repr_markdown_()


def test_peoples_triplets(toy, teacher):
    queries, gallery = embed_pair(teacher, *toy)
    triplets = torch.tensor([[0, 1, 2], [0, 2, 1], [3, 4, 5]])
    report = evaluate_instances(teacher, *toy, triplets)
    right = [
        float((queries[a] @ gallery[b]) > (queries[a] @ gallery[c]))
        for a, b, c in triplets.tolist()
    ]
    assert (
        report.order[0] == 0.5 and report.order[3] == right[2] and report.order[1:3].isnan().all()
    )


def test_spread():
    lines = [{"test/Acc@1": v} for v in (0.9, 0.1, 0.9, 0.1, 0.2, 0.4)]
    assert (
        spread(lines) == pytest.approx(torch.tensor([0.2, 0.4]).std().item())
        and spread([{"test/Acc@1": 0.5}] * 9) == 0
    )
    with pytest.raises(ValueError, match="at least 6"):
        spread(lines[:5])


def write_run(folder, method, seed, ranks, **numbers):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(
        json.dumps(
            {
                "parameters": {
                    "seed": seed,
                    "finegrained.seed": seed,
                    "finegrained.tau": 0.1,
                    "finegrained.k": 8,
                    **{f"finegrained.{k}": v for k, v in numbers.items()},
                }
            }
        )
    )
    metrics = InstanceReport(torch.tensor(ranks), 20).metrics
    (folder / "summary.json").write_text(
        json.dumps(
            dict(
                dataset="a",
                method=method,
                variant="",
                seed=seed,
                seconds=3.0,
                spread={"test/Acc@1": 0.02},
                reports={"last": {"ranks": ranks, "metrics": metrics}},
            )
        )
    )
    return folder


def test_compared_runs(tmp_path):
    folders = [
        write_run(tmp_path / f"{m}{s}", m, s, ranks)
        for m, per in {
            "full": ([1, 1, 1, 2], [1, 1, 9, 1]),
            "triplet": ([1, 9, 9, 2], [9, 9, 9, 1]),
        }.items()
        for s, ranks in enumerate(per)
    ]
    lines = compare_runs(folders).splitlines()
    assert (
        lines[2].startswith("| triplet | **0.250** | 0.250, 0.250 |")
        and lines[3].startswith("| full | **0.750** | 0.750, 0.750 |")
        and "+0.500" in lines[3]
    )
    assert compare_runs(folders, "Acc@10").splitlines()[2].startswith("| triplet | **1.000**")
    summary = json.loads((folders[0] / "summary.json").read_text())
    (folders[0] / "summary.json").write_text(json.dumps({**summary, "dataset": "b"}))
    with pytest.raises(ValueError, match="one data set at a time"):
        compare_runs(folders)


def test_sensitivity(tmp_path):
    base = [write_run(tmp_path / f"base{s}", "full", s, [1, 9]) for s in (0, 1)]
    tau = [write_run(tmp_path / f"tau{t}", "full", 0, [1, 1], tau=t) for t in (0.05, 0.2)]
    k = [write_run(tmp_path / "k4", "full", 0, [9, 9], k=4)]
    axes = sensitivity([*base, *tau, *k]).axes
    assert [a.get_xlabel() for a in axes] == ["k", "tau"]
    assert axes[1].lines[-2].get_xydata().tolist() == [
        [0.05, 1.0],
        [0.1, 0.5],
        [0.2, 1.0],
    ] and axes[0].lines[-2].get_xydata().tolist() == [[4.0, 0.0], [8.0, 0.5]]
    with pytest.raises(ValueError, match="do not differ"):
        sensitivity(base)
    with pytest.raises(ValueError, match="one number at a time"):
        sensitivity([*base, *tau, write_run(tmp_path / "two", "full", 0, [1, 1], tau=0.2, k=4)])


# ---- config


def test_config_refuses():
    for changes, says in (
        (dict(miner="soft"), "miner is one of"),
        (dict(ema=1.0), "ema is 1.0"),
        (dict(batch=1), "at least 2"),
        (dict(w_cross=0.0), "all weights are 0"),
        (dict(w_kd_photo=1.0, k=40), "k is 40"),
        (dict(kd="other"), "kd is one of"),
        (dict(distance="higher-order", readout="both"), "higher-order"),
        (
            dict(w_jigsaw=1.0, w_edge=1.0, w_kd_unlabelled=1.0),
            "which w_edge and w_kd_unlabelled want whole",
        ),
    ):
        with pytest.raises(ValueError, match=says):
            FineGrainedConfig(**changes)
    with pytest.raises(TypeError, match="batch wants int"):
        FineGrainedConfig(batch="32")
    with pytest.raises(ValueError, match="preset is one of"):
        FineGrainedConfig.preset("best")
    assert FineGrainedConfig(ema=0).ema == 0.0


def test_the_four_presets_add_one_thing_each():
    triplet, intra, strong, full = (
        FineGrainedConfig.preset(k) for k in ("triplet", "triplet-intra", "strong", "full")
    )
    differ = lambda a, b: {f.name for f in fields(a) if getattr(a, f.name) != getattr(b, f.name)}
    assert differ(triplet, intra) == {"w_photo", "w_sketch"} and differ(intra, strong) == {"ema"}
    assert differ(strong, full) == {"w_kd_unlabelled", "w_kd_photo", "w_kd_sketch"}


def test_what_is_missing_is_named(toy):
    config = FineGrainedConfig.preset("full", **TINY)
    with pytest.raises(ValueError, match="pass photos and sketches"):
        FineGrained(config)
    with pytest.raises(ValueError, match="pass unlabelled"):
        FineGrained(config, *toy)
    with pytest.raises(ValueError, match="pass a teacher"):
        FineGrained(config, *toy, unlabelled=toy[0])
    with pytest.raises(
        ValueError, match="a pseudo-sketch of each unlabelled photo; found 5 for 16"
    ):
        FineGrained(
            FineGrainedConfig.preset("edge-pretext", **TINY),
            unlabelled=toy[0],
            pseudo=toy[1].take(range(5)),
        )
    with pytest.raises(ValueError, match="a batch of 17 wants as many pairs; found 16"):
        make("triplet", toy, batch=17)


# ---- training


def test_a_student_of_unlabelled_photos_alone(toy, teacher):
    method = FineGrained(
        FineGrainedConfig(**TINY, w_cross=0.0, w_kd_unlabelled=1.0),
        unlabelled=toy[0],
        teacher=teacher,
    )
    assert method.step()["kd_unlabelled"] > 0


@pytest.mark.parametrize("preset", FINE_PRESETS)
def test_every_preset_takes_a_step(preset, toy, teacher):
    method = make(preset, toy, teacher)
    before = {k: v.clone() for k, v in method.encoder.state_dict().items()}
    frozen = {k: v.clone() for k, v in teacher.state_dict().items()}
    values = method.step()
    assert set(values) == set(method.terms.on) | {"total"} and all(
        math.isfinite(v) for v in values.values()
    )
    assert any(not torch.equal(v, before[k]) for k, v in method.encoder.state_dict().items())
    assert all(torch.equal(v, frozen[k]) for k, v in teacher.state_dict().items()), (
        "a teacher does not learn"
    )


def test_methods_start_alike_and_see_the_same_instances(toy, teacher):
    a, b = make("triplet", toy), make("full", toy, teacher)
    assert all(torch.equal(v, b.encoder.state_dict()[k]) for k, v in a.encoder.state_dict().items())
    for _ in range(3):
        assert torch.equal(a._groups()[1]["ids"], b._groups()[1]["ids"])


def test_averaging_is_what_it_says(toy):
    "Strong's own weights are those of triplet-intra; its average is the recursion, step for step."
    plain, strong = make("triplet-intra", toy), make("strong", toy, ema=0.6)
    average = {k: v.clone() for k, v in strong.encoder.state_dict().items()}
    for step in range(1, 9):
        plain.step(), strong.step()
        beta = min(0.6, (1 + step) / (3 + step))
        average = {
            k: beta * v + (1 - beta) * strong.encoder.state_dict()[k] for k, v in average.items()
        }
    own = strong.encoder.state_dict()
    assert all(torch.equal(v, own[k]) for k, v in plain.encoder.state_dict().items())
    with strong.averaged() as encoder:
        assert all(
            torch.allclose(v, average[k], atol=1e-6)
            for k, v in encoder.state_dict().items()
            if v.is_floating_point()
        )
    assert all(
        torch.equal(v, plain.encoder.state_dict()[k])
        for k, v in strong.encoder.state_dict().items()
    ), "outside of the block the weights are its own"


def test_it_learns(toy):
    method = make("triplet-intra", toy, lr=3e-3, augment=0.2, positive=0.3, flip=0.0)
    losses = [method.step()["cross"] for _ in range(40)]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_a_teacher_learns_and_is_used(toy):
    method = make("teacher", toy, lr=3e-3, augment=0.1, positive=0.3, flip=0.0, batch=14)
    losses = [method.step()["unlabelled"] for _ in range(30)]
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8])
    student = make("full", toy, method.encoder)
    assert student.taught["photo"].shape == (2, 16, 16) and torch.allclose(
        student.taught["photo"][0],
        F.normalize(method.encoder.eval()(toy[0].images()), dim=1),
        atol=1e-5,
    )
    mirrored = method.encoder(toy[0].images().flip(3))
    assert torch.allclose(student.taught["photo"][1], F.normalize(mirrored, dim=1), atol=1e-5)


def test_resumed_is_uninterrupted(tmp_path, toy, test_toy, teacher):
    watch = {"val": test_toy, "test": test_toy}
    whole = make("full", toy, teacher, epochs=4)
    whole.fit(RunFolder(tmp_path / "a", {}), watch, save_every=1, progress=False)
    make("full", toy, teacher, epochs=2).fit(
        RunFolder(tmp_path / "b", {}), watch, save_every=1, progress=False
    )
    with open(tmp_path / "b" / "metrics.jsonl", "a") as f:
        f.write('{"step": 3, "left": 1}\n')  # killed before the checkpoint
    again = make("full", toy, teacher, epochs=4)
    again.fit(RunFolder(tmp_path / "b", {}), watch, save_every=1, progress=False)
    a, b = (load_fine(tmp_path / k / "encoders" / "last.safetensors").state_dict() for k in "ab")
    assert all(torch.equal(v, b[k]) for k, v in a.items())
    assert (
        RunFolder(tmp_path / "a").metrics() == RunFolder(tmp_path / "b").metrics()
        and whole.best == again.best
    )


def test_looking_on_changes_nothing_and_validation_alone_chooses(
    tmp_path, toy, test_toy, monkeypatch
):
    runs = {k: RunFolder(tmp_path / k, {}) for k in "abc"}
    make("strong", toy, epochs=3).fit(runs["a"], {"test": test_toy}, progress=False)
    make("strong", toy, epochs=3).fit(runs["b"], {"val": toy, "test": test_toy}, progress=False)
    a, b = (load_fine(r.encoders / "last.safetensors").state_dict() for r in (runs["a"], runs["b"]))
    assert all(torch.equal(v, b[k]) for k, v in a.items())
    assert (
        not (runs["a"].encoders / "chosen.safetensors").exists()
        and (runs["b"].encoders / "chosen.safetensors").is_file()
    )
    assert {
        "val/Acc@1",
        "test/Acc@1",
        "test raw/Acc@1",
        "test/mean rank",
        "loss/cross",
        "loss/total",
    } <= set(runs["b"].metrics()[0])
    rising = iter([0.2, 0.5, 0.5])
    report = lambda acc: InstanceReport(
        torch.tensor([1] * round(10 * acc) + [9] * (10 - round(10 * acc))), 20
    )
    monkeypatch.setattr(
        "dfsbir.finegrained.trainer.evaluate_instances",
        lambda encoder, photos, sketches: report(next(rising) if photos is toy[0] else 0.9),
    )
    make("triplet", toy, epochs=3).fit(runs["c"], {"val": toy, "test": test_toy}, progress=False)
    assert read_card(runs["c"].encoders / "chosen.safetensors")["epoch"] == 2


@pytest.mark.parametrize("distance", ("euclidean", "higher-order"))
def test_an_encoder_is_kept(tmp_path, distance, toy):
    encoder = FineEncoder(size=28, channels=1, args=SMALL, distance=distance).eval()
    save_fine(tmp_path / "e.safetensors", encoder)
    again = load_fine(tmp_path / "e.safetensors")
    assert again.card == encoder.card and all(
        torch.equal(a, b) for a, b in zip(embed_pair(encoder, *toy), embed_pair(again, *toy))
    )
    save_state(tmp_path / "other.safetensors", {"a": torch.ones(2)})
    with pytest.raises(ValueError, match="no fine-grained encoder"):
        load_fine(tmp_path / "other.safetensors")


def test_low_precision(toy, teacher):
    values = make("full", toy, teacher, precision="bf16-mixed").step()
    assert all(math.isfinite(v) for v in values.values())


def test_a_step_that_overflows_is_left_out_and_the_scale_is_kept(toy):
    "16-mixed as on a GPU."

    def method(scale):
        fabric = Fabric(
            accelerator="cpu",
            devices=1,
            plugins=MixedPrecision(
                "16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale)
            ),
        )
        return FineGrained(
            FineGrainedConfig.preset("triplet", **TINY, precision="16-mixed"), *toy, fabric=fabric
        )

    far, near = method(2.0**60), method(16.0)
    before = {k: v.clone() for k, v in far.encoder.named_parameters()}
    far.step(), near.step()
    assert (
        all(torch.equal(v, before[k]) for k, v in far.encoder.named_parameters())
        and far.fabric.strategy.precision.scaler.get_scale() == 2.0**59
    )
    assert any(not torch.equal(v, before[k]) for k, v in near.encoder.named_parameters())
    again = method(16.0)
    again.load_state_dict(far.state_dict())
    assert again.fabric.strategy.precision.scaler.get_scale() == 2.0**59


def test_a_bad_rate_is_an_error_not_a_result(toy):
    method = make("triplet", toy)
    with torch.no_grad():
        method.encoder.backbone.net.stages[0].norm.weight.fill_(math.nan)
    with pytest.raises(FloatingPointError):
        method.step()


# ---- the bridge, and pictures of results


def crossx_encoders(folder, kind):
    from dfsbir.students.encoder import HeadSpec, encoder_from_teacher, save_encoders
    from dfsbir.students.heads import MetricSpace
    from dfsbir.teachers.class_map import align_classes
    from dfsbir.teachers.nets import build_net, input_of
    from dfsbir.teachers.teacher import Teacher

    classes = ["cup", "fish", "house"]
    class_map, space = align_classes(classes, classes), MetricSpace.random(3, 8)
    encoders = {
        m: encoder_from_teacher(
            Teacher(
                build_net("dfsbir", "tiny", 3),
                classes,
                input_of("dfsbir", 28),
                m,
                card=dict(source="dfsbir", name="tiny"),
            ),
            class_map,
            space,
            HeadSpec(kind, layers=["blocks.0.bn1"] if kind == "intermediate" else []),
        )
        for m in MODALITIES
    }
    save_encoders(folder, encoders)
    return encoders


@pytest.mark.parametrize("kind", ("posterior", "feature", "joint", "intermediate"))
def test_the_bridge(tmp_path, kind, toy):
    encoders = crossx_encoders(tmp_path / "crossx", kind)
    config = FineGrainedConfig.preset("triplet-intra", **TINY)
    bridged, fresh = (
        bridge_encoder(tmp_path / "crossx", config),
        bridge_encoder(tmp_path / "crossx", config, warm=False),
    )
    for m, e in encoders.items():
        assert all(
            torch.equal(v, bridged.backbone.nets[m].state_dict()[k])
            for k, v in e.state_dict().items()
        )
    assert not all(
        torch.equal(v, fresh.backbone.nets["photo"].state_dict()[k])
        for k, v in encoders["photo"].state_dict().items()
    )
    first, second = zip(*bridged.eval().outputs([x.images()[:3] for x in toy]))
    assert all(f.shape == (3, 128) for f in (*first, *second))
    method = FineGrained(config, *toy, start=bridged)
    assert all(math.isfinite(v) for v in method.step().values())
    save_fine(tmp_path / "bridged.safetensors", bridged)
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            embed_pair(bridged, *toy), embed_pair(load_fine(tmp_path / "bridged.safetensors"), *toy)
        )
    )


def test_what_a_method_starts_from():
    assert {k: pretext_of(k) for k in FINE_PRESETS if pretext_of(k)} == {
        "jigsaw": "jigsaw-pretext",
        "jigsaw-intra": "jigsaw-pretext",
        "edge-pretrain": "edge-pretext",
    }
    assert all(p in FINE_PRESETS for p in map(pretext_of, FINE_PRESETS) if p)


def test_figures(teacher, toy):
    lines = [
        {"step": i, "test/Acc@1": i / 10, "test raw/Acc@1": i / 20, "val/Acc@1": 0.1}
        for i in range(1, 10)
    ]
    (ax,) = stability(
        {"full": lines, "triplet": [{"step": m["step"], "test/Acc@1": 0.2} for m in lines]}
    ).axes
    assert len(ax.lines) == 4
    axes = show_ranks(teacher, *toy, rows=3, k=5).axes
    ranks = true_ranks(*embed_pair(teacher, *toy), toy[1].instances, toy[0].instances)
    titles = [a.get_ylabel() for a in axes if a.get_ylabel()]
    assert (
        len(axes) == 18
        and titles[0] == f"rank {ranks.min()}"
        and titles[-1] == f"rank {ranks.max()}"
    )
    for row in range(3):
        assert (
            sum(
                a.spines["top"].get_linestyle() == "-" and a.spines["top"].get_edgecolor()[1] > 0.5
                for a in axes[row * 6 + 1 : row * 6 + 6]
            )
            == 1
        ), "the true photo is always shown, and framed"


# ---- the experiment notebook, by papermill


def test_the_experiment(tmp_path, root):
    "A tiny full run: teacher, student, results, report."
    changes = json.dumps(
        {
            "size": 28,
            "channels": 1,
            "backbone_args": json.dumps(SMALL),
            "batch": 6,
            "unlabelled_batch": 8,
            "k": 3,
            "epochs": 2,
            "epoch_steps": 2,
        }
    )

    def papermill(notebook="finegrained.ipynb", **parameters):
        words = [
            w
            for k, v in parameters.items()
            for w in ("-r" if isinstance(v, str) else "-p", k, str(v))
        ]
        env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {
            "PYTHONPATH": str(root),
            "OMP_NUM_THREADS": "1",
        }
        return subprocess.run(
            [
                sys.executable,
                "-m",
                "papermill",
                str(root / "nbs" / "experiments" / notebook),
                "out.ipynb",
                "--no-progress-bar",
                *words,
            ],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            timeout=600,
        )

    tiny = dict(
        toy_images=20,
        toy_test=12,
        toy_unlabelled=12,
        changes=changes,
        teacher_changes='{"epochs": 1}',
        unseen="held-out",
        shared="kept",
        run_folder="runs/full",
    )
    done = papermill(**tiny)
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "runs" / "full"
    rows = read_results(run / "results.csv")
    assert {(r["dataset"], r["method"], r["variant"]) for r in rows} == {
        ("toy-instance", "full", ""),
        ("toy-instance", "full", "validation-chosen"),
        ("toy-instance/unseen", "full", ""),
    } and {r["metric"] for r in rows} == {"Acc@1", "Acc@5", "Acc@10"}
    summary, kept = (
        json.loads((run / "summary.json").read_text()),
        list((tmp_path / "kept").iterdir()),
    )
    assert (
        len(summary["reports"]["last"]["ranks"]) == 12
        and len(kept) == 1
        and kept[0].name.startswith("teacher-toy-0-")
    )
    assert "data:image/png;base64" in (run / "report.html").read_text()
    done = papermill("finegrained_report.ipynb", studies="runs", sensitivities="")
    assert done.returncode == 0, done.stderr[-3000:]
    said = (tmp_path / "out.ipynb").read_text()
    assert "| full |" in said and "not run" in said
