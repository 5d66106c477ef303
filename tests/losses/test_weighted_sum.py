"The weighted sum: what it calls, logs, returns and refuses."

import math

import pytest
import torch

from dfsbir.losses.weighted_sum import NonFiniteTerm, WeightedLoss


def number(value):
    return lambda: torch.tensor(value)


def test_it_weighs_logs_and_gives_the_gradient_of_the_sum():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    loss = WeightedLoss({"a": 2.0, "b": 0.5, "off": 0})
    terms = {
        "a": lambda: x.sum(),
        "b": lambda: (x**2).sum(),
        "off": lambda: pytest.fail("a term with weight 0 was computed"),
    }
    total = loss(terms)
    total.backward()
    assert total.item() == 8.5 and x.grad.tolist() == [3.0, 4.0]
    assert loss.last == {"a": 3.0, "b": 5.0} and loss.weighted == {"a": 6.0, "b": 2.5}
    assert loss.log("photo/") == {"photo/a": 3.0, "photo/b": 5.0, "photo/total": 8.5}
    assert loss.on == ["a", "b"]


def test_it_is_shown_as_a_table():
    loss = WeightedLoss({"a": 2.0, "off": 0})
    assert loss.log() == {} and "| a | 2 |" in loss._repr_markdown_()
    loss({"a": number(1.5)})
    assert "| a | 2 | 1.5000 | 3.0000 |" in loss._repr_markdown_()
    assert "| **total** | | | 3.0000 |" in loss._repr_markdown_()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_term_that_broke_is_named(bad):
    loss = WeightedLoss({"fine": 1.0, "broken": 0.1})
    with pytest.raises(NonFiniteTerm, match="'broken'.*'fine': 1.0"):
        loss({"fine": number(1.0), "broken": number(bad)})


def test_a_sum_that_overflows_is_noticed():
    with pytest.raises(NonFiniteTerm, match="total"):
        WeightedLoss({"big": 1e10})({"big": number(3e38)})


def test_misspelt_and_missing_terms_are_named():
    with pytest.raises(KeyError, match="allign"):
        WeightedLoss({"align": 1.0})({"align": number(0.0), "allign": number(0.0)})
    with pytest.raises(KeyError, match="align"):
        WeightedLoss({"align": 1.0, "adv": 2.0})({"adv": number(0.0)})


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_senseless_weights_are_refused(weight):
    with pytest.raises(ValueError, match="align"):
        WeightedLoss({"align": weight})


def test_nothing_to_minimise_is_an_error():
    with pytest.raises(ValueError, match="align"):
        WeightedLoss({"align": 0.0})({})


def test_on_a_device_values_are_read_when_they_are_asked_for():
    "The sum waits for nothing; a value that was not finite in between is named at the reading."
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: on the CPU values are read at once")

    def on_device(value):
        return lambda: torch.full((), value, device="cuda")

    loss = WeightedLoss({"a": 2.0, "b": 1.0})
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss({"a": on_device(1.0), "b": on_device(math.nan)})
        loss({"a": on_device(1.5), "b": on_device(2.0)})
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    with pytest.raises(NonFiniteTerm, match="'b'"):
        loss.log()
    assert loss.log() == {"a": 1.5, "b": 2.0, "total": 5.0}
