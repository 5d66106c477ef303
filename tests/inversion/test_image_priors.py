"""Image priors: slow oracles of views, batch-norm statistics, targets and the adversary."""

import math

import pytest
import torch

from dfsbir.inversion.image_priors import (
    BatchNormPrior,
    agreed_adversary,
    between_classes,
    random_crop,
    roll_flip,
)
from dfsbir.losses.inversion import bn_prior_loss


def test_the_prior_is_the_loss_of_each_layer_where_no_variance_is_small():
    torch.manual_seed(0)
    targets = [(torch.randn(k), 0.5 + torch.rand(k)) for k in (3, 8)]
    stats = [(torch.randn(k), torch.rand(k)) for k in (3, 8)]
    prior = BatchNormPrior(targets, quantile=0.0)
    torch.testing.assert_close(prior(stats), bn_prior_loss(stats, targets))


def test_a_channel_without_variance_does_not_rule_the_prior():
    targets = [(torch.zeros(40), torch.cat([torch.ones(39), torch.full((1,), 1e-12)]))]
    stats = [(torch.zeros(40), torch.ones(40))]
    assert BatchNormPrior(targets, quantile=0.1)(stats) < 0.2


def test_the_moving_average_is_over_finished_batches_and_has_no_gradient():
    targets = [(torch.zeros(2), torch.ones(2))]
    prior = BatchNormPrior(targets, decay=0.5)
    prior([(torch.full((2,), 2.0), torch.ones(2))])
    prior.finish_batch()
    mean = torch.full((2,), -2.0, requires_grad=True)
    value = prior([(mean, torch.ones(2))])
    value.backward()
    # mean (-2+2)/2 = 0; mean of squares (5+5)/2 = 5, so the variance is 5
    torch.testing.assert_close(value.detach(), torch.tensor(4 * math.sqrt(2) / math.sqrt(2)))
    assert torch.isfinite(mean.grad).all()
    assert not prior.past[0].requires_grad


def test_views_keep_shape_and_range():
    random = torch.Generator().manual_seed(0)
    x = torch.rand(5, 3, 12, 12)
    for view in (roll_flip(x, 3, random), random_crop(x, 0.1, random)):
        assert view.shape == x.shape
        assert view.min() >= 0 and view.max() <= 1 + 1e-6


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_targets_between_classes(share):
    label = torch.arange(3).repeat(200)
    target = between_classes(label, 3, share, torch.Generator().manual_seed(0))
    torch.testing.assert_close(target.sum(1), torch.ones(600))
    own = target.gather(1, label[:, None])[:, 0]
    assert (own >= 0.5).all()
    assert abs((own < 1).float().mean().item() - share) < 0.1


def test_the_adversary_by_a_loop():
    torch.manual_seed(0)
    t, s = 3 * torch.randn(20, 4), 3 * torch.randn(20, 4)
    total = 0.0
    for a, b in zip(t, s):
        if a.argmax() == b.argmax():
            p, q = a.softmax(0), b.softmax(0)
            total -= (p * (p / q).log()).sum().item()
    assert agreed_adversary(t, s).item() == pytest.approx(total / 20, abs=1e-5)
