"""What the distillation notebook should not hold: read-outs against slow loops, encoders in a fresh process, ONNX, exact resume, students of other nets."""

import copy
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dfsbir.core.checkpoint import UnsafeCheckpoint, load_state, save_state
from dfsbir.core.device import capture
from dfsbir.core.types import MODALITIES, Modality, Normalizer, PairBatch
from dfsbir.data.augment import shift_flip
from dfsbir.data.procedural import procedural_objects
from dfsbir.losses.weighted_sum import NonFiniteTerm
from dfsbir.students.distillation import Distiller, teacher_targets, with_targets
from dfsbir.students.encoder import (
    build_encoder,
    export_onnx,
    load_encoder,
    load_encoders,
    make_encoder,
    save_encoders,
)
from dfsbir.students.heads import (
    FeatureHead,
    IntermediateFeatures,
    JointHead,
    PosteriorHead,
    complement_basis,
    make_proxies,
)
from dfsbir.teachers.class_map import align_classes
from dfsbir.teachers.nets import build_net, input_of
from dfsbir.teachers.teacher import Teacher

SIDE = 20
PHOTO, SKETCH = ["poodle", "beagle", "car", "tree", "moon"], ["dog", "automobile", "fish", "tree"]
MAP = align_classes(PHOTO, SKETCH, {"poodle": "dog", "beagle": "dog", "automobile": "car"})
K, D = 3, 8


@pytest.fixture(autouse=True)
def one_thread_one_seed():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def teachers():
    torch.manual_seed(0)
    return {
        m: Teacher(
            build_net("dfsbir", "tiny", len(names)),
            names,
            input_of("dfsbir", SIDE),
            m,
            card=dict(source="dfsbir", name="tiny"),
        )
        for m, names in zip(MODALITIES, (PHOTO, SKETCH))
    }


def students(teachers, dim=D, **options):
    proxies, slack = make_proxies(K, dim)
    return [make_encoder(teachers[m], MAP, proxies, slack[m], **options) for m in MODALITIES]


def pairs(n=8):
    return PairBatch(
        torch.rand(n, 3, SIDE, SIDE), torch.rand(n, 1, SIDE, SIDE), torch.arange(n) % K
    )


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# read-outs


def test_posterior_readout_against_a_slow_loop():
    proxies, slack = make_proxies(K, D, seed=3)
    readout = {m: PosteriorHead(MAP.assignment(m), proxies, slack[m], 2.0) for m in MODALITIES}
    logits = {m: torch.randn(4, len(names)) * 3 for m, names in zip(MODALITIES, (PHOTO, SKETCH))}
    z, p = {}, {}
    for m, names in zip(MODALITIES, (PHOTO, SKETCH)):
        rows = []
        for row in logits[m]:
            e = (row / 2.0).double().exp().tolist()
            sums = [
                sum(e[c] for c in range(len(names)) if MAP.assignment(m)[c, k]) for k in range(K)
            ]
            rows.append([s / sum(sums) for s in sums])
        p[m] = torch.tensor(rows)
        z[m] = readout[m](logits[m])
        torch.testing.assert_close(readout[m].log_posteriors(logits[m]).exp(), p[m])
        torch.testing.assert_close(MAP.posteriors(logits[m], m, 2.0), p[m])
        torch.testing.assert_close(z[m].norm(dim=1), torch.ones(4))
    a, b = MODALITIES
    torch.testing.assert_close(
        z[a] @ z[b].T, p[a] @ p[b].T
    )  # the probability that the two show one class


def test_posterior_readout_at_the_extremes():
    proxies, slack = make_proxies(K, D)
    readout = PosteriorHead(torch.eye(K), proxies, slack[Modality.PHOTO])
    logits = torch.tensor([[1e4, 0, 0], [0.0, 0, 0], [-1e4, -1e4, -1e4]]).requires_grad_()
    z = readout(logits)
    z.sum().backward()
    assert z.isfinite().all() and logits.grad.isfinite().all()
    torch.testing.assert_close(z[0], proxies[0], atol=1e-4, rtol=0)


def test_feature_readout_answers_by_cosine():
    readout = FeatureHead(5, make_proxies(K, D)[0], 0.1)
    h = torch.randn(4, 5)
    z = readout(h)
    torch.testing.assert_close(
        readout.log_posteriors(h).exp(),
        torch.stack([F.cosine_similarity(z, p[None]) for p in readout.proxies], 1)
        .div(0.1)
        .softmax(1),
    )


@pytest.mark.parametrize("mirror", [False, True])
def test_a_warm_posterior_student_says_what_its_teacher_says(teachers, mirror):
    for e, m in zip(students(teachers, mirror=mirror), MODALITIES):
        x = pairs().of(m)
        predict_log_probs = teachers[m](x).logits
        torch.testing.assert_close(
            e.eval().predict_log_probs(x)[1].exp(), MAP.posteriors(predict_log_probs, m)
        )
        assert all(not p.requires_grad for p in teachers[m].net.parameters()) and all(
            p.requires_grad for p in e.net.parameters()
        )
        with torch.no_grad():
            next(e.parameters()).add_(1)
        assert torch.equal(teachers[m](x).logits, predict_log_probs), "the student is a copy"


def test_frozen_batch_norm_stays_and_a_fresh_one_moves(teachers):
    for warm in (True, False):
        e = students(teachers, warm=warm)[0]
        before = {k: v.clone() for k, v in e.net.state_dict().items() if "running" in k}
        e.train()(torch.rand(4, 3, SIDE, SIDE))
        assert all(torch.equal(before[k], e.net.state_dict()[k]) for k in before) is warm


# students of other nets, other inputs


class OneChannel(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 6, 3, 2), nn.Linear(6, len(SKETCH))

    def forward(self, x):
        return self.head(self.conv(x).relu().mean((2, 3)))


@pytest.mark.parametrize("kind", ["posterior", "feature"])
def test_a_student_of_another_net_has_that_nets_input(teachers, kind):
    proxies, slack = make_proxies(K, D)
    sketch = Teacher(
        OneChannel(), SKETCH, Normalizer(28, 1, 0.2, 0.4, dark_on_light=False), "sketch"
    )
    e = make_encoder(
        sketch, MAP, proxies, slack[Modality.SKETCH], kind, warm=False, net="dfsbir/small"
    )
    assert (
        e.normalizer.card() == input_of("dfsbir", 28).card() and type(e.net).__name__ == "SmallNet"
    )
    assert e.eval()(torch.rand(2, 1, 40, 40)).shape == (2, D)
    assert build_encoder(e.card).state_dict().keys() == e.state_dict().keys()
    grey = make_encoder(
        sketch, MAP, proxies, slack[Modality.SKETCH], kind, warm=False, net="dfsbir/grey"
    )
    assert grey.normalizer.channels == grey.net.get_submodule(
        "stem.0"
    ).in_channels == 1 and grey.eval()(torch.rand(2, 1, 40, 40)).shape == (2, D)
    with pytest.raises(ValueError, match="cannot be rebuilt by name.*student net.*warm=False"):
        make_encoder(sketch, MAP, proxies, slack[Modality.SKETCH], kind)
    with pytest.raises(ValueError, match="another architecture.*warm=False"):
        make_encoder(sketch, MAP, proxies, slack[Modality.SKETCH], kind, net="dfsbir/small")


def test_an_unknown_readout_is_named(teachers):
    with pytest.raises(
        ValueError, match="'posterior', 'feature', 'joint' or 'layers'; found 'features'"
    ):
        students(teachers, kind="features")


# views and targets


def test_shift_flip_moves_whole_pixels():
    x = torch.rand(6, 2, 16, 16)
    moved = shift_flip(x, shift=0.1, flip=0.5)
    for a, b in zip(x, moved):
        padded = F.pad(a[None], (2, 2, 2, 2), mode="replicate")[0]
        views = [
            v
            for i in range(5)
            for j in range(5)
            for p in [padded[:, i : i + 16, j : j + 16]]
            for v in (p, p.flip(2))
        ]
        mirrored = F.pad(a.flip(2)[None], (2, 2, 2, 2), mode="replicate")[0]
        assert any(
            torch.equal(b, v)
            for v in views
            + [mirrored[:, i : i + 16, j : j + 16] for i in range(5) for j in range(5)]
        )


def test_targets_of_one_and_two_views_against_the_teacher(teachers):
    x, t = pairs().photo, teachers[Modality.PHOTO]
    plain, mirrored = (
        MAP.posteriors(t(x).logits, "photo"),
        MAP.posteriors(t(x.flip(3)).logits, "photo"),
    )
    torch.testing.assert_close(teacher_targets(t, MAP, x, 1), plain)
    torch.testing.assert_close(teacher_targets(t, MAP, x, 2), (plain + mirrored) / 2)
    assert not teacher_targets(t, MAP, x.requires_grad_(), 4).requires_grad


# the distiller

WEIGHTS = dict(consistency=1.0, proxy_anchor=0.5, contrast=0.5)


def distiller(teachers, **options):
    torch.manual_seed(1)
    kind = options.pop("kind", "posterior")
    more = dict(instance=1.0) if kind == "joint" else {}
    return Distiller(
        *students(teachers, kind=kind, warm=kind != "feature"),
        WEIGHTS | more,
        lr=1e-3,
        steps=6,
        **{**(dict(head_lr=1e-2, interpolate=0.7) if kind == "joint" else {}), **options},
    )


@pytest.mark.parametrize("kind", ["posterior", "feature", "joint"])
def test_resume_is_exact(teachers, tmp_path, kind):
    batch, whole = with_targets(pairs(), teachers, MAP), distiller(teachers, kind=kind)
    for k in range(6):
        if k == 3:
            save_state(
                tmp_path / "half.safetensors",
                {"distiller": whole.state_dict(), "rng": torch.get_rng_state()},
            )
        whole.step(batch)
    again = distiller(teachers, kind=kind)
    state = load_state(tmp_path / "half.safetensors")
    again.load_state_dict(state["distiller"])
    torch.set_rng_state(state["rng"])
    for _ in range(3):
        again.step(batch)
    assert (
        same(again.students, whole.students)
        and same(again.averaged, whole.averaged)
        and same(again.queue, whole.queue)
        and again.terms.last == whole.terms.last
    )
    assert all(same(again.encoders()[m], whole.encoders()[m]) for m in MODALITIES)


@pytest.mark.parametrize("kind", ["posterior", "feature"])
def test_the_average_against_a_slow_loop(teachers, kind):
    "The proxies that both feature students share are averaged at the rate of everything else."
    d, batch = distiller(teachers, kind=kind, average=0.6), with_targets(pairs(), teachers, MAP)
    kept = {
        k: v.double().clone() for k, v in d.students.state_dict().items() if v.is_floating_point()
    }
    for step in range(1, 5):
        d.step(batch)
        w = 1 - min(0.6, step / (step + 5))
        for k, v in d.students.state_dict().items():
            if k in kept:
                kept[k] += w * (v.double() - kept[k])
    for k, v in kept.items():
        torch.testing.assert_close(
            d.averaged.state_dict()[k].double(), v, rtol=1e-5, atol=1e-6, msg=k
        )


def test_average_zero_keeps_the_last_weights(teachers):
    d, batch = distiller(teachers, average=0.0), with_targets(pairs(), teachers, MAP)
    for _ in range(3):
        d.step(batch)
    assert same(d.averaged, d.students)


def test_a_term_that_is_no_number_is_named_and_moves_nothing(teachers):
    d, batch = distiller(teachers), with_targets(pairs(), teachers, MAP)
    d.step(batch)
    before = {k: v.clone() for k, v in d.students.state_dict().items()}
    batch.photo_target[0, 0] = float("nan")
    with pytest.raises(NonFiniteTerm, match="consistency"):
        d.step(batch)
    assert all(torch.equal(before[k], v) for k, v in d.students.state_dict().items())


def test_terms_have_names(teachers):
    with pytest.raises(KeyError, match="unknown student terms .*consistancy"):
        Distiller(*students(teachers), {"consistancy": 1.0})
    with pytest.raises(ValueError, match="make the batch with with_targets"):
        distiller(teachers).step(pairs())


LAYERS = ["blocks.0.bn1", "blocks.0.bn2"]


def layered(teachers, **options):
    return Distiller(
        *students(
            teachers,
            **{**dict(kind="layers", temperature=2.0, layers=LAYERS, mirror=True), **options},
        ),
        {},
        steps=0,
    )


@pytest.mark.parametrize("kind", ["posterior", "feature", "joint", "layers"])
def test_a_readout_computes_in_full_precision_under_autocast(teachers, kind):
    "Only the net may round: the embedding of its rounded answer is exact, of unit length."
    encoder = (
        layered(teachers) if kind == "layers" else distiller(teachers, kind=kind)
    ).encoders()[Modality.PHOTO]
    encoder.card["mirror"], x = False, torch.rand(5, 3, SIDE, SIDE)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        heard = encoder.net(encoder.normalizer(x))
        embedding, answer = encoder(x), encoder.predict_log_probs(x)
    with torch.no_grad():
        wanted = encoder.readout(heard.float())
        for e in (embedding, answer[0]):
            torch.testing.assert_close(e, wanted, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(
            answer[1], encoder.readout.log_posteriors(heard.float()), atol=1e-5, rtol=1e-5
        )
    with torch.autocast("cpu", torch.bfloat16):
        freeze = MAP.posteriors(torch.randn(4, len(PHOTO)), Modality.PHOTO)
    assert freeze.dtype is torch.float32 and torch.allclose(freeze.sum(1), torch.ones(4), atol=1e-6)


def test_a_net_that_goes_on_after_its_last_layer():
    "Its classes can be read; its features where the net without that layer gives them."
    proxies, slack = make_proxies(3, D)

    def teacher(name, size):
        source = name.partition("/")[0]
        net = build_net(source, name.partition("/")[2], 3)
        return Teacher(
            net,
            "abc",
            input_of(source, size, net),
            Modality.PHOTO,
            card=dict(source=source, name=name.partition("/")[2]),
        )

    squeeze, deit = (
        teacher("torchvision/squeezenet1_1", 64),
        teacher("timm/deit_tiny_distilled_patch16_224", 224),
    )
    same_map = align_classes("abc", "abc")
    for kind in ("joint", "feature"):
        with pytest.raises(
            ValueError,
            match=f"a {kind} read-out wants the net's features, and deit.* gives something else: take the posterior",
        ):
            make_encoder(deit, same_map, proxies, slack[Modality.PHOTO], kind)
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        for kind in ("joint", "feature"):
            assert make_encoder(squeeze, same_map, proxies, slack[Modality.PHOTO], kind).eval()(
                x
            ).shape == (1, D)
        for t in (squeeze, deit):
            said = (
                make_encoder(t, same_map, proxies, slack[Modality.PHOTO])
                .eval()
                .predict_log_probs(x)[1]
            )
            torch.testing.assert_close(
                said.exp(), same_map.posteriors(t(x).logits, Modality.PHOTO), atol=1e-4, rtol=1e-3
            )


# files


@pytest.fixture(scope="module")
def saved(teachers, tmp_path_factory):
    "Encoders of all read-outs on disk, taught a little, and what they said."
    torch.manual_seed(0)
    top, batch, said = tmp_path_factory.mktemp("encoders"), with_targets(pairs(), teachers, MAP), {}
    for kind in ("posterior", "feature", "joint", "layers"):
        if kind == "layers":
            d = layered(teachers)
            d.calibrate(batch)
        else:
            d = distiller(teachers, kind=kind)
            for _ in range(2):
                d.step(batch)
        encoders = d.encoders()
        save_encoders(top / kind, encoders, run="a run")
        with torch.no_grad():
            said[kind] = {str(m): encoders[m](batch.of(m)) for m in MODALITIES}
    save_state(top / "said.safetensors", {"photo": batch.photo, "sketch": batch.sketch, **said})
    return top


FRESH = """
import json, sys, torch
torch.set_num_threads(1)
from pathlib import Path
from dfsbir.core import load_state
from dfsbir.distillation import load_encoders
top, worst = Path(sys.argv[1]), {}
known = load_state(top / "said.safetensors")
for kind in ("posterior", "feature", "joint", "layers"):
    for m, e in load_encoders(top / kind).items():
        assert not e.training and not any(p.requires_grad for p in e.parameters())
        worst[f"{kind} {m}"] = (e(known[str(m)]) - known[kind][str(m)]).abs().max().item()
print(json.dumps([worst, sorted(k for k in sys.modules if k.startswith("dfsbir."))]))
"""


def test_encoders_are_the_same_in_a_fresh_process(saved):
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(saved)], capture_output=True, text=True, timeout=200
    )
    assert not done.returncode, done.stderr
    worst, loaded = json.loads(done.stdout.splitlines()[-1])
    assert len(worst) == 8 and not any(worst.values()), worst
    assert not {"dfsbir.inversion", "dfsbir.guidance", "dfsbir.crossx"} & set(loaded), (
        "no training code is needed"
    )


def test_a_damaged_encoder_is_named(saved, tmp_path):
    (tmp_path / "photo.safetensors").write_bytes(
        (saved / "posterior" / "photo.safetensors").read_bytes()[:-100]
    )
    with pytest.raises(UnsafeCheckpoint, match="not a whole safetensors file"):
        load_encoder(tmp_path / "photo.safetensors")
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        load_encoders(tmp_path / "nothing")


@pytest.mark.parametrize(
    "kind, modality",
    [("posterior", Modality.PHOTO), ("joint", Modality.SKETCH), ("layers", Modality.PHOTO)],
)
def test_onnx_says_the_same(saved, tmp_path, kind, modality):
    pytest.importorskip("onnxscript"), pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    encoder = load_encoders(saved / kind)[modality]
    assert export_onnx(encoder, tmp_path / "e.onnx") <= 1e-4
    session = runtime.InferenceSession(str(tmp_path / "e.onnx"), providers=["CPUExecutionProvider"])
    for n in (1, 5):  # any batch
        x = torch.rand(n, modality.channels, SIDE, SIDE)
        torch.testing.assert_close(
            torch.from_numpy(session.run(None, {"images": x.numpy()})[0]),
            encoder(x),
            atol=1e-4,
            rtol=0,
        )
    assert [p.name for p in tmp_path.iterdir()] == ["e.onnx"]


# the joint read-out

WIDTH = 5


def joint(temperature=2.0, members=MAP.assignment):
    "Read-outs of both modalities with weights of their own, and features for them."
    proxies, _ = make_proxies(K, D, seed=3)
    return proxies, [
        (
            JointHead(WIDTH, members(m), proxies, complement_basis(proxies), temperature),
            3 * torch.randn(n, WIDTH),
        )
        for m, n in zip(MODALITIES, (4, 6))
    ]


def test_joint_readout_is_class_plus_room_times_shape():
    proxies, ((a, f), (b, g)) = joint()
    z, y = a(f), b(g)
    torch.testing.assert_close(z.norm(dim=1), torch.ones(4))
    for i in range(4):
        for j in range(6):
            p, q = (
                a.log_posteriors(f[i : i + 1], 2.0).exp()[0],
                b.log_posteriors(g[j : j + 1], 2.0).exp()[0],
            )
            likeness = F.cosine_similarity(a.shape(f[i]), b.shape(g[j]), dim=0)
            torch.testing.assert_close(
                z[i] @ y[j],
                p @ q + ((1 - p @ p) * (1 - q @ q)).sqrt() * likeness,
                atol=1e-5,
                rtol=0,
            )


def test_the_temperature_of_a_joint_readout_goes_from_class_to_shape():
    _, ((a, f), (b, g)) = joint(members=lambda m: torch.eye(K))
    shape, predict_log_probs = (
        F.normalize(a.shape(f), dim=1) @ F.normalize(b.shape(g), dim=1).T,
        a.log_posteriors(f),
    )
    a.temperature = b.temperature = 1e6
    assert torch.equal((a(f) @ b(g).T).argsort(1), shape.argsort(1))
    a.temperature = b.temperature = 1e-6
    p, q = a.log_posteriors(f, 1e-6).exp(), b.log_posteriors(g, 1e-6).exp()
    torch.testing.assert_close(a(f) @ b(g).T, p @ q.T, atol=1e-3, rtol=0)
    assert torch.equal(a.log_posteriors(f), predict_log_probs), (
        "what it answers does not depend on the balance"
    )
    assert a(f).isfinite().all()


def test_the_shape_part_can_be_had_from_an_embedding():
    _, ((a, f), _) = joint()
    torch.testing.assert_close(a.shapes(a(f)), F.normalize(a.shape(f), dim=1))
    again = torch.randn(4, WIDTH)
    both = F.normalize(a.shape(f), dim=1) + F.normalize(a.shape(again), dim=1)
    torch.testing.assert_close(a.shapes(a(f, again)), F.normalize(both, dim=1))
    torch.testing.assert_close(a(f, again), a(again, f))
    torch.testing.assert_close(a(f, f), a(f))


def test_both_modalities_have_one_frame(teachers):
    photo, sketch = students(teachers, kind="joint")
    whole = torch.cat([photo.readout.proxies, photo.readout.frame])
    torch.testing.assert_close(whole @ whole.T, torch.eye(D), atol=1e-5, rtol=0)
    assert torch.equal(photo.readout.frame, sketch.readout.frame) and photo.readout.frame.shape == (
        D - K,
        D,
    )


def test_a_joint_student_starts_with_the_teachers_answers_and_logits(teachers):
    batch = pairs()
    for m, e in zip(MODALITIES, students(teachers, kind="joint", temperature=3.0)):
        logits = teachers[m](batch.of(m)).logits
        torch.testing.assert_close(
            e.eval().predict_log_probs(batch.of(m))[1].exp(),
            MAP.posteriors(logits, m),
            atol=1e-5,
            rtol=1e-4,
        )
        said = e.readout.shape(e.net(e.normalizer(batch.of(m))))[:, :K]
        torch.testing.assert_close(
            said, logits @ (MAP.assignment(m) / MAP.assignment(m).sum(0)), atol=1e-5, rtol=1e-4
        )


def test_a_space_without_room_for_shape_is_named(teachers):
    proxies, slack = make_proxies(K, 5)
    with pytest.raises(ValueError, match="dim=6 at least; found 5"):
        make_encoder(teachers[Modality.PHOTO], MAP, proxies, slack[Modality.PHOTO], "joint")


def test_shape_is_learned_from_objects_in_a_few_steps(teachers):
    objects = with_targets(procedural_objects(24, SIDE), teachers, MAP)
    d = Distiller(
        *students(teachers, kind="joint", warm=False),
        {"instance": 1.0},
        lr=3e-3,
        steps=60,
        head_lr=1e-2,
    )
    log = [d.step(objects)["instance"] for _ in range(60)]
    assert sum(log[-10:]) < 0.8 * sum(log[:10])


def test_instance_without_a_shape_is_named(teachers):
    for kind in ("posterior", "feature"):
        with pytest.raises(ValueError, match=f"{kind.title()}Readout has none.*joint"):
            Distiller(*students(teachers, kind=kind), {"instance": 1.0})


def test_interpolate_runs_from_the_start_to_the_end(teachers):
    ends, batch = [], with_targets(pairs(), teachers, MAP)
    for share in (0.0, 0.5, 1.0):
        d = distiller(teachers, kind="joint", interpolate=share)
        start = {
            m: {k: v.clone() for k, v in getattr(d.students, m).state_dict().items()}
            for m in MODALITIES
        }
        torch.manual_seed(2)
        for _ in range(3):
            d.step(batch)
        ends.append({m: e.state_dict() for m, e in d.encoders().items()})
    assert all(torch.equal(ends[0][m][k], v) for m in MODALITIES for k, v in start[m].items())
    assert all(
        torch.equal(v, getattr(d.averaged, m).state_dict()[k])
        for m in MODALITIES
        for k, v in ends[2][m].items()
    )
    moved = [
        k
        for k, v in ends[2][Modality.PHOTO].items()
        if not torch.equal(v, ends[0][Modality.PHOTO][k])
    ]
    assert len(moved) > 5
    for k in moved:
        torch.testing.assert_close(
            ends[1][Modality.PHOTO][k],
            (ends[0][Modality.PHOTO][k] + ends[2][Modality.PHOTO][k]) / 2,
        )


def test_the_readouts_rate_is_the_readouts_alone(teachers):
    d = distiller(teachers, kind="joint", average=0.0, interpolate=1.0)
    assert [(len(g["params"]), g["initial_lr"]) for g in d.optimizer.param_groups] == [
        (sum(1 for e in (d.students.photo, d.students.sketch) for _ in e.net.parameters()), 1e-3),
        (8, 1e-2),
    ]
    before = {k: v.clone() for k, v in d.students.photo.named_parameters()}
    d.step(with_targets(pairs(), teachers, MAP))
    step = {k: (v - before[k]).abs().max().item() for k, v in d.students.photo.named_parameters()}
    assert step["readout.shape.weight"] == pytest.approx(1e-2, rel=0.01) and max(
        v for k, v in step.items() if k.startswith("net")
    ) == pytest.approx(1e-3, rel=0.01)


# the read-out of layers


@pytest.mark.parametrize(
    "memory, dim", [(0.0, D), (0.3, D), (0.3, 32 + K)]
)  # two layers of 16: with 32 axes of shape all of them fit
def test_layers_against_a_slow_loop(teachers, memory, dim):
    """Shape is each inner channel's mean, against the deviation of the objects and a centre between their mean and the batch norm's bias, each layer of unit length,
    on axes that both modalities share."""
    teachers = copy.deepcopy(teachers)
    for t in teachers.values():
        for k in LAYERS:
            nn.init.normal_(t.net.get_submodule(k).bias)
    d, objects, images = (
        layered(teachers, mirror=False, size=24, dim=dim),
        procedural_objects(30, SIDE),
        pairs(),
    )
    d.calibrate(objects, memory)
    encoders = d.encoders()
    axes = encoders[Modality.PHOTO].readout.shape.axes
    if dim == D:
        assert torch.equal(axes, encoders[Modality.SKETCH].readout.shape.axes)
    else:
        assert axes is None and encoders[Modality.SKETCH].readout.shape.axes is None
    for m, e in encoders.items():
        assert e.normalizer.size == 24 and teachers[m].normalizer.size == SIDE

        def inner(x):
            with (
                torch.no_grad(),
                capture({k: teachers[m].net.get_submodule(k) for k in LAYERS}) as heard,
            ):
                logits = teachers[m].net(e.normalizer(x))
            return logits, [heard[k].mean((2, 3)) for k in LAYERS]

        _, known = inner(objects.of(m))
        logits, found = inner(images.of(m))
        floor = 0.01 * torch.cat([k.std(0, correction=0) for k in known]).mean()
        centre = [
            (1 - memory) * v.mean(0) + memory * teachers[m].net.get_submodule(k).bias.detach()
            for k, v in zip(LAYERS, known)
        ]
        z = [(v - c) / (k.std(0, correction=0) + floor) for c, k, v in zip(centre, known, found)]
        shape = F.normalize(
            torch.cat([F.normalize(v.clamp(-8, 8), dim=1) for v in z], 1)
            @ (torch.eye(32) if axes is None else axes),
            dim=1,
        )
        p = MAP.posteriors(logits, m, 2.0)
        wanted = p @ e.readout.proxies + (1 - p.square().sum(1, keepdim=True)).sqrt() * (
            shape @ e.readout.frame
        )
        torch.testing.assert_close(e(images.of(m)), wanted, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            e.predict_log_probs(images.of(m))[1].exp(), MAP.posteriors(logits, m)
        )


def test_what_a_batch_norm_says_on_average_is_its_bias(teachers):
    "memory() is the mean of the layer's answers over the images whose statistics it keeps, at their size."
    net = copy.deepcopy(teachers[Modality.SKETCH].net)
    layer, x = net.get_submodule(LAYERS[0]), torch.rand(16, 3, SIDE, SIDE)
    nn.init.normal_(layer.bias)
    with torch.no_grad(), capture({LAYERS[0]: layer}) as heard:
        net.train()(x)
    torch.testing.assert_close(
        IntermediateFeatures(net, LAYERS[:1]).memory(),
        heard[LAYERS[0]].mean((0, 2, 3)),
        atol=1e-4,
        rtol=1e-4,
    )
    with pytest.raises(ValueError, match="only a plain batch norm.*Conv2d.*layers_memory"):
        layered(teachers, layers=["blocks.0.one", "blocks.0.bn2"]).calibrate(pairs(), memory=0.5)


def test_threads_that_share_a_layers_encoder_hear_their_own_images(teachers):
    d = layered(teachers)
    d.calibrate(pairs())
    encoder, images = d.encoders()[Modality.PHOTO], torch.rand(16, 3, SIDE, SIDE)
    with torch.no_grad():
        alone = [encoder(x[None]) for x in images]

    def embed(i):
        with torch.no_grad():  # of the thread
            return encoder(images[i][None])

    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(embed, list(range(16)) * 10))
    for i, e in enumerate(together):
        torch.testing.assert_close(e, alone[i % 16])


def test_layers_that_cannot_be_heard_or_compared(teachers):
    with pytest.raises(ValueError, match="no layers .'block.0.bn1'.*near.*blocks.0.bn1"):
        layered(teachers, layers=["block.0.bn1"])
    with pytest.raises(ValueError, match="the name of one at least"):
        layered(teachers, layers=[])
    with pytest.raises(ValueError, match="'fc' gives no map"):
        layered(teachers, layers=["blocks.0", "fc"])
    with pytest.raises(ValueError, match="wants warm=True"):
        layered(teachers, warm=False)
    other = Teacher(
        build_net("dfsbir", "small", len(SKETCH)),
        SKETCH,
        input_of("dfsbir", SIDE),
        Modality.SKETCH,
        card=dict(source="dfsbir", name="small"),
    )
    with pytest.raises(ValueError, match="channel by channel.*one architecture"):
        layered(
            {Modality.PHOTO: teachers[Modality.PHOTO], Modality.SKETCH: other},
            layers=["blocks.0.bn1"],
        )
    proxies, slack = make_proxies(K, 64)
    with pytest.raises(ValueError, match="values of inner layers fill no 61 axes"):
        make_encoder(
            teachers[Modality.PHOTO],
            MAP,
            proxies,
            slack[Modality.PHOTO],
            "layers",
            layers=["blocks.0.bn1"],
        )
    assert not any(m._forward_hooks for t in teachers.values() for m in t.net.modules()), (
        "nothing stays behind"
    )
