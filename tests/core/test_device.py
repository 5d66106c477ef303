"Random numbers, hooks and devices."

import pytest
import torch
from torch import nn

from dfsbir.core.device import capture, fork_rng, make_fabric, rng_state, seed_everything
from dfsbir.core.device import set_rng_state as put_back


def test_forked_random_numbers_disturb_nobody():
    torch.manual_seed(1)
    wanted = torch.rand(4)
    torch.manual_seed(1)
    before = torch.rand(2)
    with pytest.raises(KeyError), fork_rng(7):
        own = torch.rand(3)
        raise KeyError
    assert torch.equal(torch.cat([before, torch.rand(2)]), wanted), "whatever happens inside"
    torch.manual_seed(7)
    assert torch.equal(own, torch.rand(3))


def test_a_state_of_the_generators_is_put_back():
    seed_everything(5)
    state = rng_state()
    numbers = torch.rand(3), torch.randn(2)
    put_back(state)
    assert torch.equal(torch.rand(3), numbers[0])
    assert torch.equal(torch.randn(2), numbers[1])


def test_hooks_are_gone_even_after_an_error():
    net = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    with capture({"first": net[0]}) as found, capture({"last": net[1]}, "input") as inputs:
        net(torch.ones(4, 3))
    assert torch.equal(found["first"], inputs["last"])
    calls = len(found)
    with pytest.raises(RuntimeError), capture({"last": net[1]}) as found:
        net(torch.ones(4, 7))
    net(torch.ones(4, 3))
    assert calls == 1 and not found, "a removed hook records nothing"
    with pytest.raises(ValueError, match="input"), capture({}, "gradient"):
        pass


def test_fabric_on_the_cpu():
    fabric = make_fabric("cpu")
    assert fabric.device.type == "cpu" and fabric.world_size == 1
