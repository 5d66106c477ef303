"Learning a known objective, resuming to the bit, precision, collapse, NaN, and what does not fit."

import pytest
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision

from dfsbir.core.checkpoint import load_state, save_state
from dfsbir.core.device import make_fabric
from dfsbir.inversion.estimator import EstimatorCollapsed, PairEstimator, measure_diversity
from dfsbir.inversion.generators import PixelGenerator, StrokeGenerator
from dfsbir.losses.inversion import diversity_loss
from dfsbir.losses.weighted_sum import NonFiniteTerm, WeightedLoss

WEIGHTS = {"photo": 1.0, "sketch": 1.0, "diversity": 0.01}


def fit_to_class(batch, noise):
    "An objective with a known optimum: brightness and ink follow the class."
    want = batch.label.float() / 2
    return {
        "photo": lambda: F.mse_loss(batch.photo.mean((1, 2, 3)), want),
        "sketch": lambda: F.mse_loss(batch.sketch.mean((1, 2, 3)), 1 - want / 5),
        "diversity": lambda: diversity_loss(noise, batch.photo, batch.label),
    }


def estimator(objective=fit_to_class, weights=WEIGHTS, classes=3, precision="32-true", **options):
    torch.manual_seed(1)
    return PairEstimator(
        PixelGenerator(classes, 3, 16, width=8),
        StrokeGenerator(classes, 16, strokes=3, templates_per_class=2),
        objective,
        WeightedLoss(weights),
        make_fabric("cpu", precision),
        **{"batch": 12, "schedule_steps": 30, "patience": 3} | options,
    )


def test_diversity_equals_loops():
    x, y = torch.rand(9, 2, 5, 5), torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 0])
    pairs = [
        (x[i] - x[j]).square().mean().sqrt() for i in range(9) for j in range(i) if y[i] == y[j]
    ]
    assert measure_diversity(x, y) == pytest.approx(torch.stack(pairs).mean().item(), rel=1e-5)
    assert measure_diversity(torch.ones(4, 1, 3, 3), torch.zeros(4)) == 0
    with pytest.raises(ValueError, match="no class"):
        measure_diversity(x[:2], torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="3 labels"):
        measure_diversity(x, y[:3])


def test_the_estimator_learns_the_objective_and_reports():
    e, log = estimator(), []
    shown = e.synthesize(40, show=5, progress=lambda step, terms: log.append((step, terms)))
    assert len(shown) == 5 and [step for step, _ in log] == list(range(1, 41))
    assert set(log[0][1]) == {"photo", "sketch", "diversity", "total"}
    assert log[-1][1]["photo"] < log[0][1]["photo"] / 2
    assert set(e.diversity) == {"photo", "sketch"}


def test_samples_have_every_class_and_no_gradient():
    batch = estimator().sample(7)
    assert len(batch) == 7 and set(batch.label.tolist()) == {0, 1, 2}
    assert not batch.photo.requires_grad and not batch.sketch.requires_grad


def assert_same(a, b):
    "Equal nested states."
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for k in a:
            assert_same(a[k], b[k])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for pair in zip(a, b):
            assert_same(*pair)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def test_resume_is_bit_for_bit(tmp_path):
    a = estimator()
    a.synthesize(7)
    save_state(tmp_path / "e.safetensors", a.state_dict())
    b = estimator(seed=99)
    b.synthesize(2)
    b.load_state_dict(load_state(tmp_path / "e.safetensors"))
    x, y = a.synthesize(6), b.synthesize(6)
    assert torch.equal(x.photo, y.photo) and torch.equal(x.sketch, y.sketch)
    assert torch.equal(x.label, y.label)
    assert a.terms.log() == b.terms.log() and a.diversity == b.diversity
    assert_same(a.state_dict(), b.state_dict())


def test_half_precision_steps():
    e = estimator(precision="bf16-mixed")
    e.synthesize(4)
    assert e.sample(3).photo.dtype == torch.float32
    assert all(p.isfinite().all() for g in e.generators.values() for p in g.parameters())


def loud_photos(batch, noise):
    "Gradients of the photos overflow when the loss is scaled; those of the sketches do not."
    return {
        "photo": lambda: 1e34 * batch.photo.float().mean(),
        "sketch": lambda: batch.sketch.float().mean(),
    }


def test_an_overflow_of_the_photos_leaves_the_sketches_their_step():
    "The loss scale is halved after both steps, not between them."
    weights = {"photo": 1.0, "sketch": 1.0}

    def weights_of(generator):
        return torch.cat([p.detach().flatten() for p in generator.parameters()])

    def moved(fabric):
        torch.manual_seed(1)
        e = PairEstimator(
            PixelGenerator(3, 3, 16, width=8),
            PixelGenerator(3, 1, 16, width=8),
            loud_photos,
            WeightedLoss(weights),
            fabric,
            batch=12,
            optimizer=torch.optim.SGD,
        )
        before = {m: weights_of(g) for m, g in e.generators.items()}
        e.run_step()
        return {m: weights_of(g) - before[m] for m, g in e.generators.items()}

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    half = Fabric(accelerator="cpu", devices=1, plugins=MixedPrecision("16-mixed", "cpu", scaler))
    scaled, plain = moved(half), moved(make_fabric("cpu"))
    assert not scaled["photo"].any() and scaler.get_scale() == 2.0**13
    length = scaled["sketch"].norm() / plain["sketch"].norm()
    assert length.item() == pytest.approx(1, rel=0.05)


def test_the_seed_decides():
    assert torch.equal(estimator().sample(4).photo, estimator().sample(4).photo)
    assert not torch.equal(estimator().sample(4).photo, estimator(seed=1).sample(4).photo)


def white_paper(batch, noise):
    "Asks for no ink."
    return {
        "ink": lambda: F.relu(0.999 - batch.sketch).sum(),
        "photo": lambda: batch.photo.mean() * 0,
    }


def test_collapse_is_named():
    e = estimator(white_paper, {"ink": 1.0, "photo": 1.0}, schedule_steps=10**6)
    for p in e.generators["sketch"].parameters():
        if p.ndim == 3:
            p.data.fill_(-8.0)  # all strokes transparent
    with pytest.raises(EstimatorCollapsed, match=r"sketch.* by 0\.00"):
        e.synthesize(30)


def test_a_healthy_start_does_not_alarm():
    e = estimator(min_diversity=0.01, patience=1)
    e.synthesize(4)
    assert all(d > 0.01 for d in e.diversity.values())


def test_nan_is_named():
    def nan(batch, noise):
        return {"bad": lambda: batch.photo.mean() * float("nan")}

    with pytest.raises(NonFiniteTerm, match="bad"):
        estimator(nan, {"bad": 1.0}).synthesize(1)


def test_an_unconditioned_estimator_needs_a_classifier():
    with pytest.raises(ValueError, match="classify="):
        estimator(classes=0)

    def bright(batch):
        return (batch.photo.mean((1, 2, 3)) > 0.5).long()

    def contrast(batch, noise):
        return {"p": lambda: -batch.photo.var(0).mean(), "s": lambda: batch.sketch.mean()}

    e = estimator(contrast, {"p": 1.0, "s": 1.0}, classes=0, classify=bright)
    e.synthesize(3)
    batch = e.sample(9)
    assert torch.equal(batch.label, bright(batch))


def test_generators_must_fit_together():
    fabric, terms = make_fabric("cpu"), WeightedLoss({"a": 1.0})
    with pytest.raises(ValueError, match="photo 3, 64 and sketch 2, 64"):
        PairEstimator(PixelGenerator(3, 3, 16), StrokeGenerator(2, 16), None, terms, fabric)
    with pytest.raises(ValueError, match="3 channels"):
        PairEstimator(PixelGenerator(3, 1, 16), StrokeGenerator(3, 16), None, terms, fabric)
