"Batch statistics against the library, and which linear map is the head."

import pytest
import torch
import torch.nn.functional as F
from teachers.helpers import make_teacher, noise, tiny_net
from torch import nn
from torch.overrides import _len_torch_function_stack

from dfsbir.teachers.recorder import Recorder, batch_stats


@pytest.mark.parametrize("shape", [(6, 3), (4, 3, 5), (4, 3, 5, 7)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_statistics_against_the_library(shape, channels_last):
    x = torch.randn(shape, dtype=torch.double) * 3 + 50
    if channels_last and x.ndim == 4:
        x = x.to(memory_format=torch.channels_last)
    x.requires_grad_()
    dims = [0, *range(2, x.ndim)]
    mean, var = batch_stats(x)
    torch.testing.assert_close(mean, x.mean(dims))
    torch.testing.assert_close(var, x.var(dims, correction=0))
    assert torch.autograd.gradcheck(batch_stats, x)
    _, single = batch_stats(x.detach().float())
    torch.testing.assert_close(single, var.float(), rtol=1e-4, atol=0)  # far from zero


def test_nothing_stays_behind_even_after_an_error():
    t = make_teacher()
    with pytest.raises(RuntimeError):
        t.net(torch.rand(1, 5, 16, 16))
    with pytest.raises(ValueError, match="5"):
        t(torch.rand(1, 5, 16, 16))
    t.net.fc.forward = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        t(noise())
    assert _len_torch_function_stack() == 0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in t.modules())


def test_a_recorder_of_all_linear_maps():
    net = tiny_net()
    with Recorder(bn=False) as record:
        out = net(noise())
    assert record.bn == [] and len(record.linear[-1].weight) == 3
    torch.testing.assert_close(record.linear[-1].out, out)


class Functional(nn.Module):
    "A head without a layer: a square weight, used transposed, with the bias added by hand."

    def __init__(self):
        super().__init__()
        self.lift = nn.Linear(3, 5)
        self.table = nn.Parameter(torch.randn(5, 5))
        self.offset = nn.Parameter(torch.randn(5))

    def forward(self, x):
        return self.lift(x.mean((2, 3))).tanh() @ self.table + self.offset


def test_a_functional_head_and_its_bias():
    t = make_teacher(Functional(), list("abcde"))
    out = t(noise())
    assert t.head == "table" and torch.equal(t.proxies, t.net.table.T)
    torch.testing.assert_close(out.logits, out.features @ t.proxies.T + t.bias)


def test_a_named_head_is_taken():
    assert make_teacher(Functional(), list("abcde"), head="lift").dim == 3
    assert make_teacher(Functional(), list("abcde"), head="lift.weight").head == "lift"


class Cosine(Functional):
    "A head whose weight is computed on the fly."

    def forward(self, x):
        return F.linear(self.lift(x.mean((2, 3))), F.normalize(self.table))[:, :4]


class Two(nn.Module):
    "A net with two outputs."

    def forward(self, x):
        return x, x


def test_a_head_that_is_not_found():
    with pytest.raises(ValueError, match=r"4 outputs.*lift \(3 -> 5\)"):
        make_teacher(Cosine(), list("abcd"))
    with pytest.raises(ValueError, match="'fc2'.*fc"):
        make_teacher(head="fc2")
    with pytest.raises(ValueError, match="3 logits.*4"):
        make_teacher(tiny_net(3), list("abcd"))
    with pytest.raises(ValueError, match="tuple"):
        make_teacher(Two())
