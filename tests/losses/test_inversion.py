"The terms of inversion one by one: hand-made cases, neutral values, what they do to an input."

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dfsbir.losses.inversion import (
    DAFL_WEIGHTS,
    bn_prior_loss,
    class_balance_loss,
    diversity_loss,
    one_hot_loss,
    total_variation,
)


@pytest.fixture
def scores():
    return torch.randn(12, 5, generator=torch.Generator().manual_seed(1))


# ---- class


def test_one_hot_pulls_up_the_likeliest_class(scores):
    z = scores.requires_grad_()
    one_hot_loss(z).backward()
    assert (z.grad.gather(1, z.argmax(1, keepdim=True)) < 0).all()
    torch.testing.assert_close(z.grad.sum(1), torch.zeros(12), atol=1e-7, rtol=0)


def test_class_balance_is_base_e_and_dafl_weights_restore_base_10(scores):
    p = scores.softmax(1)
    mean = p.mean(0).tolist()
    ours = class_balance_loss(p).item()
    assert ours == pytest.approx(sum(m * math.log(m) for m in mean), rel=1e-5)
    theirs = 5 * sum(m * math.log10(m) for m in mean)
    assert DAFL_WEIGHTS["class_balance"] * ours == pytest.approx(theirs, rel=1e-5)


def test_class_balance_survives_classes_that_never_occur():
    p = F.one_hot(torch.zeros(12, dtype=torch.long), 5).float().requires_grad_()
    class_balance_loss(p).backward()
    assert p.grad.isfinite().all()
    assert p.grad[:, 1:].max() < p.grad[:, 0].min(), "the absent classes should come"


def test_class_balance_refuses_logits(scores):
    with pytest.raises(ValueError, match="logits"):
        class_balance_loss(scores)


# ---- batch-norm statistics


SIZES = ((4, 1), (64, 30), (1, 0.1), (17, 5))  # channels and scale of some layers


def layer(channels, scale):
    return scale * torch.randn(channels), scale**2 * (torch.rand(channels) + 0.5)


def test_bn_prior_counts_layers_alike_whatever_their_width_and_scale():
    torch.manual_seed(0)
    a, A, b, B = layer(4, 1), layer(4, 1), layer(64, 30), layer(64, 30)
    alone = [bn_prior_loss([stats], [target]).item() for stats, target in ((a, A), (b, B))]
    assert bn_prior_loss([a, b], [A, B]).item() == pytest.approx(sum(alone) / 2, rel=1e-5)
    wide = bn_prior_loss([tuple(x.repeat(8) for x in a)], [tuple(x.repeat(8) for x in A)])
    assert wide.item() == pytest.approx(alone[0], rel=1e-5)


def test_bn_prior_equals_the_loop_over_layers():
    torch.manual_seed(0)
    stats, targets = ([layer(n, scale) for n, scale in SIZES] for _ in range(2))
    expected = 0.0
    for (mean, var), (target_mean, target_var) in zip(stats, targets):
        unit = target_var.clamp_min(1e-5)
        expected += (mean - target_mean).norm() / unit.sum().sqrt()
        expected += (var - target_var).norm() / unit.norm()
    found = bn_prior_loss(stats, targets)
    assert found.item() == pytest.approx(expected.item() / len(SIZES), rel=1e-6)


def test_bn_prior_moves_the_input_of_a_real_network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    for _ in range(50):
        net(torch.rand(16, 3, 8, 8))
    x = torch.randn(16, 3, 8, 8, requires_grad=True)
    target = [(net[1].running_mean, net[1].running_var)]
    optimizer, values = torch.optim.Adam([x], 0.05), []
    for _ in range(60):
        h = net[0](x)
        stats = [(h.mean((0, 2, 3)), h.var((0, 2, 3), unbiased=False))]
        loss = bn_prior_loss(stats, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < values[0] / 5


def test_bn_prior_is_finite_and_has_no_gradient_at_its_minimum():
    m, v = torch.zeros(3, requires_grad=True), torch.ones(3, requires_grad=True)
    bn_prior_loss([(m, v)], [(torch.zeros(3), torch.ones(3))]).backward()
    assert m.grad.abs().sum() == 0 and v.grad.abs().sum() == 0


@pytest.mark.parametrize(
    "targets, found", [([], "1 layers.*0"), ([(torch.zeros(4), torch.ones(4))], "4")]
)
def test_bn_prior_refuses_statistics_of_another_net(targets, found):
    with pytest.raises(ValueError, match=found):
        bn_prior_loss([(torch.zeros(3), torch.ones(3))], targets)
    with pytest.raises(ValueError, match="total_variation"):
        bn_prior_loss([], [])


# ---- smoothness


def test_total_variation_of_hand_made_images():
    stripes = torch.zeros(1, 1, 4, 6)
    stripes[..., ::2] = 1
    assert total_variation(stripes).item() == pytest.approx(1)  # across only
    assert total_variation(stripes.transpose(2, 3)).item() == pytest.approx(1)
    checker = (torch.arange(4)[:, None] + torch.arange(6)) % 2
    assert total_variation(checker[None, None].float()).item() == pytest.approx(2)
    ramp = torch.arange(8.0).expand(2, 3, 5, 8) / 7
    assert total_variation(ramp).item() == pytest.approx(1 / 7, rel=1e-5)
    with pytest.raises(ValueError, match=r"\(1, 3, 1, 8\)"):
        total_variation(torch.rand(1, 3, 1, 8))


# ---- diversity


def test_diversity_compares_within_a_class_only_and_skips_equal_noises():
    noise, label = torch.tensor([[0.0], [1.0], [1.0], [3.0]]), torch.tensor([0, 0, 0, 1])
    x = torch.tensor([[0.0], [0.1], [0.9], [5.0]], requires_grad=True)
    loss = diversity_loss(noise, x, label, scale=0.1)
    # images 0 and 1 count; 1 and 2 have the same noise, 3 is alone in its class
    assert loss.item() == pytest.approx(math.exp(-1))
    loss.backward()
    assert x.grad[0].item() > 0 > x.grad[1].item() and x.grad[2:].abs().sum() == 0
    with pytest.raises(ValueError, match="4 images"):
        diversity_loss(noise, x, torch.arange(4))
    with pytest.raises(ValueError, match="4 noises, 3 images"):
        diversity_loss(noise, x[:3], label)


def test_descending_diversity_pulls_a_collapsed_generator_apart():
    torch.manual_seed(0)
    generator, noise, label = nn.Linear(4, 10), torch.randn(16, 4), torch.arange(16) % 2
    with torch.no_grad():
        generator.weight.mul_(1e-3)
    optimizer, values = torch.optim.Adam(generator.parameters(), 0.05), []
    for _ in range(60):
        loss = diversity_loss(noise, generator(noise).sigmoid(), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[0] > 0.95 and values[-1] < 0.3
