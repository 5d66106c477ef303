"Random numbers, hooks and devices."

import pytest
import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision
from torch import nn

from dfsbir.core.checkpoint import load_state, save_state
from dfsbir.core.device import (
    capture,
    fork_rng,
    make_fabric,
    restore_optimizer,
    rng_state,
    seed_everything,
    step_all,
    unscale_gradients,
)
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


# ---- the loss scale


def scaled_fabric(**scaler):
    "16-mixed as on a graphics card, with its scaler."
    scaler = torch.amp.GradScaler("cpu", **scaler)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    return Fabric(accelerator="cpu", devices=1, plugins=plugin), scaler


@pytest.mark.parametrize("overflow", [0, 1, None])
@pytest.mark.parametrize("wrapped", [True, False])
def test_optimisers_of_one_backward_pass_share_one_scale(overflow, wrapped):
    "Whichever overflows is left out; the others step as they would without a scale."
    fabric, scaler = scaled_fabric(init_scale=1024.0, growth_interval=1)
    nets = [nn.Linear(1, 1, bias=False) for _ in range(2)]
    for net in nets:
        nn.init.ones_(net.weight)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.25) for net in nets]
    if wrapped:
        nets, optimizers = zip(*(fabric.setup(*pair) for pair in zip(nets, optimizers)))
    fabric.backward(sum(net.weight.sum() for net in nets))
    if overflow is not None:
        nets[overflow].weight.grad.fill_(torch.inf)
    step_all(fabric, optimizers)
    found = [net.weight.item() for net in nets]
    assert found == [1.0 if k == overflow else 0.75 for k in range(2)]
    assert scaler.get_scale() == (2048.0 if overflow is None else 512.0), "updated once"


def test_without_a_scale_all_optimisers_step():
    weights = [nn.Parameter(torch.ones(1)) for _ in range(3)]
    fabric = make_fabric("cpu")
    fabric.backward(sum(weights).sum())
    optimizers = [torch.optim.SGD([w], lr=0.5) for w in weights]
    unscale_gradients(fabric, optimizers[0])
    step_all(fabric, optimizers)
    assert [w.item() for w in weights] == [0.5] * 3


def test_gradients_are_clipped_at_their_true_size():
    fabric, scaler = scaled_fabric(init_scale=1024.0)
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.25)
    fabric.backward(weight.sum())
    unscale_gradients(fabric, optimizer)
    nn.utils.clip_grad_norm_([weight], 5.0)
    step_all(fabric, [optimizer])
    assert weight.item() == 0.75


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("fused", [False, True])
def test_a_restored_optimiser_makes_the_steps_of_the_first(tmp_path, kind, fused):
    "Also of weights whose memory format a checkpoint does not keep."

    def made():
        torch.manual_seed(0)
        net = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        return net, kind(net.parameters(), 0.1, fused=fused)

    def step(net, optimizer):
        net(
            torch.rand(2, 3, 5, 5, generator=torch.Generator().manual_seed(1))
        ).sin().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    first, second = made(), made()
    step(*first)
    save_state(tmp_path / "net.safetensors", first[0].state_dict())
    save_state(tmp_path / "optimizer.safetensors", first[1].state_dict())
    second[0].load_state_dict(load_state(tmp_path / "net.safetensors"))
    restore_optimizer(second[1], load_state(tmp_path / "optimizer.safetensors"))
    step(*first)
    step(*second)
    assert torch.equal(first[0].weight, second[0].weight)
    for weight, values in second[1].state.items():
        assert values["exp_avg"].stride() == weight.stride()
