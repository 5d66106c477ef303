"Alignment, modality guidance and the adversary."

import math

import pytest
import torch
import torch.nn.functional as F

from dfsbir.core.types import Modality
from dfsbir.losses.cross_modal import adversarial_loss, align_loss, log_posteriors, modality_loss

C, N = 5, 12
LABEL = torch.arange(N) % C


def rows(seed, scale=1.0, dtype=torch.float32):
    return (scale * torch.randn(N, C, generator=torch.Generator().manual_seed(seed))).to(dtype)


def slow_kl(p, q):
    "KL(p || q) in plain Python, mean over rows."
    total = 0.0
    for p_row, q_row in zip(p.tolist(), q.tolist()):
        total += sum(x * math.log(x / y) for x, y in zip(p_row, q_row))
    return total / len(p)


def test_align_against_a_slow_loop_and_its_symmetry():
    a, b = rows(3, dtype=torch.float64), rows(4, dtype=torch.float64)
    there, back = slow_kl(a.softmax(1), b.softmax(1)), slow_kl(b.softmax(1), a.softmax(1))
    assert align_loss(a, b).item() == pytest.approx((there + back) / 2, rel=1e-9)
    assert align_loss(a, b).item() == pytest.approx(align_loss(b, a).item(), rel=1e-12)
    assert align_loss(a, b, symmetric=False).item() == pytest.approx(back, rel=1e-9)


def test_log_posteriors_is_idempotent_and_finite_for_impossible_classes():
    z = rows(5)
    torch.testing.assert_close(log_posteriors(log_posteriors(z)), z.log_softmax(1))
    z[:, 2] = -torch.inf
    log_p = log_posteriors(z)
    assert log_p.isfinite().all() and (log_p[:, 2] < -9e3).all()
    torch.testing.assert_close(log_p.exp(), z.softmax(1))


def test_modality_takes_values_names_numbers_and_soft_targets():
    d = torch.tensor([-2.0, 0.0, 3.0])
    photo = sum(math.log(1 + math.exp(v)) for v in d.tolist()) / 3
    for target in (Modality.PHOTO, "photo", 0, 0.0, torch.zeros(3)):
        assert modality_loss(d, target).item() == pytest.approx(photo, rel=1e-6)
    between = modality_loss(d[:, None], 0.5).item()
    assert between == pytest.approx((photo + modality_loss(d, "sketch").item()) / 2, rel=1e-6)
    with pytest.raises(ValueError, match="Photo"):
        modality_loss(d, "Photo")
    with pytest.raises(ValueError, match="one image"):
        modality_loss(torch.zeros(0), "photo")


def test_adversarial_stays_within_its_bound():
    z = rows(6, scale=1e4)
    assert -2 * math.log(C) <= adversarial_loss(z, LABEL).item() <= 0
    assert adversarial_loss(torch.zeros(N, C), LABEL).item() == pytest.approx(-math.log(C))
    unbounded = adversarial_loss(rows(6), LABEL, clamp=1e9)
    torch.testing.assert_close(unbounded, -F.cross_entropy(rows(6), LABEL))
    with pytest.raises(ValueError, match="clamp is 0"):
        adversarial_loss(z, LABEL, clamp=0)
    with pytest.raises(ValueError, match="float32"):
        adversarial_loss(z, LABEL.float())
