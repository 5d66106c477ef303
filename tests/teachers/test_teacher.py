"What one pass of a teacher gives, against hooks; nets of many kinds, inputs and precisions."

import copy

import pytest
import timm
import torch
import torchvision
from teachers.helpers import CLASSES, make_teacher, noise, tiny_net
from torch import nn

from dfsbir.core.types import Modality, Normalizer
from dfsbir.teachers.nets import SmallNet
from dfsbir.teachers.teacher import Teacher


def hooked(modules, call):
    "The first input of each module while `call` runs."
    inputs = {}
    handles = [
        m.register_forward_hook(lambda m, args, out: inputs.__setitem__(m, args[0]))
        for m in modules
    ]
    out = call()
    for handle in handles:
        handle.remove()
    return out, inputs


def batch_norms(net):
    return [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]


def sums(pairs):
    "Two numbers a pair of tensors, by which pairs can be told apart."
    return {tuple(round(v.sum().item(), 3) for v in pair) for pair in pairs}


def test_one_pass_gives_what_hooks_would():
    t, x = make_teacher(), noise()
    norms = batch_norms(t.net)
    calls = []
    handle = t.net.register_forward_hook(lambda *_: calls.append(1))
    out, inputs = hooked([*norms, t.net.fc], lambda: t(x))
    handle.remove()
    assert calls == [1]
    assert torch.equal(out.features, inputs[t.net.fc])
    assert torch.equal(out.logits, t.net((x - 0.5) / 0.5))
    torch.testing.assert_close(out.posteriors, out.logits.softmax(1))
    assert len(out.bn) == len(norms) == len(t.bn_targets())
    slow = [(inputs[m].mean((0, 2, 3)), inputs[m].var((0, 2, 3), correction=0)) for m in norms]
    assert sums(out.bn) == sums(slow)


def test_batch_norm_statistics_are_in_the_order_of_their_targets():
    t = make_teacher()
    by_mean = {id(m.running_mean): m for m in batch_norms(t.net)}
    out, inputs = hooked(by_mean.values(), lambda: t(noise()))
    for (mean, _), (target, target_var) in zip(out.bn, t.bn_targets(), strict=True):
        norm = by_mean[id(target)]
        torch.testing.assert_close(mean, inputs[norm].mean((0, 2, 3)), atol=1e-6, rtol=1e-5)
        assert target_var is norm.running_var


def test_targets_follow_a_move():
    t = make_teacher()
    t.net._apply(lambda v: v.clone() + 1 if v.is_floating_point() else v)  # as .to(device)
    assert all((var > 1).all() for _, var in t.bn_targets())
    assert torch.equal(t.proxies, t.net.fc.weight)


def test_gradients_reach_the_image_and_no_weight():
    t, x = make_teacher(size=12), noise().requires_grad_()
    out = t(x)
    assert not any(p.requires_grad for p in t.parameters())
    statistics = sum(mean.sum() + var.sum() for mean, var in out.bn)
    for part in (out.logits.sum(), out.features.sum(), statistics):
        (gradient,) = torch.autograd.grad(part, x, retain_graph=True)
        assert gradient.isfinite().all() and gradient.abs().sum() > 0
    assert all(p.grad is None for p in t.parameters())


def test_it_stays_in_evaluation_mode():
    t, x = make_teacher(), noise()
    wanted, before = t(x).logits, [b.clone() for b in t.buffers()]
    nn.Sequential(t).train()
    assert not any(m.training for m in t.modules())
    t.train(True)
    t.net.train()
    assert torch.equal(t(x).logits, wanted)
    assert all(torch.equal(a, b) for a, b in zip(before, t.buffers(), strict=True))


def test_without_gradients_and_without_statistics():
    t = make_teacher()
    with torch.no_grad():
        assert len(t(noise()).bn) > 0 and t(noise(), bn=False).bn == []


def test_autocast_in_bfloat16():
    t, x = make_teacher(), noise()
    with torch.autocast("cpu", torch.bfloat16):
        out = t(x)
    torch.testing.assert_close(out.logits.float(), t(x).logits, atol=0.1, rtol=0)
    assert out.bn[0][0].dtype == torch.float32


def test_a_copy_is_a_teacher_of_its_own():
    t = make_teacher()
    copied = copy.deepcopy(t)
    with torch.no_grad():
        t.net.fc.weight.zero_()
    assert copied.proxies.abs().sum() > 0
    out = copied(noise())
    torch.testing.assert_close(out.logits, out.features @ copied.proxies.T + copied.bias)


def flat(*layers):
    "Four pixels a channel, then these layers."
    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), *layers)


NETS = {  # how to make it, classes, side, features, what follows the last linear map
    "squeezenet": (lambda: torchvision.models.squeezenet1_1(), 1000, 64, 512, "other"),
    "vit": (lambda: timm.create_model("test_vit", num_classes=5), 5, 160, 64, "nothing"),
    "without bias": (lambda: flat(nn.Linear(12, 7, bias=False)), 7, 8, 12, "nothing"),
    "convolution": (
        lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 4, 1), nn.Flatten()),
        *(4, 8, 3, "nothing"),
    ),
    "softmax": (lambda: flat(nn.Linear(12, 4), nn.Softmax(1)), 4, 8, 12, "softmax"),
    "log softmax": (lambda: flat(nn.Linear(12, 4), nn.LogSoftmax(1)), 4, 8, 12, "softmax"),
}


@pytest.mark.parametrize("name", NETS)
def test_many_nets(name):
    make_net, classes, size, dim, after = NETS[name]
    torch.manual_seed(0)
    t = make_teacher(make_net(), [f"c{i}" for i in range(classes)], size)
    out = t(noise(2, size=size))
    assert out.features.shape == (2, dim) and out.logits.shape == (2, classes)
    assert t.proxies.shape == (classes, dim) and t.after == after
    if after != "other":
        bias = 0 if t.bias is None else t.bias
        wanted = out.features @ t.proxies.T + bias
        torch.testing.assert_close(out.logits, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "channels, modality, dark_on_light",
    [(1, "sketch", True), (1, "sketch", False), (3, "sketch", True), (1, "photo", True)],
)
def test_the_input_that_was_declared(channels, modality, dark_on_light):
    torch.manual_seed(0)
    net = SmallNet(3, (8, 16), channels).eval()
    t = Teacher(net, CLASSES, Normalizer(16, channels, 0.3, 0.2, dark_on_light), modality)
    x = noise(channels=Modality(modality).channels)
    raw = x
    if x.shape[1] == 1 and channels == 3:
        raw = x.expand(-1, 3, -1, -1)
    elif x.shape[1] == 3 and channels == 1:
        raw = (x * torch.tensor(Normalizer.LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)
    wanted = net(((raw if dark_on_light else 1 - raw) - 0.3) / 0.2)
    torch.testing.assert_close(t(x).logits, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(dtype):
    t = make_teacher(tiny_net().to(dtype))
    assert {p.dtype for p in t.parameters()} == {torch.float32}
    wanted = make_teacher()(noise()).logits
    torch.testing.assert_close(t(noise()).logits, wanted, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["fc.weight", "blocks.0.bn1.running_mean"])
def test_weights_that_are_not_finite_are_named(name, value):
    net = tiny_net()
    dict(net.state_dict())[name].view(-1)[0] = value
    with pytest.raises(ValueError, match=name):
        make_teacher(net)


class Overflowing(nn.Module):
    "Finite weights and infinite logits."

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x):
        return self.fc(x.mean((2, 3))) / 0


def test_logits_that_are_not_finite_are_said():
    with pytest.raises(ValueError, match="logits"):
        make_teacher(Overflowing())


def test_a_digest_changes_with_weights_classes_and_input():
    t = make_teacher()
    assert t.digest() == make_teacher().digest()
    others = [
        make_teacher(tiny_net(seed=1)),
        make_teacher(classes=["cup", "star", "moon"]),
        make_teacher(size=17),
        make_teacher(modality="sketch"),
    ]
    assert len({t.digest(), *(other.digest() for other in others)}) == 5
