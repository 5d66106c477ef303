"""Distillation of neighbours against slow loops."""

import pytest
import torch
import torch.nn.functional as F

from dfsbir.core.config import ConfigError
from dfsbir.finegrained.distillation import (
    NeighbourDistillation,
    distances,
    neighbour_loss,
    relational_loss,
)


@pytest.fixture
def square():
    "(student's distances, teacher's distances, which candidate is the anchor itself), 4 x 4."
    torch.manual_seed(4)
    return torch.rand(4, 4) + 0.1, torch.rand(4, 4) + 0.1, torch.eye(4, dtype=torch.bool)


def test_neighbour_loss_slowly(square):
    student, teacher, itself = square
    tau, total = 0.2, 0.0
    for i in range(4):
        others = [j for j in teacher[i].argsort().tolist() if j != i]
        near = others[:2]
        p, q = (
            torch.softmax(torch.stack([-d[i, j] / tau for j in near]), 0)
            for d in (teacher, student)
        )
        total += (p * (p / q).log()).sum() / 4
    loss = neighbour_loss(student, teacher, 2, tau, itself)
    assert loss.item() == pytest.approx(total.item(), abs=1e-5)


def test_only_differences_of_distances_count(square):
    _, teacher, itself = square
    for student in (teacher, teacher + 3.0):
        loss = neighbour_loss(student, teacher, 2, 0.2, itself)
        assert loss.item() == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("k", (1, 4))
def test_too_few_or_too_many_neighbours_are_refused(square, k):
    student, teacher, itself = square
    with pytest.raises(ValueError, match="2 to 3"):
        neighbour_loss(student, teacher, k, 0.2, itself)


def test_other_anchors_are_refused(square):
    student, teacher, _ = square
    with pytest.raises(ValueError, match=r"\(4, 4\).*\(3, 4\)"):
        neighbour_loss(student, teacher[:3], 2)


def test_gradients_are_finite_where_a_distance_is_0():
    x = F.normalize(torch.randn(6, 4), dim=1).requires_grad_()
    itself = torch.eye(6, dtype=torch.bool)
    student = distances(x, x)
    for loss in (
        neighbour_loss(student, torch.rand(6, 6), 3, 0.1, itself),
        relational_loss(student, torch.rand(6, 6)),
    ):
        (gradient,) = torch.autograd.grad(loss, x, retain_graph=True)
        assert gradient.isfinite().all() and gradient.abs().sum() > 0


def test_relational_loss_has_no_unit():
    torch.manual_seed(5)
    d = torch.rand(5, 5) + 0.1
    assert relational_loss(7 * d, d).item() == pytest.approx(0.0, abs=1e-6)
    assert relational_loss(torch.rand(5, 5) + 0.1, d) > 0


@pytest.mark.parametrize(
    "settings, says",
    [
        (dict(k=1), "k"),
        (dict(tau=0.0), "tau"),
        (dict(unlabelled=0.0, photo=0.0, sketch=0.0), "0"),
    ],
)
def test_settings_that_teach_nothing_are_refused(settings, says):
    with pytest.raises(ConfigError, match=says):
        NeighbourDistillation(**settings)
