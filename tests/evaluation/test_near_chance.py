"""Near chance: guessing is told from knowing, and the warning says what to check."""

import pytest
import torch

from dfsbir.core.types import MODALITIES
from dfsbir.evaluation.near_chance import chance_warning, is_near_chance

PHOTO, SKETCH = MODALITIES


@pytest.mark.parametrize("classes", [2, 7, 10, 345, 1000])
@pytest.mark.parametrize("images", [200, 5000])
def test_guessing_is_near_chance_and_knowing_is_not(classes, images):
    "A net that guesses is found by all seeds; twice chance and a fifth of the way are beyond it."
    torch.manual_seed(0)
    for _ in range(20):
        right = torch.randint(classes, (images,)) == torch.randint(classes, (images,))
        assert is_near_chance(right.float().mean().item(), images, classes)
    assert not is_near_chance(max(2.5 / classes, 1 / classes + 0.2), images, classes)
    assert not is_near_chance(1.0, images, classes)


@pytest.mark.parametrize(
    "accuracy, near", [(0.0, True), (0.16, True), (0.37, False), (0.82, False)]
)
def test_what_users_met_is_told_apart(accuracy, near):
    "A net of 82% that fell to 16% of seven classes by a wrong mean and std."
    assert is_near_chance(accuracy, 5000, 7) == near
    assert bool(chance_warning(PHOTO, accuracy, 5000, 7)) == near


@pytest.mark.parametrize("modality", MODALITIES)
def test_a_warning_says_what_was_found_what_chance_is_and_what_to_check(modality):
    text = chance_warning(modality, 0.163, 500, 7)
    for fact in (f"{modality} teacher", "16.3%", "500", "14.3%", "mean and std", "order"):
        assert fact in text, fact
    assert ("white on black" in text) == (modality == SKETCH)
    estimates = chance_warning(modality, 0.163, 80, 7, estimates=True)
    assert "own 80 estimates" in estimates and "pairs.warmup_steps" in estimates
