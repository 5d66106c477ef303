"""Terms of the loss, and what the teacher says."""

import pytest
import torch
import torch.nn.functional as F

from dfsbir.finegrained.instances import InstancePairs
from dfsbir.finegrained.losses import triplet_loss
from dfsbir.finegrained.objective import FineGrainedLoss, Learner, teacher_features
from dfsbir.finegrained.views import ViewSampler
from dfsbir.losses.metric import infonce_loss


def test_teacher_features(teacher, toy):
    features = teacher_features(teacher, toy[0].pixels())
    images = toy[0].images()
    assert features.shape == (2, 16, 16)
    for found, x in zip(features, (images, images.flip(3))):
        assert torch.allclose(found, F.normalize(teacher(x), dim=1), atol=1e-5)


@pytest.fixture
def make_loss(toy, teacher, tiny_config):
    "The function make_loss(preset, **changes) -> (loss, sampler of its images)."

    def make(preset, **changes):
        config = tiny_config(preset, **changes)
        torch.manual_seed(0)
        taught = {n: teacher_features(teacher, toy[0].pixels()) for n in ("photo", "unlabelled")}
        learner = Learner(config.encoder.build(), config, teacher_dim=16)
        pairs = InstancePairs(*toy) if config.pairs else None
        sampler = ViewSampler(config, pairs, toy[0] if config.unlabelled else None)
        return FineGrainedLoss(config, learner, taught), sampler

    return make


def test_the_total_is_the_weighted_sum(make_loss):
    loss, sampler = make_loss("full")
    total = loss(sampler.draw())
    values = loss.log()
    weighted = sum(loss.config.weights[k] * v for k, v in values.items() if k != "total")
    assert values["total"] == pytest.approx(total.item()) == pytest.approx(weighted, abs=1e-5)
    assert set(values) == {
        *("cross", "photo", "sketch", "kd_unlabelled", "kd_photo", "kd_sketch", "total")
    }


def test_the_cross_modal_term(make_loss):
    "Of sketches against photos, on the discriminative feature."
    loss, sampler = make_loss("triplet", **{"pairs.cross.margin": 0.7})
    step = sampler.draw()
    loss.learner.eval()
    photo, sketch = (f[0] for f in loss.learner(list(step.groups.values())))
    wanted = triplet_loss(sketch, photo, step.instances, step.instances, 0.7)
    assert loss(step).item() == pytest.approx(wanted.item())


def test_infonce_beside_the_triplets(make_loss):
    loss, sampler = make_loss("triplet", **{"pairs.infonce.weight": 0.5})
    step = sampler.draw()
    loss.learner.eval()
    photo, sketch = (f[0] for f in loss.learner(list(step.groups.values())))
    total, values = loss(step), loss.log()
    assert values["infonce"] == pytest.approx(infonce_loss(photo, sketch, 0.07).item())
    assert total.item() == pytest.approx(values["cross"] + 0.5 * values["infonce"])


@pytest.mark.parametrize("preset", ("jigsaw-pretext", "regress"))
def test_layers_of_their_own_are_trained(make_loss, preset):
    loss, sampler = make_loss(preset)
    loss(sampler.draw()).backward()
    (head,) = loss.learner.heads.values()
    assert head.weight.grad.abs().sum() > 0
