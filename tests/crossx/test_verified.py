"Estimates judged by nets that were trained apart: where it can be done, and what it says."

from types import SimpleNamespace

import pytest
import torch

from dfsbir.core.data_guard import DataFreeViolation, data_free
from dfsbir.core.types import MODALITIES, PairBatch
from dfsbir.crossx.verified import (
    verified_in_words,
    verifier_recipe,
    verify_estimates,
    why_not_verified,
)
from dfsbir.data.toy_shapes import TOY_CLASSES
from dfsbir.teachers.experiment_data import ToyData
from dfsbir.teachers.teacher_recipe import TeacherRecipe

RECIPE = TeacherRecipe(net="tiny", epochs=8, size=56, seed=3)


def setup_of(**changes):
    "What the functions read of a setup."
    parts = {
        "data": ToyData(images=300, test_images=60, size=32),
        "trained": list(MODALITIES),
        "given_aliases": {},
        "recipes": dict.fromkeys(MODALITIES, RECIPE),
    }
    return SimpleNamespace(**parts | changes)


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    "Verifications of real images in the place of estimates, and what they were made of."
    setup, folder = setup_of(), tmp_path_factory.mktemp("verifiers")
    test = setup.data.test(TOY_CLASSES[:3])
    pairs = PairBatch(*(test[m].images()[:18] for m in MODALITIES), test[MODALITIES[0]].labels[:18])
    return setup, pairs, test, folder, verify_estimates(setup, pairs, test, folder)


def test_a_verifier_is_another_net_and_cheaper_than_the_teacher():
    recipe = verifier_recipe(RECIPE)
    assert recipe.seed != RECIPE.seed
    assert recipe.epochs * recipe.size**2 <= RECIPE.epochs * RECIPE.size**2 / 8
    assert verifier_recipe(TeacherRecipe(epochs=1, size=28)).epochs == 1


def test_every_modality_is_judged_among_the_shared_classes(judged):
    setup, pairs, test, _, found = judged
    assert list(found) == list(MODALITIES)
    for m in MODALITIES:
        assert found[m].classes == list(test[m].classes) == list(TOY_CLASSES[:3])
        assert torch.equal(found[m].labels, pairs.label)
        assert found[m].share > found[m].floor, "they are real images"


def test_the_sentence_has_the_shares_and_what_to_compare_them_with(judged):
    *_, found = judged
    text = verified_in_words(found)
    for m, verification in found.items():
        assert f"{verification.share:.0%} of 18 {m} estimates" in text
        assert f"{verification.ceiling:.0%}" in text
    assert "33%" in text


def test_verifiers_are_trained_once(judged):
    setup, pairs, test, folder, found = judged
    files = sorted(folder.glob("*.safetensors"))
    before = [file.stat().st_mtime_ns for file in files]
    again = verify_estimates(setup, pairs, test, folder)
    assert len(files) == 2 and [file.stat().st_mtime_ns for file in files] == before
    assert [again[m].share for m in MODALITIES] == [found[m].share for m in MODALITIES]


def test_the_data_free_law_forbids_it(judged):
    setup, pairs, test, folder, _ = judged
    with data_free(), pytest.raises(DataFreeViolation):
        verify_estimates(setup, pairs, test, folder)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"trained": []}, "brought"),
        ({"trained": [MODALITIES[0]]}, "brought"),
        ({"given_aliases": {"automobile": "car"}}, "aliases"),
    ],
)
def test_where_it_cannot_be_done_it_says_why(change, named, tmp_path):
    setup = setup_of(**change)
    assert named in why_not_verified(setup)
    with pytest.raises(ValueError, match=named):
        verify_estimates(setup, None, {}, tmp_path)
    assert why_not_verified(setup_of()) == ""
