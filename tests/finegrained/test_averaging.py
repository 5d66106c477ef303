"""Averaged weights are what their recursion says."""

import pytest
import torch
from torch import nn

from dfsbir.finegrained.averaging import WeightAverage


def test_the_recursion():
    torch.manual_seed(0)
    module = nn.BatchNorm1d(3)
    average = WeightAverage(module, 0.6)
    slow = module.weight.detach().clone()
    for step in range(1, 9):
        with torch.no_grad():
            module.weight.add_(torch.randn(3))
            module.num_batches_tracked += 1
        average.update(step)
        beta = min(0.6, (1 + step) / (3 + step))
        slow = beta * slow + (1 - beta) * module.weight.detach()
    assert torch.allclose(average.weights["weight"], slow, atol=1e-6)
    assert average.weights["num_batches_tracked"] == 8, "counters are copied"


def test_a_block_with_the_average_leaves_the_module_as_it_was():
    module = nn.Linear(2, 2)
    average = WeightAverage(module, 0.9)
    start = module.weight.detach().clone()
    with torch.no_grad():
        module.weight.add_(1.0)
    with pytest.raises(RuntimeError), average.applied() as applied:
        assert torch.equal(applied.weight, start)
        raise RuntimeError
    assert torch.equal(module.weight, start + 1.0)
