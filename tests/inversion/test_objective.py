"Which network runs how often, terms at known values and at the extremes, gradients, faults."

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dfsbir.core.device import make_fabric
from dfsbir.core.types import MODALITIES, Modality, PairBatch
from dfsbir.data.toy_shapes import TOY_CLASSES
from dfsbir.inversion.estimator import PairEstimator
from dfsbir.inversion.generators import PixelGenerator, StrokeGenerator
from dfsbir.inversion.guidance import make_guide
from dfsbir.inversion.objective import EstimatorLoss
from dfsbir.losses.weighted_sum import WeightedLoss
from dfsbir.teachers.class_map import align_classes

SIDE, CLASSES = 32, list(TOY_CLASSES[:4])
TEACHER_TERMS = ("class", "one_hot", "class_balance", "activation", "align", "bn")
CLASS_MAP = align_classes(CLASSES, CLASSES)


def pair_batch(n=8, grad=False):
    images = [torch.rand(n, c, SIDE, SIDE).requires_grad_(grad) for c in (3, 1)]
    return PairBatch(*images, torch.arange(n) % len(CLASSES))


def weights(*on):
    return WeightedLoss({t: float(t in on) for t in EstimatorLoss.TERMS})


def values(objective, batch, names=EstimatorLoss.TERMS):
    "The terms of these names."
    terms = objective(batch, torch.randn(len(batch), 8))
    assert set(terms) == set(EstimatorLoss.TERMS)
    return {k: terms[k]() for k in names}


class Counted(nn.Module):
    "Passes calls on, counts them, and notes whether batch-norm statistics were wanted."

    def __init__(self, module):
        super().__init__()
        self.module, self.calls, self.bn = [module], 0, []  # a list: no submodule

    def forward(self, *args, **kwargs):
        self.calls += 1
        self.bn.append(kwargs.get("bn", True))
        return self.module[0](*args, **kwargs)

    def bn_targets(self):
        return self.module[0].bn_targets()


@pytest.mark.parametrize(
    "on,calls",
    [
        (("total_variation",), (0, 0, 0, 0)),
        (("diversity", "total_variation"), (0, 0, 0, 0)),
        (("modality",), (0, 0, 2, 0)),
        (("adversarial",), (0, 0, 0, 1)),
        (("class",), (1, 1, 0, 0)),
        (TEACHER_TERMS, (1, 1, 0, 0)),
        (EstimatorLoss.TERMS, (1, 1, 2, 1)),
    ],
)
def test_a_network_runs_at_most_once_and_only_when_needed(teachers, students_of, on, calls):
    "Calls of photo teacher, sketch teacher, guide (one a modality) and students."
    guide, students = Counted(lambda x: x.mean((1, 2, 3))), Counted(students_of)
    counted = {m: Counted(t) for m, t in teachers.items()}
    objective = EstimatorLoss(counted, CLASS_MAP, guide, students)
    terms = weights(*on)
    for step in (1, 2):
        terms(objective(pair_batch(), torch.randn(8, 8)))
        found = [c.calls for c in (*counted.values(), guide, students)]
        assert found == [step * n for n in calls]


def test_statistics_are_left_out_where_the_term_is_off(teachers):
    counted = {m: Counted(t) for m, t in teachers.items()}
    objective = EstimatorLoss(counted, CLASS_MAP, bn=False)
    values(objective, pair_batch(), ("class", "align"))
    assert [c.bn for c in counted.values()] == [[False], [False]]
    with pytest.raises(ValueError, match="bn=False"):
        values(objective, pair_batch(), ["bn"])


def test_terms_equal_the_formulas(teachers, students_of):
    def guide(x):
        return x.mean((1, 2, 3)) - 0.5

    batch = pair_batch()
    got = values(EstimatorLoss(teachers, CLASS_MAP, guide, students_of, shift=0), batch)
    out = {m: teachers[m](batch.of(m)) for m in MODALITIES}
    log_p = {m: out[m].logits.log_softmax(1) for m in MODALITIES}
    mean_p = {m: v.exp().mean(0) for m, v in log_p.items()}
    photo, sketch = log_p["photo"], log_p["sketch"]
    there = (photo.exp() * (photo - sketch)).sum(1).mean()
    back = (sketch.exp() * (sketch - photo)).sum(1).mean()
    right = {m: v[range(8), batch.label] for m, v in log_p.items()}
    students_right = {m: v[range(8), batch.label] for m, v in students_of(batch).items()}
    bound = 2 * math.log(4)
    guided = F.softplus(guide(batch.photo)).mean() + F.softplus(-guide(batch.sketch)).mean()
    expected = {
        "class": -sum(v.mean() for v in right.values()),
        "one_hot": -sum(v.amax(1).mean() for v in log_p.values()),
        "class_balance": sum((p * p.log()).sum() for p in mean_p.values()),
        "activation": -sum(o.features.abs().mean() for o in out.values()),
        "align": (there + back) / 2,
        "modality": guided,
        "adversarial": -sum((-v).clamp_max(bound).mean() for v in students_right.values()),
    }
    for k, v in expected.items():
        assert math.isclose(got[k].item(), v.item(), rel_tol=1e-4, abs_tol=1e-5), k


def same_images_twice(teachers):
    "One teacher for both modalities, and a batch of equal photos and sketches."
    batch = pair_batch()
    photo = batch.sketch.expand(-1, 3, -1, -1).contiguous()
    both = dict.fromkeys(MODALITIES, teachers[Modality.PHOTO])
    return both, PairBatch(photo, batch.sketch, batch.label)


def test_neutral_values(teachers):
    def undecided_guide(x):
        return x.new_zeros(len(x))

    def undecided_students(batch):
        return {m: torch.zeros(8, 4) for m in MODALITIES}

    both, batch = same_images_twice(teachers)
    got = values(
        EstimatorLoss(both, CLASS_MAP, undecided_guide, undecided_students, shift=0), batch
    )
    assert abs(got["align"]) < 1e-6
    assert math.isclose(got["modality"], 2 * math.log(2), rel_tol=1e-6)
    assert math.isclose(got["adversarial"], -2 * math.log(4), rel_tol=1e-6)


def test_the_adversary_is_bounded(teachers):
    def hopeless_students(batch):
        wrong = -1e4 * F.one_hot(batch.label, 4).float()
        return {m: wrong for m in MODALITIES}

    both, batch = same_images_twice(teachers)
    objective = EstimatorLoss(both, CLASS_MAP, students=hopeless_students)
    got = values(objective, batch, ["adversarial"])
    assert math.isclose(got["adversarial"], -4 * math.log(4), rel_tol=1e-6)


def test_flat_images_have_no_total_variation(teachers):
    flat = PairBatch(
        torch.full((8, 3, SIDE, SIDE), 0.5), torch.ones(8, 1, SIDE, SIDE), torch.zeros(8)
    )
    got = values(EstimatorLoss(teachers, CLASS_MAP), flat, ["total_variation"])
    assert got["total_variation"] == 0


@pytest.mark.parametrize("term", EstimatorLoss.TERMS)
def test_gradients_reach_both_modalities(teachers, students_of, term):
    batch = pair_batch(grad=True)
    guide = make_guide("teachers", teachers)
    objective = EstimatorLoss(teachers, CLASS_MAP, guide, students_of)
    values(objective, batch, [term])[term].backward()
    for m in MODALITIES:
        g = batch.of(m).grad
        assert g is not None and g.isfinite().all() and g.abs().sum() > 0
    assert not any(p.requires_grad for t in teachers.values() for p in t.parameters())


def test_released_alignment_gives_the_sketch_no_gradient(teachers):
    batch = pair_batch(grad=True)
    objective = EstimatorLoss(teachers, CLASS_MAP, symmetric=False)
    values(objective, batch, ["align"])["align"].backward()
    assert batch.photo.grad.abs().sum() > 0
    assert batch.sketch.grad is None or not batch.sketch.grad.any()


@pytest.mark.parametrize("kind", ["pixel", "stroke"])
def test_both_generators_learn_from_guidance(teachers, students_of, kind):
    photo = PixelGenerator(4, 3, SIDE, 8, 8)
    if kind == "pixel":
        sketch = PixelGenerator(4, 1, SIDE, 8, 8)
    else:
        sketch = StrokeGenerator(4, SIDE, 8, 3, 2)
    guide = make_guide("teachers", teachers)
    on = ("class", "align", "modality", "adversarial")
    objective = EstimatorLoss(teachers, CLASS_MAP, guide, students_of, bn=False)
    estimator = PairEstimator(photo, sketch, objective, weights(*on), make_fabric("cpu"), batch=8)
    before = [[p.detach().clone() for p in net.parameters()] for net in (photo, sketch)]
    estimator.synthesize(2, show=2)
    assert set(estimator.terms.log()) == {*on, "total"}
    for net, old in zip((photo, sketch), before):
        assert any(not torch.equal(a, b) for a, b in zip(net.parameters(), old))


class Recorded(Counted):
    "Keeps the images that a teacher was given."

    def forward(self, x, **kwargs):
        self.x = x.detach()
        return super().forward(x, **kwargs)


def test_the_shift_moves_all_images_alike(teachers):
    recorded = {m: Recorded(t) for m, t in teachers.items()}
    batch = pair_batch()
    values(EstimatorLoss(recorded, CLASS_MAP, shift=0.1), batch, ["class"])
    for m in MODALITIES:
        shifts = [(i, j) for i in range(-3, 4) for j in range(-3, 4)]
        rolled = [torch.roll(batch.of(m), s, (2, 3)) for s in shifts]
        assert sum(torch.equal(recorded[m].x, r) for r in rolled) == 1


def test_no_shift_draws_no_random_numbers(teachers):
    recorded = {m: Recorded(t) for m, t in teachers.items()}
    batch, noise = pair_batch(), torch.randn(8, 8)
    state = torch.get_rng_state()
    EstimatorLoss(recorded, CLASS_MAP, shift=0.0)(batch, noise)["class"]()
    assert all(torch.equal(recorded[m].x, batch.of(m)) for m in MODALITIES)
    assert torch.equal(torch.get_rng_state(), state)


def test_teachers_without_batch_norm(teachers, no_norm_teacher):
    plain = {m: no_norm_teacher(m) for m in MODALITIES}
    mixed = {Modality.PHOTO: teachers[Modality.PHOTO], Modality.SKETCH: plain[Modality.SKETCH]}
    assert values(EstimatorLoss(mixed, CLASS_MAP), pair_batch(), ["class", "bn"])["bn"] > 0
    with pytest.raises(ValueError, match="batch norm.*weight 0"):
        values(EstimatorLoss(plain, CLASS_MAP), pair_batch(), ["bn"])


def test_missing_guide_or_students_are_named(teachers):
    objective = EstimatorLoss(teachers, CLASS_MAP)
    with pytest.raises(ValueError, match="guide.*make_guide"):
        values(objective, pair_batch(), ["modality"])
    with pytest.raises(ValueError, match="students"):
        values(objective, pair_batch(), ["adversarial"])
