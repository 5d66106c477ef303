"Membership inference: numbers against slow loops, a planted leak, a private teacher, canaries."

import numpy as np
import pytest
import scipy.stats
import torch
from sklearn.metrics import roc_auc_score

from dfsbir.data.toy import toy_pairs
from dfsbir.evaluation.membership import (
    attack_auc,
    attack_table,
    binomial_interval,
    confidence,
    exposure,
    judge_attack,
    likelihood_ratio,
    random_halves,
    roc_points,
    tpr_at_fpr,
)


def scores(n, seed, levels=7):
    "Scores with many ties."
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(levels, (n,), generator=generator).double()


@pytest.mark.parametrize("levels", [2, 7, 10_000])
def test_auc_equals_a_slow_loop_and_scikit_learn(levels):
    members, others = scores(37, 0, levels), scores(53, 1, levels)
    pairs = [(s > t) + 0.5 * (s == t) for s in members.tolist() for t in others.tolist()]
    assert attack_auc(members, others) == pytest.approx(np.mean(pairs), abs=1e-12)
    truth = [1] * 37 + [0] * 53
    theirs = roc_auc_score(truth, torch.cat([members, others]).numpy())
    assert attack_auc(members, others) == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize("hits, trials", [(0, 10), (3, 10), (10, 10), (1, 1), (17, 400)])
def test_exact_intervals_equal_those_of_scipy(hits, trials):
    theirs = scipy.stats.binomtest(hits, trials).proportion_ci(0.95, method="exact")
    assert binomial_interval(hits, trials) == pytest.approx((theirs.low, theirs.high), abs=1e-6)


@pytest.mark.parametrize("fpr, tpr, accused", [(0.0, 0.25, 0), (0.1, 0.5, 1), (0.2, 0.75, 2)])
def test_rates_on_scores_made_by_hand(fpr, tpr, accused):
    others = torch.arange(10).float()
    members = torch.tensor([20.0, 8.5, 7.5, -1.0])
    rate = tpr_at_fpr(members, others, fpr)
    assert (rate.tpr, rate.false_positives) == (tpr, accused)
    assert rate.low <= tpr <= rate.high


@pytest.mark.parametrize("fpr", [0.0, 0.01, 0.1, 0.5])
def test_no_more_non_members_are_accused_than_allowed(fpr):
    others = scores(200, 3)
    assert tpr_at_fpr(scores(100, 4), others, fpr).false_positives <= fpr * len(others)


def test_an_interval_of_guessing_holds_one_half_and_a_sure_attack_is_above():
    generator = torch.Generator().manual_seed(0)
    guess = judge_attack(*torch.rand(2, 500, generator=generator), resamples=200)
    assert guess.auc_low < 0.5 < guess.auc_high and not guess.above_chance
    sure = judge_attack(torch.ones(50), torch.zeros(50), resamples=50)
    assert (sure.auc, sure.rates[0].tpr) == (1, 1) and sure.above_chance
    assert "1.000" in attack_table({"sure": sure})


@pytest.mark.parametrize("bad", [torch.tensor([]), torch.tensor([[1.0]]), torch.tensor([np.nan])])
def test_scores_that_are_none(bad):
    with pytest.raises(ValueError, match="members"):
        judge_attack(bad, torch.ones(3))


def test_the_curve_goes_from_nobody_to_everybody():
    fpr, tpr = roc_points(scores(30, 0), scores(40, 1))
    assert (fpr[-1], tpr[-1]) == (1, 1) and (fpr.diff() >= 0).all() and (tpr.diff() >= 0).all()
    area = np.trapezoid(np.r_[0, tpr.numpy()], np.r_[0, fpr.numpy()])
    assert area == pytest.approx(attack_auc(scores(30, 0), scores(40, 1)))


def test_confidence_is_the_logit_of_the_label():
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).double()
    labels = torch.tensor([0, 1, 2, 3, 0])
    p = logits.softmax(1)[torch.arange(5), labels]
    torch.testing.assert_close(confidence(logits.log_softmax(1), labels), torch.logit(p))


def test_the_likelihood_ratio_equals_a_slow_one():
    generator = torch.Generator().manual_seed(0)
    trained = random_halves(6, 8)
    references = torch.randn(8, 6, generator=generator).double() + 2 * trained
    target = torch.randn(6, generator=generator).double()
    means = [[references[mask[:, i], i].mean() for i in range(6)] for mask in (trained, ~trained)]
    deviations = []
    for mask, mean in zip((trained, ~trained), means, strict=True):
        squares = sum(((references[mask[:, i], i] - mean[i]) ** 2).sum() for i in range(6))
        deviations.append((squares / (mask.sum() - 6)).sqrt())
    expected = [
        scipy.stats.norm.logpdf(target[i], means[0][i], deviations[0])
        - scipy.stats.norm.logpdf(target[i], means[1][i], deviations[1])
        for i in range(6)
    ]
    found = likelihood_ratio(target, references, trained)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9)


def test_references_come_in_pairs_and_cover_every_image():
    assert (random_halves(50, 6).sum(0) == 3).all()
    with pytest.raises(ValueError, match="pairs"):
        random_halves(50, 5)
    with pytest.raises(ValueError, match="none"):
        likelihood_ratio(torch.zeros(2), torch.zeros(4, 2), torch.zeros(4, 2, dtype=torch.bool))


def test_exposure_is_the_rank_in_bits():
    never = torch.arange(1023).float()
    bits = exposure(torch.tensor([5000.0, 1021.5, -5.0]), never)
    torch.testing.assert_close(bits, torch.tensor([10.0, 9.0, 0.0]).double())
    chance = exposure(torch.rand(4000) * 1023, never).mean().item()
    assert chance == pytest.approx(1.44, abs=0.1)


@pytest.fixture(scope="module")
def sets():
    "Fifty members and as many non-members of the same kind."
    return [toy_pairs(50, 32, seed=s)[1] for s in (0, 1)]


def attack(teacher, sets):
    "By the loss."
    with torch.no_grad():
        found = [confidence(teacher(d.images()).logits.log_softmax(1), d.labels) for d in sets]
    return judge_attack(*found, resamples=300)


def test_a_teacher_that_was_fitted_to_fifty_images_leaks(sets):
    from dfsbir.teachers.training import train_teacher

    how = dict(net="small", epochs=40, augment=False, weight_decay=0.0, progress=False)
    leaky = attack(train_teacher(sets[0], sets[1], **how), sets)
    assert leaky.auc > 0.7 and leaky.auc_low > 0.6


def test_a_private_teacher_stays_within_its_interval_of_chance(sets):
    from dfsbir.teachers.private_training import PrivateRecipe, train_private_teacher

    recipe = PrivateRecipe(
        None, noise_multiplier=2.0, epochs=20, batch_size=25, multiplicity=1, accountant="rdp"
    )
    how = dict(augment=False, noise_seed=0, progress=False)
    private = attack(train_private_teacher(sets[0], recipe, "tiny-gn", **how), sets)
    assert private.auc_low < 0.5 < private.auc_high
