"What may be said about privacy: composition, statements and their withdrawal."

import math

import pytest
import torch

from dfsbir.core.checkpoint import load_state, read_card, save_state
from dfsbir.core.data_guard import data_free
from dfsbir.core.privacy import (
    Guarantee,
    PrivacyStatement,
    compose,
    guarantee_of,
    guard_openings,
    note_opening,
    read_openings,
    state_privacy,
)

PHOTO, SKETCH = Guarantee(3.0, 1e-5), Guarantee(1.0, 1e-6)
BOTH = {"photo": (PHOTO, ""), "sketch": (SKETCH, "")}


def test_composition():
    assert compose([PHOTO, SKETCH], disjoint=True) == Guarantee(3.0, 1e-5)
    assert compose([PHOTO, SKETCH], disjoint=False) == Guarantee(4.0, 1e-5 + 1e-6)
    assert compose([SKETCH], disjoint=False) == SKETCH


@pytest.mark.parametrize("epsilon, delta", [(-1, 0), (math.inf, 0), (math.nan, 0), (1, 1), (1, -1)])
def test_impossible_guarantees(epsilon, delta):
    with pytest.raises(ValueError, match="epsilon"):
        Guarantee(epsilon, delta)


def test_randomised_response_reaches_the_bound():
    "Answers with the truth with probability e^eps / (1 + e^eps): the bound is tight there."
    epsilon = 1.5
    truth = math.exp(epsilon) / (1 + math.exp(epsilon))
    assert Guarantee(epsilon, 0).most_members_found(1 - truth) == pytest.approx(truth)


def test_no_privacy_loss_is_guessing_and_the_bound_never_exceeds_one():
    assert Guarantee(0, 0).most_members_found(0.3) == pytest.approx(0.3)
    assert Guarantee(50, 0).most_members_found(0.5) <= 1


def test_a_statement_needs_every_teacher_and_a_closed_guard():
    assert state_privacy(BOTH, True).guarantee == PHOTO
    assert state_privacy(BOTH, False).guarantee.epsilon == 4
    without = state_privacy(BOTH | {"sketch": (None, "is secretive")}, True)
    assert without.guarantee is None and without.reasons == ("the sketch teacher is secretive",)
    opened = state_privacy(BOTH, True, ["a folder could be opened"])
    assert opened.guarantee is None and "a folder could be opened" in str(opened)


def test_an_epsilon_that_excludes_nothing_is_not_stated():
    large = {name: (Guarantee(15, 1e-6), "") for name in ("photo", "sketch")}
    assert state_privacy(large, True).guarantee == Guarantee(15, 1e-6)
    refused = state_privacy(large, False)
    assert refused.guarantee is None and "30" in str(refused)


def test_whatever_a_guard_lets_through_is_a_reason(tmp_path):
    "No guard, or any folder that is allowed, takes the guarantee; a closed guard keeps it."
    with data_free() as closed, data_free([tmp_path / "a", tmp_path / "b"]) as opened:
        reasons = guard_openings(opened)
    assert len(reasons) == 2 and all(str(tmp_path / n) in r for n, r in zip("ab", reasons))
    assert state_privacy(BOTH, True, guard_openings(closed)).guarantee == PHOTO
    for found in (reasons, reasons[:1], guard_openings(None)):
        assert state_privacy(BOTH, True, found).guarantee is None


def test_statements_survive_json():
    for statement in (state_privacy(BOTH, False), state_privacy(BOTH, True, ["opened"])):
        assert PrivacyStatement.from_card(statement.card()) == statement
    assert PrivacyStatement.from_card(None).guarantee is None


def test_a_statement_is_a_guarantee_or_reasons():
    with pytest.raises(ValueError, match="either"):
        PrivacyStatement(PHOTO, ("a reason",))
    with pytest.raises(ValueError, match="either"):
        PrivacyStatement(None)


@pytest.mark.parametrize(
    "privacy, word",
    [
        (None, "not trained privately"),
        ({"epsilon": 1, "delta": 0, "weights": "other"}, "other weights"),
        ({"epsilon": 1, "delta": 0, "weights": "mine", "withheld": "known seed"}, "known seed"),
    ],
)
def test_cards_without_a_guarantee(privacy, word):
    found, why = guarantee_of({"privacy": privacy}, "mine")
    assert found is None and word in why


def test_an_opening_takes_the_guarantee_from_encoders_and_stays(tmp_path):
    file = tmp_path / "encoders" / "photo.safetensors"
    save_state(file, {"w": torch.ones(2)}, {"privacy": state_privacy(BOTH, True).card(), "x": 1})
    note_opening(tmp_path, "first")
    note_opening(tmp_path, "second")
    note_opening(tmp_path, "first")
    assert read_openings(tmp_path) == ["first", "second"]
    card = read_card(file)
    assert card["x"] == 1 and torch.equal(load_state(file)["w"], torch.ones(2))
    assert PrivacyStatement.from_card(card["privacy"]).reasons == ("first", "second")


def test_encoders_without_a_statement_get_the_reason(tmp_path):
    file = tmp_path / "encoders" / "photo.safetensors"
    save_state(file, {"w": torch.ones(2)}, {})
    note_opening(tmp_path, "first")
    assert PrivacyStatement.from_card(read_card(file)["privacy"]).reasons == ("first",)
