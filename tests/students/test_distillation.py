"Views and targets, exact resume, averages of weights, and what a distiller refuses."

import pytest
import torch
import torch.nn.functional as F
from students.helpers import (
    CLASS_MAP,
    make_distiller,
    make_students,
    noise_pairs,
    same_state,
    spec,
)

from dfsbir.core.checkpoint import load_state, save_state
from dfsbir.core.types import MODALITIES, Modality
from dfsbir.data.augment import shift_flip
from dfsbir.data.procedural import procedural_objects
from dfsbir.inversion.image_priors import agreed_adversary
from dfsbir.losses.weighted_sum import NonFiniteTerm
from dfsbir.students.distillation import Distiller, teacher_targets, with_targets
from dfsbir.students.encoder import encoder_from_teacher
from dfsbir.students.heads import MetricSpace
from dfsbir.teachers.class_map import align_classes


def shifts(image, k):
    "An image moved by up to k whole pixels, its edges repeated."
    H, W = image.shape[-2:]
    padded = F.pad(image[None], (k, k, k, k), mode="replicate")[0]
    steps = range(2 * k + 1)
    return [padded[:, i : i + H, j : j + W] for i in steps for j in steps]


def test_shift_flip_moves_whole_pixels():
    x = torch.rand(6, 2, 16, 16)
    for image, view in zip(x, shift_flip(x, shift=0.1, flip=0.5), strict=True):
        moved = shifts(image, 2)
        candidates = moved + [v.flip(2) for v in moved] + shifts(image.flip(2), 2)
        assert any(torch.equal(view, v) for v in candidates)


def test_targets_of_one_and_two_views_against_the_teacher(teachers):
    x, t = noise_pairs().photo, teachers[Modality.PHOTO]
    plain = CLASS_MAP.posteriors(t(x).logits, "photo")
    flipped = CLASS_MAP.posteriors(t(x.flip(3)).logits, "photo")
    torch.testing.assert_close(teacher_targets(t, CLASS_MAP, x, 1), plain)
    torch.testing.assert_close(teacher_targets(t, CLASS_MAP, x, 2), (plain + flipped) / 2)
    assert not teacher_targets(t, CLASS_MAP, x.requires_grad_(), 4).requires_grad


@pytest.mark.parametrize("kind", ["posterior", "feature", "joint"])
def test_resume_is_exact(teachers, tmp_path, kind):
    batch = with_targets(noise_pairs(), teachers, CLASS_MAP)
    whole, path = make_distiller(teachers, kind), tmp_path / "half.safetensors"
    for k in range(6):
        if k == 3:
            state = {"distiller": whole.state_dict(), "rng": torch.get_rng_state()}
            save_state(path, state)
        whole.step(batch)
    resumed = make_distiller(teachers, kind)
    state = load_state(path)
    resumed.load_state_dict(state["distiller"])
    torch.set_rng_state(state["rng"])
    for _ in range(3):
        resumed.step(batch)
    for part in ("students", "averaged", "queue"):
        assert same_state(getattr(resumed, part), getattr(whole, part))
    assert resumed.terms.last == whole.terms.last
    assert all(same_state(resumed.encoders()[m], whole.encoders()[m]) for m in MODALITIES)


@pytest.mark.parametrize("kind", ["posterior", "feature"])
def test_the_running_average_against_a_slow_loop(teachers, kind):
    "The proxies that both feature students share are averaged at the rate of everything else."
    d = make_distiller(teachers, kind, ema_decay=0.6)
    batch = with_targets(noise_pairs(), teachers, CLASS_MAP)
    start = d.students.state_dict()
    kept = {k: v.double().clone() for k, v in start.items() if v.is_floating_point()}
    for step in range(1, 5):
        d.step(batch)
        weight = 1 - min(0.6, step / (step + 5))
        now = d.students.state_dict()
        for k in kept:
            kept[k] += weight * (now[k].double() - kept[k])
    averaged = d.averaged.state_dict()
    for k, v in kept.items():
        torch.testing.assert_close(averaged[k].double(), v, rtol=1e-5, atol=1e-6, msg=k)


def test_a_decay_of_zero_keeps_the_last_weights(teachers):
    d, batch = (
        make_distiller(teachers, ema_decay=0.0),
        with_targets(noise_pairs(), teachers, CLASS_MAP),
    )
    for _ in range(3):
        d.step(batch)
    assert same_state(d.averaged, d.students)


def test_a_term_that_is_not_finite_is_named_and_changes_nothing(teachers):
    d, batch = make_distiller(teachers), with_targets(noise_pairs(), teachers, CLASS_MAP)
    d.step(batch)
    before = {k: v.clone() for k, v in d.students.state_dict().items()}
    batch.photo_target[0, 0] = float("nan")
    with pytest.raises(NonFiniteTerm, match="consistency"):
        d.step(batch)
    assert all(torch.equal(before[k], v) for k, v in d.students.state_dict().items())


def test_terms_and_what_they_need(teachers):
    with pytest.raises(KeyError, match="consistancy"):
        Distiller(*make_students(teachers), {"consistancy": 1.0})
    with pytest.raises(ValueError, match="with_targets"):
        make_distiller(teachers).step(noise_pairs())
    for kind in ("posterior", "feature"):
        with pytest.raises(ValueError, match=f"{kind.title()}Head.*joint"):
            Distiller(*make_students(teachers, spec(kind)), {"infonce": 1.0})


def test_shape_is_learned_from_objects_in_a_few_steps(teachers):
    objects = with_targets(procedural_objects(24, 20), teachers, CLASS_MAP)
    students = make_students(teachers, spec("joint"), warm=False)
    d = Distiller(*students, {"infonce": 1.0}, lr=3e-3, steps=60, head_lr=1e-2)
    log = []
    for _ in range(60):
        d.step(objects)
        log.append(d.terms.log()["infonce"])
    assert sum(log[-10:]) < 0.8 * sum(log[:10])


def distilled(teachers, batch, wise_ft_alpha):
    "A distiller after three steps, and the students it started with."
    d = make_distiller(teachers, "joint", wise_ft_alpha=wise_ft_alpha)
    start = {
        m: {k: v.clone() for k, v in getattr(d.students, m).state_dict().items()}
        for m in MODALITIES
    }
    torch.manual_seed(2)
    for _ in range(3):
        d.step(batch)
    return d, start


def test_wise_ft_alpha_runs_from_the_start_to_the_end(teachers):
    batch = with_targets(noise_pairs(), teachers, CLASS_MAP)
    kept = []
    for alpha in (0.0, 0.5, 1.0):
        d, start = distilled(teachers, batch, alpha)
        kept.append({m: e.state_dict() for m, e in d.encoders().items()})
    for m in MODALITIES:
        assert all(torch.equal(kept[0][m][k], v) for k, v in start[m].items())
        averaged = getattr(d.averaged, m).state_dict()
        assert all(torch.equal(v, averaged[k]) for k, v in kept[2][m].items())
    begin, middle, end = (k[Modality.PHOTO] for k in kept)
    moved = [k for k, v in end.items() if not torch.equal(v, begin[k])]
    assert len(moved) > 5
    for k in moved:
        torch.testing.assert_close(middle[k], (begin[k] + end[k]) / 2)


def test_the_heads_rate_is_the_heads_alone(teachers):
    d = make_distiller(teachers, "joint", ema_decay=0.0, wise_ft_alpha=1.0)
    nets, heads = d.optimizer.param_groups
    count = sum(len(list(e.net.parameters())) for e in (d.students.photo, d.students.sketch))
    assert (len(nets["params"]), nets["initial_lr"]) == (count, 1e-3)
    assert (len(heads["params"]), heads["initial_lr"]) == (8, 1e-2)
    before = {k: v.clone() for k, v in d.students.photo.named_parameters()}
    d.step(with_targets(noise_pairs(), teachers, CLASS_MAP))
    moved = {k: (v - before[k]).abs().max().item() for k, v in d.students.photo.named_parameters()}
    of_net = max(v for k, v in moved.items() if k.startswith("net"))
    assert moved["head.shape.weight"] == pytest.approx(1e-2, rel=0.01)
    assert of_net == pytest.approx(1e-3, rel=0.01)


def test_an_adversary_finds_nothing_in_a_copy_of_the_teacher(teachers):
    "Whatever the temperature of the posterior in the embedding."
    photo = teachers[Modality.PHOTO]
    own = align_classes(photo.classes, photo.classes)
    space = MetricSpace.random(len(own.classes), 8)
    copies = [
        encoder_from_teacher(t, own, space, spec(temperature=0.5), flip_tta=False)
        for t in (photo, photo)
    ]
    d, x = Distiller(*copies, {"consistency": 1.0}), noise_pairs().photo
    asked, answer = own.shared_logits(photo(x).logits, "photo"), d.predict_logits("photo", x)
    assert abs(agreed_adversary(5 * asked, 5 * answer).item()) < 1e-6
