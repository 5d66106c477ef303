"Scores and log posteriors of shared classes: slow loops, the matrix form, memory, extremes."

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dfsbir.teachers.class_map import (
    log_posteriors,
    mean_members,
    shared_logits,
    sum_members,
)


def random_assignment(own, shared, generator):
    "Own classes in random groups: every shared class has a member, some own classes have no group."
    others = torch.randint(-1, shared, (own - shared,), generator=generator)
    return torch.cat([torch.arange(shared), others])[torch.randperm(own, generator=generator)]


def as_matrix(assignment, shared):
    "(C,K) 1 where an own class belongs to a shared one."
    return F.one_hot(assignment + 1, shared + 1)[:, 1:].float()


@pytest.mark.parametrize("own, shared, scale", [(3, 3, 1.0), (9, 4, 5.0), (40, 7, 300.0)])
def test_shared_logits_equal_the_slow_loop(own, shared, scale):
    g = torch.Generator().manual_seed(own)
    assignment = random_assignment(own, shared, g)
    z = (torch.randn(5, own, generator=g) * scale).requires_grad_()
    rows = [[row[assignment == k].logsumexp(0) for k in range(shared)] for row in z]
    slow = torch.stack([torch.stack(row) for row in rows])
    fast = shared_logits(z, assignment, shared)
    weight = torch.randn(5, shared, generator=g)
    gradients = [torch.autograd.grad((s * weight).sum(), z)[0] for s in (slow, fast)]
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("own, shared", [(4, 4), (10, 4), (60, 21), (200, 126)])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_log_posteriors_agree_with_the_matrix_form(own, shared, temperature):
    "Sums of exponentials over a matrix of ones, in double precision."
    g = torch.Generator().manual_seed(own)
    assignment = random_assignment(own, shared, g)
    z = 3 * torch.randn(8, own, generator=g)
    matrix = as_matrix(assignment, shared)
    p = (z.double() / temperature).exp() @ matrix.double()
    wanted = (p / p.sum(1, keepdim=True)).log()
    found = log_posteriors(z, assignment, shared, temperature)
    torch.testing.assert_close(found.exp().double(), wanted.exp(), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-6)
    scores = (z / temperature)[:, :, None] + matrix.clamp_min(1e-30).log()
    before = scores.logsumexp(1).log_softmax(1)  # the form that heads had
    torch.testing.assert_close(found, before, atol=1e-5, rtol=1e-6)


def test_equal_classes_give_the_logits_themselves():
    z = torch.randn(6, 4)
    assert torch.equal(shared_logits(z, torch.arange(4), 4), z)
    assert torch.equal(shared_logits(z, torch.tensor([2, 0, 3, 1]), 4)[:, 2], z[:, 0])
    torch.testing.assert_close(log_posteriors(z, torch.arange(4), 4), z.log_softmax(1))


@pytest.mark.parametrize("temperature", [1e-3, 1e-2, 1.0, 1e2, 1e4])
def test_classes_that_nobody_shares_count_at_no_temperature(temperature):
    "The third class is by far the likeliest and is not shared."
    z = torch.tensor([[1.0, 0.0, 1000.0]])
    found = log_posteriors(z, torch.tensor([0, 1, -1]), 2, temperature)
    torch.testing.assert_close(found, (z[:, :2] / temperature).log_softmax(1))
    louder = log_posteriors(z + torch.tensor([0, 0, 1e6]), torch.tensor([0, 1, -1]), 2, temperature)
    assert torch.equal(louder, found)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_values_and_gradients_stay_finite(scale):
    z = (scale * torch.randn(6, 9)).requires_grad_()
    assignment = torch.tensor([0, 0, 1, 1, 1, 2, -1, -1, 2])
    log_posteriors(z, assignment, 3, 0.1).exp().square().sum().backward()
    assert z.grad.isfinite().all() and not z.grad[:, 6:8].any()


def test_half_precision_and_autocast_compute_in_float32():
    assignment = torch.arange(4)
    assert shared_logits(torch.randn(2, 4).bfloat16(), assignment, 4).dtype == torch.float32
    z = torch.randn(2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(log_posteriors(z, assignment, 4), z.log_softmax(1))
    with pytest.raises(ValueError, match=r"\(N,4\)"):
        shared_logits(torch.randn(2, 5), assignment, 4)


def test_sums_and_means_over_members():
    rows, assignment = torch.randn(5, 3, 2), torch.tensor([1, -1, 0, 1, 0])
    wanted = torch.stack([rows[assignment == k].sum(0) for k in range(2)])
    torch.testing.assert_close(sum_members(rows, assignment, 2), wanted)
    torch.testing.assert_close(mean_members(rows, assignment, 2), wanted / 2)
    assert mean_members(rows[:, 0, 0], assignment, 2).shape == (2,)


class LargestTensor(TorchDispatchMode):
    "The number of elements of the largest tensor that an operation gives."

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.numel())
        return out


@pytest.mark.parametrize("shared", [1000, 126])
def test_a_thousand_classes_need_no_tensor_of_images_by_classes_by_classes(shared):
    N, C = 64, 1000
    assignment = random_assignment(C, shared, torch.Generator().manual_seed(0))
    z = torch.randn(N, C, requires_grad=True)
    with LargestTensor() as largest:
        log_posteriors(z, assignment, shared, 0.7).exp().square().sum().backward()
    assert N * C <= largest.numel <= N * (C + 1)
