"What every loss keeps: finite at any scale, a gradient that is right, float32, small batches."

import pytest
import torch

from dfsbir.core.types import Modality
from dfsbir.losses.cross_modal import adversarial_loss, align_loss, modality_loss
from dfsbir.losses.inversion import (
    activation_loss,
    bn_prior_loss,
    class_balance_loss,
    diversity_loss,
    one_hot_loss,
)
from dfsbir.losses.metric import QueueContrast, consistency_loss, infonce_loss, proxy_anchor_loss

C, N = 5, 12


def rows(seed=0, n=N, scale=1.0, dtype=torch.float32):
    make = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(n, C, generator=make)).to(dtype)


LABEL = torch.arange(N) % C

# every loss of class scores or embeddings, as a function of one (N,C) matrix
BY_LOGITS = {
    "one_hot": one_hot_loss,
    "class_balance": lambda z: class_balance_loss(z.softmax(1)),
    "align": lambda z: align_loss(z, z.flip(0)),
    "align_one_way": lambda z: align_loss(z, z.flip(0), symmetric=False),
    "modality": lambda z: modality_loss(z[:, 0], Modality.SKETCH),
    "adversarial": lambda z: adversarial_loss(z, LABEL[: len(z)]),
    "proxy_anchor": lambda z: proxy_anchor_loss(z, LABEL[: len(z)], torch.eye(C)),
    "consistency": lambda z: consistency_loss(z, torch.full(z.shape, 1 / C)),
    "activation": activation_loss,
    "queue": lambda z: QueueContrast(C, 16)(z, z.flip(0)),
    "infonce": lambda z: infonce_loss(z, z.flip(1)),
    "diversity": lambda z: diversity_loss(
        rows(3, len(z)), z, torch.zeros(len(z), dtype=torch.long)
    ),
}


@pytest.mark.parametrize("name", BY_LOGITS)
@pytest.mark.parametrize("scale", [0.0, 1e-20, 1.0, 1e4, 1e18])
def test_finite_with_finite_gradient_at_any_scale(name, scale):
    z = rows(scale=scale).requires_grad_()
    loss = BY_LOGITS[name](z)
    loss.backward()
    assert loss.ndim == 0 and loss.isfinite() and z.grad.isfinite().all()


@pytest.mark.parametrize(
    "name",
    [
        "one_hot",
        "class_balance",
        "align",
        "align_one_way",
        "modality",
        "adversarial",
        "consistency",
    ],
)
def test_finite_at_the_edge_of_float32(name):
    z = (1e30 * rows().sign()).requires_grad_()
    loss = BY_LOGITS[name](z)
    loss.backward()
    assert loss.isfinite() and z.grad.isfinite().all()


@pytest.mark.parametrize("name", BY_LOGITS)
def test_gradient_flows(name):
    z = rows(5).requires_grad_()
    BY_LOGITS[name](z).backward()
    assert z.grad.abs().sum() > 0


@pytest.mark.parametrize("name", sorted(set(BY_LOGITS) - {"class_balance", "queue"}))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_computes_in_float32_under_autocast_and_from_half_precision(name, dtype):
    z = rows(scale=3, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = BY_LOGITS[name](z)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, BY_LOGITS[name](z.float()), rtol=1e-6, atol=1e-7)


def test_lists_of_statistics_and_queues_compute_in_float32_too():
    stats, targets = [(torch.randn(6), torch.rand(6))], [(torch.randn(6), torch.rand(6))]
    half = [tuple(x.bfloat16() for x in s) for s in stats]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = bn_prior_loss(half, targets)
    assert low.dtype == torch.float32
    torch.testing.assert_close(
        low, bn_prior_loss([tuple(x.float() for x in s) for s in half], targets)
    )
    queue = QueueContrast(C, 16)
    twin = QueueContrast(C, 16)
    twin.load_state_dict(queue.state_dict())
    z = rows(dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = queue(z, z.flip(0))
    torch.testing.assert_close(low, twin(z.float(), z.float().flip(0)))
    assert queue.photo.dtype == torch.float32 and torch.equal(queue.photo, twin.photo)


@pytest.mark.parametrize("name", sorted(set(BY_LOGITS) - {"queue", "proxy_anchor"}))
def test_analytic_gradient_equals_finite_differences(name):
    z = rows(7, dtype=torch.float64).requires_grad_()
    if name == "align_one_way":  # the detached side has no gradient by design
        judge = rows(8, dtype=torch.float64)
        assert torch.autograd.gradcheck(lambda z: align_loss(z, judge, symmetric=False), z)
    else:
        assert torch.autograd.gradcheck(BY_LOGITS[name], z)


@pytest.mark.parametrize("n", [1, 2])
def test_batches_of_one_and_two(n):
    z = rows(n=n).requires_grad_()
    for name in set(BY_LOGITS) - ({"diversity", "infonce"} if n == 1 else set()):
        loss = BY_LOGITS[name](z)
        assert loss.isfinite(), name


@pytest.mark.parametrize("name", sorted(set(BY_LOGITS) - {"activation"}))
def test_empty_batch_is_an_error(name):
    with pytest.raises(ValueError):
        BY_LOGITS[name](torch.zeros(0, C))
