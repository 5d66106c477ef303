"""What the guidance notebook should not hold: oracles at the extremes, who is asked how often, determinism, gates and faults."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.utils import save_image

from dfsbir.core.data_guard import DataFreeViolation, data_free
from dfsbir.core.device import make_fabric
from dfsbir.core.types import MODALITIES, Modality, Normalizer, PairBatch
from dfsbir.data.image_files import BrokenImage
from dfsbir.data.procedural import procedural_objects, procedural_photos
from dfsbir.data.toy import toy_pairs
from dfsbir.data.toy_shapes import TOY_CLASSES
from dfsbir.inversion.estimator import PairEstimator
from dfsbir.inversion.generators import PixelGenerator, StrokeGenerator
from dfsbir.inversion.guidance import Guide, guide_accuracy, make_guide, procedural_drawings
from dfsbir.inversion.objective import EstimatorLoss
from dfsbir.losses.weighted_sum import WeightedLoss
from dfsbir.teachers.class_map import align_classes, shared_logits
from dfsbir.teachers.nets import build_net, input_of
from dfsbir.teachers.teacher import Teacher
from dfsbir.teachers.training import train_teacher

SIDE, CLASSES = 32, list(TOY_CLASSES[:4])
ASKS_TEACHERS = ("class", "one_hot", "class_balance", "activation", "align", "bn")


@pytest.fixture(autouse=True)
def one_thread_one_seed():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def teachers():
    return {
        d.modality: train_teacher(d, net="tiny", epochs=2, progress=False)
        for d in toy_pairs(120, size=SIDE, classes=CLASSES)
    }


@pytest.fixture(scope="module")
def photos_and_sketches():
    return [d.images() for d in toy_pairs(60, size=SIDE, seed=3, split="test")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    top = tmp_path_factory.mktemp("guidance")
    for data in toy_pairs(25, size=SIDE, seed=9):
        for i, x in enumerate(data.images()):
            folder = top / data.modality / str(i % 3)
            folder.mkdir(parents=True, exist_ok=True)
            save_image(x, folder / f"{i}.png")
    return top / "photo", top / "sketch"


def class_map():
    return align_classes(CLASSES, CLASSES)


def pair_batch(n=8, grad=False):
    x = [torch.rand(n, c, SIDE, SIDE).requires_grad_(grad) for c in (3, 1)]
    return PairBatch(*x, torch.arange(n) % len(CLASSES))


class Counted(nn.Module):
    "Passes on, counts, and notes whether batch-norm statistics were wanted."

    def __init__(self, of):
        super().__init__()
        self.of, self.calls, self.bn = [of], 0, []

    def forward(self, *args, **kwargs):
        self.calls += 1
        self.bn.append(kwargs.get("bn", True))
        return self.of[0](*args, **kwargs)

    def bn_targets(self):
        return self.of[0].bn_targets()


def no_norm_teacher(modality, classes=CLASSES):
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, 2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, len(classes)),
    )
    return Teacher(net, classes, input_of(None, SIDE), modality)


def random_map(own, shared, generator):
    group = torch.cat(
        [torch.arange(shared), torch.randint(shared + 1, (own - shared,), generator=generator)]
    )[torch.randperm(own, generator=generator)]
    return F.one_hot(group, shared + 1)[:, :shared].float()


# shared classes


@pytest.mark.parametrize("own,shared,scale", [(3, 3, 1.0), (9, 4, 5.0), (40, 7, 300.0)])
def test_shared_logits_equal_the_slow_loop(own, shared, scale):
    g = torch.Generator().manual_seed(own)
    members, z = random_map(own, shared, g), torch.randn(5, own, generator=g) * scale
    z.requires_grad_()
    slow = torch.stack(
        [torch.stack([row[members[:, k] > 0].logsumexp(0) for k in range(shared)]) for row in z]
    )
    fast = shared_logits(z, members)
    weight = torch.randn(5, shared)
    slopes = [
        torch.autograd.grad((s * weight).sum(), z, retain_graph=True)[0] for s in (slow, fast)
    ]
    assert torch.allclose(fast, slow, rtol=1e-5, atol=1e-4) and torch.allclose(*slopes, atol=1e-5)


def test_shared_logits_of_equal_classes_are_the_logits():
    z = torch.randn(6, 4)
    assert torch.equal(shared_logits(z, torch.eye(4)), z)
    assert torch.equal(shared_logits(z, torch.eye(4)[[2, 0, 3, 1]])[:, 2], z[:, 0])


def test_shared_logits_take_half_precision_and_refuse_other_shapes():
    assert shared_logits(torch.randn(2, 4).bfloat16(), torch.eye(4)).dtype == torch.float32
    with pytest.raises(ValueError, match=r"wanted logits \(N,4\)"):
        shared_logits(torch.randn(2, 5), torch.eye(4))


# the objective


def all_terms(objective, batch, names=EstimatorLoss.TERMS):
    terms = objective(batch, torch.randn(len(batch), 8))
    assert set(terms) == set(EstimatorLoss.TERMS)
    return {k: terms[k]() for k in names}


def students_of(batch):
    return {
        m: batch.of(m).mean((1, 2, 3))[:, None].mul(torch.arange(4.0)).log_softmax(1)
        for m in MODALITIES
    }


@pytest.mark.parametrize(
    "on,calls",
    [
        (("total_variation",), dict(photo=0, sketch=0, guide=0, students=0)),
        (("diversity", "total_variation"), dict(photo=0, sketch=0, guide=0, students=0)),
        (("modality",), dict(photo=0, sketch=0, guide=2, students=0)),
        (("adversarial",), dict(photo=0, sketch=0, guide=0, students=1)),
        (("class",), dict(photo=1, sketch=1, guide=0, students=0)),
        (ASKS_TEACHERS, dict(photo=1, sketch=1, guide=0, students=0)),
        (EstimatorLoss.TERMS, dict(photo=1, sketch=1, guide=2, students=1)),
    ],
)
def test_everybody_is_asked_at_most_once_and_only_when_needed(teachers, on, calls):
    asked = {m.value: Counted(t) for m, t in teachers.items()} | {
        "guide": Counted(lambda x: x.mean((1, 2, 3))),
        "students": Counted(students_of),
    }
    objective = EstimatorLoss(
        {m: asked[m] for m in MODALITIES}, class_map(), asked["guide"], asked["students"]
    )
    terms = WeightedLoss({t: float(t in on) for t in EstimatorLoss.TERMS})
    for step in (1, 2):
        terms(objective(pair_batch(), torch.randn(8, 8)))
        assert {k: a.calls for k, a in asked.items()} == {k: step * n for k, n in calls.items()}


def test_statistics_are_left_out_where_the_term_is_off(teachers):
    asked = {m: Counted(t) for m, t in teachers.items()}
    all_terms(EstimatorLoss(asked, class_map(), bn=False), pair_batch(), ("class", "align"))
    assert [a.bn for a in asked.values()] == [[False], [False]]
    with pytest.raises(ValueError, match="made with bn=False"):
        all_terms(EstimatorLoss(asked, class_map(), bn=False), pair_batch(), ["bn"])


def test_terms_equal_the_formulas(teachers):
    batch, guide = pair_batch(), lambda x: x.mean((1, 2, 3)) - 0.5
    got = all_terms(EstimatorLoss(teachers, class_map(), guide, students_of, shift=0), batch)
    out = {m: teachers[m](batch.of(m)) for m in MODALITIES}
    logp = {m: out[m].logits.log_softmax(1) for m in MODALITIES}
    p, s = logp["photo"], logp["sketch"]
    said = students_of(batch)
    expected = {
        "class": -sum(v[range(8), batch.label].mean() for v in logp.values()),
        "one_hot": -sum(v.amax(1).mean() for v in logp.values()),
        "class_balance": sum(
            (v.exp().mean(0) * v.exp().mean(0).log()).sum() for v in logp.values()
        ),
        "activation": -sum(o.features.abs().mean() for o in out.values()),
        "align": ((p.exp() * (p - s)).sum(1).mean() + (s.exp() * (s - p)).sum(1).mean()) / 2,
        "modality": F.softplus(guide(batch.photo)).mean() + F.softplus(-guide(batch.sketch)).mean(),
        "adversarial": -sum(
            (-v[range(8), batch.label]).clamp_max(2 * math.log(4)).mean() for v in said.values()
        ),
    }
    for k, v in expected.items():
        assert math.isclose(got[k].item(), v.item(), rel_tol=1e-4, abs_tol=1e-5), k


def test_neutral_values(teachers):
    batch = pair_batch()
    one = dict.fromkeys(MODALITIES, teachers[Modality.PHOTO])
    same = PairBatch(batch.sketch.expand(-1, 3, -1, -1).contiguous(), batch.sketch, batch.label)
    undecided = all_terms(
        EstimatorLoss(
            one,
            class_map(),
            lambda x: x.new_zeros(len(x)),
            lambda b: {m: torch.zeros(8, 4) for m in MODALITIES},
            shift=0,
        ),
        same,
    )
    assert abs(undecided["align"]) < 1e-6  # one teacher, one picture: no disagreement
    assert math.isclose(
        undecided["modality"], 2 * math.log(2), rel_tol=1e-6
    )  # a guide that cannot tell
    assert math.isclose(
        undecided["adversarial"], -2 * math.log(4), rel_tol=1e-6
    )  # students without any idea
    hopeless = all_terms(
        EstimatorLoss(
            one,
            class_map(),
            students=lambda b: {m: -1e4 * F.one_hot(b.label, 4).float() for m in MODALITIES},
        ),
        same,
        ["adversarial"],
    )
    assert math.isclose(hopeless["adversarial"], -4 * math.log(4), rel_tol=1e-6)  # bounded
    flat = PairBatch(torch.full((8, 3, SIDE, SIDE), 0.5), torch.ones(8, 1, SIDE, SIDE), batch.label)
    assert (
        all_terms(EstimatorLoss(teachers, class_map()), flat, ["total_variation"])[
            "total_variation"
        ]
        == 0
    )


@pytest.mark.parametrize("term", EstimatorLoss.TERMS)
def test_gradients_reach_both_modalities(teachers, term):
    batch = pair_batch(grad=True)
    guide = make_guide("teachers", teachers)
    all_terms(EstimatorLoss(teachers, class_map(), guide, students_of), batch, [term])[
        term
    ].backward()
    for m in MODALITIES:
        g = batch.of(m).grad
        assert g is not None and g.isfinite().all() and g.abs().sum() > 0
    assert not any(p.requires_grad for t in teachers.values() for p in t.parameters())


def test_released_alignment_leaves_the_sketch_alone(teachers):
    batch = pair_batch(grad=True)
    all_terms(EstimatorLoss(teachers, class_map(), symmetric=False), batch, ["align"])[
        "align"
    ].backward()
    assert batch.photo.grad.abs().sum() > 0 and (
        batch.sketch.grad is None or not batch.sketch.grad.any()
    )


@pytest.mark.parametrize("sketch", ["pixel", "stroke"])
def test_both_generators_learn_from_guidance(teachers, sketch):
    nets = (
        PixelGenerator(4, 3, SIDE, 8, 8),
        (
            PixelGenerator(4, 1, SIDE, 8, 8)
            if sketch == "pixel"
            else StrokeGenerator(4, SIDE, 8, 3, 2)
        ),
    )
    guide = make_guide("teachers", teachers)
    on = ("class", "align", "modality", "adversarial")
    pen = PairEstimator(
        *nets,
        EstimatorLoss(teachers, class_map(), guide, students_of, bn=False),
        WeightedLoss({t: float(t in on) for t in EstimatorLoss.TERMS}),
        make_fabric("cpu"),
        batch=8,
    )
    before = [[p.detach().clone() for p in n.parameters()] for n in nets]
    pen.synthesize(2, show=2)
    assert set(pen.terms.last) == set(on)
    for net, old in zip(nets, before):
        assert any(not torch.equal(a, b) for a, b in zip(net.parameters(), old))


def test_shift_moves_all_images_alike_and_zero_draws_no_randomness(teachers):
    x = pair_batch().photo
    moved = EstimatorLoss(teachers, class_map(), shift=0.1)._moved(x)
    rolls = [
        torch.equal(moved, torch.roll(x, (i, j), (2, 3)))
        for i in range(-3, 4)
        for j in range(-3, 4)
    ]
    assert sum(rolls) == 1
    state = torch.get_rng_state()
    assert EstimatorLoss(teachers, class_map(), shift=0.0)._moved(x) is x and torch.equal(
        torch.get_rng_state(), state
    )


def test_teachers_without_batch_norm(teachers):
    plain = {m: no_norm_teacher(m) for m in MODALITIES}
    mixed = {Modality.PHOTO: teachers[Modality.PHOTO], Modality.SKETCH: plain[Modality.SKETCH]}
    assert all_terms(EstimatorLoss(mixed, class_map()), pair_batch(), ["class", "bn"])["bn"] > 0
    with pytest.raises(ValueError, match="neither teacher has batch norms.*weight 0"):
        all_terms(EstimatorLoss(plain, class_map()), pair_batch(), ["bn"])


def test_missing_guide_or_students_are_named(teachers):
    with pytest.raises(ValueError, match="no guide.*make_guide"):
        all_terms(EstimatorLoss(teachers, class_map()), pair_batch(), ["modality"])
    with pytest.raises(ValueError, match="no students"):
        all_terms(EstimatorLoss(teachers, class_map()), pair_batch(), ["adversarial"])


# guides


@pytest.fixture(scope="module")
def guides(teachers, folders):
    "One of each source, made inside the gate that they pass."
    with data_free(folders):
        return {source: make_guide(source, teachers, 0, folders) for source in Guide.SOURCES}


@pytest.mark.parametrize("source", Guide.SOURCES)
def test_guides_are_right_frozen_and_differentiable(source, guides, photos_and_sketches):
    guide = guides[source]
    photos, sketches = photos_and_sketches
    with torch.no_grad():
        auc = (guide(sketches)[:, None] > guide(photos)).float().mean().item()
    assert auc > 0.95 and guide_accuracy(guide, photos, sketches) > 0.8
    assert guide.source == source and guide.description and source in guide._repr_markdown_()
    assert not any(p.requires_grad for p in guide.parameters())
    for x in (torch.rand(3, 3, 40, 40), torch.rand(3, 1, 28, 28)):
        x.requires_grad_()
        out = guide(x)
        assert out.shape == (3,) and out.isfinite().all()
        out.sum().backward()
        assert x.grad.isfinite().all() and all(g.abs().sum() > 0 for g in x.grad)


@pytest.mark.parametrize("source", Guide.SOURCES)
def test_guides_judge_each_image_alone_and_survive_flat_ones(source, guides, photos_and_sketches):
    guide, x = guides[source], photos_and_sketches[0][:4]
    assert torch.allclose(guide(x), torch.cat([guide(v[None]) for v in x]), atol=1e-4)
    for value in (0.0, 0.5, 1.0):
        flat = torch.full((2, 1, SIDE, SIDE), value, requires_grad=True)
        guide(flat).sum().backward()
        assert guide(flat).isfinite().all() and flat.grad.isfinite().all()


@pytest.mark.parametrize("source", Guide.SOURCES)
def test_guides_are_deterministic_and_leave_randomness_alone(source, guides, teachers, folders):
    torch.manual_seed(99)
    state, x = (
        torch.get_rng_state(),
        torch.rand(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)),
    )
    with torch.no_grad():
        assert torch.equal(make_guide(source, teachers, 0, folders)(x), guides[source](x))
    assert torch.equal(torch.get_rng_state(), state)


def test_another_seed_is_another_guide(guides, folders):
    x = torch.rand(4, 3, SIDE, SIDE)
    assert not torch.equal(make_guide("folders", seed=1, folders=folders)(x), guides["folders"](x))


@pytest.mark.parametrize("source", ["procedural", "folders"])
def test_trained_guides_are_blind_to_colour(source, guides):
    guide, x = guides[source], torch.rand(4, 3, SIDE, SIDE)
    assert torch.allclose(
        guide(x),
        guide((x * torch.tensor(Normalizer.LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)),
        atol=1e-4,
    )


def test_the_teachers_stop_after_their_first_batch_norm(teachers):
    guide = make_guide("teachers", teachers)
    beyond = []
    handles = [
        t.net.fc.register_forward_hook(lambda *_: beyond.append(1)) for t in teachers.values()
    ]
    hooks = [len(m._forward_hooks) for t in teachers.values() for m in t.net.modules()]
    guide(torch.rand(2, 3, SIDE, SIDE))
    assert not beyond and hooks == [
        len(m._forward_hooks) for t in teachers.values() for m in t.net.modules()
    ]
    for h in handles:
        h.remove()


def test_a_memory_fits_its_own_statistics_best(teachers):
    guide = make_guide("teachers", teachers)
    x = torch.rand(5, 1, SIDE, SIDE)
    assert (guide.distance(x, "photo") >= 0).all() and guide.distance(x, "sketch").shape == (5,)
    assert torch.allclose(
        guide(x),
        (guide.distance(x, "photo") + 1e-3).log() - (guide.distance(x, "sketch") + 1e-3).log(),
    )


@pytest.mark.parametrize("size", [16, 32, 48])
def test_procedural_images_are_canonical(size):
    for x, c in ((procedural_photos(6, size), 3), (procedural_drawings(6, size), 1)):
        assert (
            x.shape == (6, c, size, size)
            and x.isfinite().all()
            and x.min() >= 0
            and x.max() <= 1
            and not x.requires_grad
        )
    assert (procedural_drawings(30, size).amin((1, 2, 3)) < 0.8).all()  # no empty paper


def test_guidance_without_images_passes_the_closed_gate(teachers):
    with data_free():
        assert make_guide("teachers", teachers).source == "teachers"


def test_folders_pass_the_gate_only_where_allowed(folders, guides):
    with data_free(), pytest.raises(DataFreeViolation):
        make_guide("folders", folders=folders)
    with data_free(folders[:1]), pytest.raises(DataFreeViolation):
        make_guide("folders", folders=folders)
    guide = guides["folders"]
    assert (
        all(str(f) in guide.description for f in folders)
        and "20 photo images" in guide.description
        and "10 held back" in guide.description
    )


def test_faults_are_named(teachers, folders, tmp_path):
    with pytest.raises(ValueError, match="one of .*found 'none'"):
        make_guide("none")
    with pytest.raises(ValueError, match="wants both.*photo"):
        make_guide("teachers", {Modality.PHOTO: teachers[Modality.PHOTO]})
    plain = {**teachers, Modality.SKETCH: no_norm_teacher("sketch")}
    with pytest.raises(ValueError, match="sketch teacher.*no batch norm.*'procedural'.*'folders'"):
        make_guide("teachers", plain)
    for wrong in ((), ("", ""), (folders[0],), (folders[0], "")):
        with pytest.raises(ValueError, match="wants two of them"):
            make_guide("folders", folders=wrong)
    with pytest.raises(FileNotFoundError, match="sketch images"):
        make_guide("folders", folders=(folders[0], tmp_path / "absent"))
    for i in range(9):
        save_image(torch.rand(1, 8, 8), tmp_path / f"{i}.png")
    with pytest.raises(ValueError, match="holds 9 sketch images.*at least 10"):
        make_guide("folders", folders=(folders[0], tmp_path))
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(BrokenImage, match="broken.png"):
        make_guide("folders", folders=(folders[0], tmp_path))


def test_a_very_large_folder_is_sampled_evenly(tmp_path):
    from dfsbir.inversion.guidance import _listed

    for i in range(12):
        save_image(torch.full((1, 4, 4), i / 12), tmp_path / f"{i:02}.png")
    assert _listed(tmp_path, "sketch", 4, most=6)[:, 0, 0, 0].mul(12).round().tolist() == [
        0,
        2,
        4,
        6,
        8,
        10,
    ]


def test_a_torchvision_teacher_can_guide():
    nets = {
        m: Teacher(
            build_net("torchvision", "resnet18", 4), CLASSES, input_of("torchvision", SIDE), m
        )
        for m in MODALITIES
    }
    assert make_guide("teachers", nets)(torch.rand(2, 3, SIDE, SIDE)).isfinite().all()


# things that have no name


@pytest.mark.parametrize("size, parts", [(24, 1), (33, 2), (48, 5)])
def test_objects_are_canonical_pairs(size, parts):
    made = procedural_objects(7, size, parts)
    assert (
        made.photo.shape == (7, 3, size, size)
        and made.sketch.shape == (7, 1, size, size)
        and made.label.tolist() == list(range(7))
        and made.photo_target is None
    )
    for x in (made.photo, made.sketch):
        assert x.isfinite().all() and x.min() >= 0 and x.max() <= 1 and not x.requires_grad


def test_objects_come_from_the_global_random_numbers():
    def made(seed):
        torch.manual_seed(seed)
        return procedural_objects(4, 24)

    a, b, c = made(1), made(1), made(2)
    assert torch.equal(a.photo, b.photo) and torch.equal(a.sketch, b.sketch)
    assert not torch.equal(a.photo, c.photo) and not torch.equal(a.sketch, c.sketch)


def test_objects_look_like_photos_and_drawings():
    made = procedural_objects(100)
    assert guide_accuracy(make_guide("procedural"), made.photo, made.sketch) > 0.9
    ink = (1 - made.sketch).mean((1, 2, 3))
    assert 0.02 < ink.mean() < 0.4 and (ink > 0.005).float().mean() > 0.95, (
        "lines on paper, and hardly ever an empty one"
    )
    assert (made.photo[0] - made.photo[1]).abs().mean() > 0.05


def test_photo_and_drawing_of_an_object_share_outlines():
    "Edges of a photo, blurred, against the ink of all drawings: its own comes first much more often than one time in fifty."
    made = procedural_objects(50, 48)
    x = F.avg_pool2d(made.photo, 3, 1)
    edges = (
        ((x[..., 1:, :-1] - x[..., :-1, :-1]) ** 2 + (x[..., :-1, 1:] - x[..., :-1, :-1]) ** 2)
        .sum(1, keepdim=True)
        .sqrt()
    )

    def seen(x):
        x = F.adaptive_avg_pool2d(x, 12).flatten(1)
        return F.normalize(x - x.mean(1, keepdim=True), dim=1)

    likeness = seen(edges) @ seen(1 - made.sketch).T
    own, others = likeness.diag(), likeness[~torch.eye(50, dtype=torch.bool)]
    assert own.mean() > others.mean() + 0.2
    assert (likeness.argmax(1) == torch.arange(50)).float().mean() > 0.2
