"Scores of the shared classes: a slow loop, the identity, precision and shapes."

import pytest
import torch
import torch.nn.functional as F

from dfsbir.teachers.class_map import shared_logits


def random_assignment(own, shared, generator):
    "Own classes in random groups: every shared class has a member, some own classes have no group."
    others = torch.randint(shared + 1, (own - shared,), generator=generator)
    group = torch.cat([torch.arange(shared), others])[torch.randperm(own, generator=generator)]
    return F.one_hot(group, shared + 1)[:, :shared].float()


@pytest.mark.parametrize("own,shared,scale", [(3, 3, 1.0), (9, 4, 5.0), (40, 7, 300.0)])
def test_shared_logits_equal_the_slow_loop(own, shared, scale):
    g = torch.Generator().manual_seed(own)
    assignment = random_assignment(own, shared, g)
    z = (torch.randn(5, own, generator=g) * scale).requires_grad_()
    rows = [[row[assignment[:, k] > 0].logsumexp(0) for k in range(shared)] for row in z]
    slow = torch.stack([torch.stack(row) for row in rows])
    fast = shared_logits(z, assignment)
    weight = torch.randn(5, shared)
    gradients = [torch.autograd.grad((s * weight).sum(), z)[0] for s in (slow, fast)]
    assert torch.allclose(fast, slow, rtol=1e-5, atol=1e-4)
    assert torch.allclose(*gradients, atol=1e-5)


def test_shared_logits_of_equal_classes_are_the_logits():
    z = torch.randn(6, 4)
    assert torch.equal(shared_logits(z, torch.eye(4)), z)
    assert torch.equal(shared_logits(z, torch.eye(4)[[2, 0, 3, 1]])[:, 2], z[:, 0])


def test_shared_logits_take_half_precision_and_refuse_other_shapes():
    assert shared_logits(torch.randn(2, 4).bfloat16(), torch.eye(4)).dtype == torch.float32
    with pytest.raises(ValueError, match=r"\(N,4\)"):
        shared_logits(torch.randn(2, 5), torch.eye(4))
