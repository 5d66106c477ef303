"""Where pairs come from: objects of a process's own, estimates that can be looked at."""

from types import SimpleNamespace

import pytest
import torch
from crossx.helpers import CONFIGS, SIDE, begin, make_teacher

from dfsbir.core.types import MODALITIES, Modality
from dfsbir.crossx.config import SGDConfig
from dfsbir.crossx.pairs import ProceduralPairs, classify_pairs, make_generators, optimizer_of
from dfsbir.inversion.generators import PixelGenerator, StrokeGenerator
from dfsbir.teachers.class_map import align_classes

SIZES = {Modality.PHOTO: SIDE, Modality.SKETCH: 12}


def procedural(rank=0, seed=0):
    fabric = SimpleNamespace(global_rank=rank, device=torch.device("cpu"))
    return ProceduralPairs(SIZES, fabric, seed)


def test_each_process_and_each_seed_draws_objects_of_its_own():
    first = procedural().sample(4).photo
    assert torch.equal(first, procedural().sample(4).photo)
    assert not torch.equal(first, procedural(rank=1).sample(4).photo)
    assert not torch.equal(first, procedural(seed=1).sample(4).photo)


def test_objects_are_numbered_on_and_have_a_size_for_each_modality():
    pairs = procedural()
    batch, more = pairs.sample(4), pairs.sample(3)
    assert batch.label.tolist() == [0, 1, 2, 3] and more.label.tolist() == [4, 5, 6]
    assert batch.photo.shape == (4, 3, SIDE, SIDE) and batch.sketch.shape == (4, 1, 12, 12)


def test_objects_go_on_from_a_saved_state():
    pairs, again = procedural(), procedural()
    pairs.sample(5)
    again.load_state_dict(pairs.state_dict())
    a, b = pairs.sample(3), again.sample(3)
    assert torch.equal(a.photo, b.photo) and torch.equal(a.label, b.label)


def test_objects_and_their_preview_draw_no_global_random_number():
    pairs, state = procedural(), torch.get_rng_state()
    shown = pairs.preview(4)
    pairs.sample(4)
    assert torch.equal(pairs.preview(4).photo, shown.photo)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_class_of_a_pair_against_a_slow_loop():
    teachers = {m: make_teacher(m, seed=k) for k, m in enumerate(MODALITIES)}
    class_map = align_classes(*(t.classes for t in teachers.values()))
    batch = procedural().sample(12)
    p = [class_map.posteriors(teachers[m](batch.of(m)).logits, m) for m in MODALITIES]
    wanted = [max(range(4), key=lambda k: (p[0][i, k] * p[1][i, k]).item()) for i in range(12)]
    assert classify_pairs(batch, teachers, class_map).tolist() == wanted


def test_the_class_of_a_pair_on_which_sure_teachers_disagree():
    "Every product of posteriors is 0 in single precision."
    logits = [[0.0, 0.0, 300.0, 180.0], [0.0, 0.0, 180.0, 300.5]]
    teachers = {
        m: lambda x, bn, row=row: SimpleNamespace(logits=torch.tensor([row]))
        for m, row in zip(MODALITIES, logits)
    }
    class_map = align_classes("abcd", "abcd")
    assert classify_pairs(procedural().sample(1), teachers, class_map).tolist() == [3]


@pytest.mark.parametrize("kind, made", [("stroke", StrokeGenerator), ("pixel", PixelGenerator)])
def test_generators_are_those_of_the_config(kind, made):
    config = CONFIGS["dfsbir"].changed({"pairs.sketch.kind": kind, "pairs.sketch.size": 20})
    photo, sketch = make_generators(config.pairs, classes=4).values()
    assert type(photo) is PixelGenerator and type(sketch) is made
    assert (photo.size, sketch.size, photo.classes, sketch.latent) == (SIDE, 20, 4, 8)
    if kind == "stroke":
        assert make_generators(config.pairs, 4, pen=0.053)["sketch"].width == 0.053
    unconditioned = make_generators(CONFIGS["paper"].pairs, classes=4)
    assert [g.classes for g in unconditioned.values()] == [0, 0]


@pytest.mark.parametrize("preset", CONFIGS)
def test_estimates_show_the_same_pairs_at_any_step(teachers, tmp_path, preset):
    crossx, _ = begin(teachers, CONFIGS[preset], tmp_path / "run")
    pairs, state = crossx.pairs, torch.get_rng_state()
    own = pairs.state_dict()["random"]
    shown = pairs.preview(10)
    assert torch.equal(pairs.preview(10).photo, shown.photo)
    assert torch.equal(pairs.state_dict()["random"], own)
    assert torch.equal(torch.get_rng_state(), state)
    noise, label = pairs.preview_noise(10)
    assert torch.equal(pairs.preview_noise(10)[0], noise)
    if CONFIGS[preset].pairs.conditioned:
        assert torch.equal(shown.label, label)
    else:
        both = crossx.teachers, crossx.class_map
        assert torch.equal(shown.label, classify_pairs(shown, *both))


def test_sgd_moves_weights_by_rate_and_momentum():
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = optimizer_of(SGDConfig(momentum=0.5))([{"params": [weight], "lr": 0.1}])
    for _ in range(2):
        weight.grad = torch.ones(1)
        optimizer.step()
    assert weight.item() == pytest.approx(-0.1 - 0.15)
