"Full precision under autocast, and shapes that are refused."

import importlib
import pkgutil

import pytest
import torch

import dfsbir.losses
from dfsbir.losses.checks import (
    full_precision,
    require_labels,
    require_matrix,
    require_posteriors,
)


@full_precision
def spy(*args, **kwargs):
    "The types that a loss computes with, and whether autocast is on inside."
    return args, kwargs, torch.is_autocast_enabled("cpu")


def test_full_precision_casts_nested_half_tensors_and_leaves_the_rest():
    half, double, whole = torch.ones(2).bfloat16(), torch.ones(2).double(), torch.arange(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        args, kwargs, autocast = spy([half, (half.half(), double)], whole, 3, key=half, name="x")
    (first, (second, third)), labels, number = args
    assert [x.dtype for x in (first, second, third)] == [torch.float32] * 2 + [torch.float64]
    assert labels is whole and number == 3 and kwargs["name"] == "x"
    assert kwargs["key"].dtype == torch.float32 and not autocast


def test_full_precision_passes_the_gradient():
    x = torch.ones(3, dtype=torch.bfloat16, requires_grad=True)
    full_precision(lambda x: (x**2).sum())(x).backward()
    assert x.grad.tolist() == [2, 2, 2] and x.grad.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "call, found",
    [
        (lambda: require_matrix(torch.zeros(5), "x"), r"x has shape \(5,\)"),
        (lambda: require_matrix(torch.zeros(0, 3), "x"), r"\(0, 3\)"),
        (lambda: require_matrix(torch.zeros(5, 3), "x", torch.zeros(5, 4)), r"\(5, 4\)"),
        (lambda: require_labels(torch.zeros(5, 1).long(), 5, 3), r"\(5, 1\)"),
        (lambda: require_labels(torch.zeros(5), 5, 3), "float32"),
        (lambda: require_labels(torch.tensor([0, 3]), 2, 3), "0 to 3"),
        (lambda: require_labels(torch.tensor([-1, 2]), 2, 3), "-1 to 2"),
        (lambda: require_posteriors(torch.full((2, 4), 0.3), "p"), "rows of p.*0.2"),
    ],
)
def test_what_does_not_fit_is_named(call, found):
    with pytest.raises(ValueError, match=found):
        call()


def test_what_fits_passes():
    require_matrix(torch.zeros(5, 3), "x", torch.zeros(5, 3))
    require_labels(torch.tensor([0, 2]), 2, 3)
    require_posteriors(torch.randn(5, 3).softmax(1).bfloat16(), "p")


def test_every_public_loss_has_a_docstring():
    for module in pkgutil.iter_modules(dfsbir.losses.__path__):
        losses = importlib.import_module(f"dfsbir.losses.{module.name}")
        for name in losses.__all__:
            if callable(getattr(losses, name)):
                assert getattr(losses, name).__doc__, name
