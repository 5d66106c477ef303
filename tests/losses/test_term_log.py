"""The log of terms: nothing is read before it is asked for, and NaN is noticed then."""

import pytest
import torch

from dfsbir.losses.term_log import TermLog
from dfsbir.losses.weighted_sum import NonFiniteTerm


def test_values_by_name_with_a_prefix():
    terms = TermLog()
    assert terms.log() == {}
    terms.keep({"a": torch.tensor(2.0, requires_grad=True)}, torch.tensor(3.0))
    assert terms.log("x/") == {"x/a": 2.0, "x/total": 3.0}
    assert not terms.last["a"].requires_grad


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_named(value):
    terms = TermLog()
    terms.keep({"good": torch.tensor(1.0), "bad": torch.tensor(value)}, torch.tensor(1.0))
    with pytest.raises(NonFiniteTerm, match="bad"):
        terms.log()
