"""What the inversion notebook should not hold: oracles, contracts at every size, exactness of resume and of the bank, faults."""

import math
import re
from xml.etree import ElementTree

import pytest
import torch
import torch.nn.functional as F

from dfsbir.core.checkpoint import load_state, save_state
from dfsbir.core.device import make_fabric
from dfsbir.core.types import PairBatch
from dfsbir.inversion.buffer import ReplayBuffer
from dfsbir.inversion.estimator import EstimatorCollapsed, PairEstimator, measure_diversity
from dfsbir.inversion.generators import PixelGenerator, StrokeGenerator
from dfsbir.inversion.strokes import PolylineDistance, Strokes, draw_strokes, flatten_beziers
from dfsbir.losses.inversion import diversity_loss
from dfsbir.losses.weighted_sum import NonFiniteTerm, WeightedLoss


@pytest.fixture(autouse=True)
def one_thread_one_seed():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def random_strokes(n=2, s=3, dtype=torch.double, grad=False):
    return Strokes(
        *(
            t.requires_grad_(grad)
            for t in (
                torch.rand(n, s, 4, 2, dtype=dtype) * 1.4 - 0.2,
                torch.rand(n, s, dtype=dtype),
                torch.rand(n, s, dtype=dtype) * 0.05 + 0.01,
            )
        )
    )


def slow_draw(strokes, size, softness, segments):
    "One pixel, one stroke, one segment at a time, in plain Python."
    sheets = []
    for points, seen, width in zip(
        strokes.points.tolist(), strokes.visibility.tolist(), strokes.width.tolist()
    ):
        sheet = [[1.0] * size for _ in range(size)]
        for p, v, w in zip(points, seen, width):
            curve = []
            for k in range(segments + 1):
                t = k / segments
                b = ((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t**3)
                curve.append([sum(b[i] * p[i][j] for i in range(4)) for j in (0, 1)])
            for row in range(size):
                for col in range(size):
                    x, y, best = (col + 0.5) / size, (row + 0.5) / size, math.inf
                    for (ax, ay), (bx, by) in zip(curve, curve[1:]):
                        dx, dy = bx - ax, by - ay
                        length = dx * dx + dy * dy
                        t = (
                            min(1.0, max(0.0, ((x - ax) * dx + (y - ay) * dy) / length))
                            if length
                            else 0.0
                        )
                        best = min(best, math.hypot(x - ax - t * dx, y - ay - t * dy))
                    sigmoid = lambda z: 1 / (1 + math.exp(-z))
                    sheet[row][col] *= 1 - v * sigmoid((w / 2 - best) / softness) / sigmoid(
                        w / 2 / softness
                    )
        sheets.append([sheet])
    return torch.tensor(sheets, dtype=torch.double)


@pytest.mark.parametrize("size,softness,segments", [(9, 0.04, 8), (16, 0.01, 3), (12, 0.02, 1)])
def test_drawing_equals_the_slow_loop(size, softness, segments):
    strokes = random_strokes()
    assert torch.allclose(
        draw_strokes(strokes, size, softness, segments),
        slow_draw(strokes, size, softness, segments),
        atol=1e-10,
    )


def autograd_draw(points, seen, width, size, softness, segments=8):
    lines = flatten_beziers(points, segments)[:, :, None, None]
    u = (
        torch.stack(torch.meshgrid(torch.arange(size), torch.arange(size), indexing="xy"), -1)[
            :, :, None
        ].to(points.dtype)
        + 0.5
    ) / size
    a, d = lines[..., :-1, :], lines.diff(dim=-2)
    t = (((u - a) * d).sum(-1, keepdim=True) / d.square().sum(-1, keepdim=True)).clamp(0, 1)
    distance, half = (u - a - t * d).norm(dim=-1).amin(-1), width[..., None, None] / 2
    return (
        1
        - seen[..., None, None]
        * torch.sigmoid((half - distance) / softness)
        / torch.sigmoid(half / softness)
    ).prod(1)[:, None]


@pytest.mark.parametrize("dtype,tolerance", [(torch.double, 1e-9), (torch.float, 2e-3)])
def test_gradients_equal_autograd_of_the_plain_formula(dtype, tolerance):
    strokes, weight = (
        random_strokes(3, 4, dtype, grad=True),
        torch.randn(3, 1, 20, 20, dtype=torch.double),
    )
    leaves = (strokes.points, strokes.visibility, strokes.width)
    plain = [t.detach().double().requires_grad_() for t in leaves]
    ours = torch.autograd.grad((strokes.draw(20, 0.02).double() * weight).sum(), leaves)
    theirs = torch.autograd.grad((autograd_draw(*plain, 20, 0.02) * weight).sum(), plain)
    for a, b in zip(ours, theirs):
        assert (a - b).abs().max() <= tolerance * b.abs().max()


def test_gradient_by_finite_differences():
    lines = torch.rand(2, 5, 2, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda l: PolylineDistance.apply(l, 7), (lines,), eps=1e-7, atol=1e-5
    )


def test_blocks_do_not_change_the_drawing():
    strokes = random_strokes(7, 3)
    for a, b in ((1, 2**18), (3 * 16 * 16 * 2, 2**18)):
        assert torch.equal(draw_strokes(strokes, 16, block=a), draw_strokes(strokes, 16, block=b))


def test_dots_far_points_and_empty_sheets_are_safe():
    dot, far = torch.full((1, 1, 4, 2), 0.5), torch.full((1, 1, 4, 2), 50.0)
    for points in (
        dot,
        far,
        torch.zeros(1, 1, 4, 2),
        dot.clone().fill_(0.5 / 15),
    ):  # the last sits on a pixel centre of a side of 15
        points = points.requires_grad_()
        sheet = Strokes(points, torch.ones(1, 1)).draw(15)
        sheet.sum().backward()
        assert (
            sheet.isfinite().all()
            and points.grad.isfinite().all()
            and sheet.min() >= 0
            and sheet.max() <= 1
        )
    assert Strokes(dot, torch.ones(1, 1)).draw(15)[0, 0, 7, 7] < 0.01
    assert Strokes(far, torch.ones(1, 1)).draw(15).min() == 1
    assert Strokes(dot, torch.zeros(1, 1)).draw(15).min() == 1
    assert Strokes(torch.zeros(0, 2, 4, 2), torch.zeros(0, 2)).draw(15).shape == (0, 1, 15, 15)


def test_a_drawing_has_the_same_lines_at_every_size():
    strokes = random_strokes(2, 3, torch.float)
    big, small = strokes.draw(128, 0.05), strokes.draw(64, 0.05)
    assert (F.avg_pool2d(big, 2) - small).abs().max() < 0.03


def test_autocast_does_not_coarsen_the_pen():
    strokes = random_strokes(2, 3, torch.float)
    sheet = strokes.draw(24)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(strokes.draw(24), sheet)


def test_strokes_refuse_wrong_shapes():
    with pytest.raises(ValueError, match="wanted points"):
        Strokes(torch.rand(2, 3, 4), torch.rand(2, 3))
    with pytest.raises(ValueError, match="wanted points"):
        Strokes(torch.rand(2, 3, 4, 2), torch.rand(2, 4))
    with pytest.raises(ValueError, match="softness above 0"):
        random_strokes().draw(8, 0.0)


def test_svg_reads_back():
    strokes = random_strokes(2, 5)
    strokes.visibility[1] = torch.tensor([1.0, 0.01, 0.5, 0.04, 0.2])
    text = strokes.svg(1)
    root = ElementTree.fromstring(text)
    assert root.get("viewBox") == "0 0 1 1"
    paths = [e for e in root.iter() if e.tag.endswith("path")]
    numbers = torch.tensor(
        [[float(v) for v in re.findall(r"-?\d+\.\d+", e.get("d"))] for e in paths],
        dtype=torch.double,
    ).view(-1, 4, 2)
    seen, width = (
        torch.tensor([float(e.get(k)) for e in paths], dtype=torch.double)
        for k in ("stroke-opacity", "stroke-width")
    )
    keep = [0, 2, 4]
    assert len(paths) == 3
    for back, there in (
        (numbers, strokes.points[1, keep]),
        (seen, strokes.visibility[1, keep]),
        (width, strokes.width[1, keep]),
    ):
        assert torch.allclose(back, there, atol=5.1e-5)
    again = Strokes(numbers[None], seen[None], width[None])
    assert (
        again.draw(32)
        - Strokes(
            strokes.points[1:, keep], strokes.visibility[1:, keep], strokes.width[1:, keep]
        ).draw(32)
    ).abs().max() < 0.03


KINDS = {
    "pixel": lambda classes, size, **k: PixelGenerator(classes, 3, size, width=8, **k),
    "pixel sketch": lambda classes, size, **k: PixelGenerator(classes, 1, size, width=8, **k),
    "stroke": lambda classes, size, **k: StrokeGenerator(classes, size, strokes=4, pages=3, **k),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [28, 45, 64, 224])
def test_generators_keep_their_contract(kind, size):
    for classes in (3, 0):
        g = KINDS[kind](classes, size)
        noise, label = torch.randn(4, 64), torch.tensor([0, 2, 1, 2]) if classes else None
        x = g(noise, label)
        assert (
            x.shape == (4, g.channels, size, size)
            and x.dtype == torch.float32
            and x.min() >= 0
            and x.max() <= 1
        )
        x.square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in g.parameters()) and any(
            p.grad.abs().sum() > 0 for p in g.parameters()
        )
        g.eval()
        assert torch.equal(g(noise, label), g(noise, label))
        assert torch.allclose(
            g(noise, label)[1:2], g(noise[1:2], None if label is None else label[1:2]), atol=1e-5
        )  # one image does not depend on the others
        assert (
            g(noise, label)[1] - g(noise, label)[3]
        ).abs().mean() > 1e-4  # same class, other noise
        in_groups = [id(p) for group in g.groups() for p in group["params"]]
        assert sorted(in_groups) == sorted(id(p) for p in g.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_generators_name_wrong_inputs(kind):
    g = KINDS[kind](3, 28)
    with pytest.raises(ValueError, match="pass a label"):
        g(torch.randn(4, 64))
    with pytest.raises(ValueError, match="wanted noise"):
        g(torch.randn(4, 63), torch.zeros(4).long())
    with pytest.raises(ValueError, match="wanted 4 labels"):
        g(torch.randn(4, 64), torch.zeros(3).long())
    with pytest.raises(ValueError, match="wanted classes"):
        KINDS[kind](3, 8)


def test_the_pen_hardens_and_remembers():
    g = StrokeGenerator(2, 28, strokes=3, pages=2)
    soft = []
    for p in (0.0, 0.4, 0.8, 1.0):
        g.anneal(p)
        soft.append(g.softness.item())
    assert soft == pytest.approx([0.04, 0.02, 0.01, 0.01])
    h = StrokeGenerator(2, 28, strokes=3, pages=2)
    h.load_state_dict(g.state_dict())
    noise, label = torch.randn(3, 64), torch.tensor([0, 1, 1])
    assert torch.equal(g(noise, label), h(noise, label))


def test_pages_that_are_seldom_opened_move_slower():
    g = StrokeGenerator(8, 28, strokes=3, pages=16)  # 128 pages
    rates = {b: g.groups(1e-3, b)[0]["lr"] for b in (16, 64, 256)}
    assert rates == pytest.approx({16: 0.01, 64: 0.02, 256: 0.02})


def test_strokes_of_a_generator_are_its_drawing():
    g = StrokeGenerator(2, 32, strokes=3, pages=2).eval()
    noise, label = torch.randn(3, 64), torch.tensor([0, 1, 1])
    assert torch.equal(g.strokes(noise, label).draw(32, g.softness.item()), g(noise, label))


def test_diversity_against_loops():
    x, y = torch.rand(9, 2, 5, 5), torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 0])
    pairs = [
        (x[i] - x[j]).square().mean().sqrt() for i in range(9) for j in range(i) if y[i] == y[j]
    ]
    assert measure_diversity(x, y) == pytest.approx(torch.stack(pairs).mean().item(), rel=1e-5)
    assert measure_diversity(torch.ones(4, 1, 3, 3), torch.zeros(4)) == 0
    with pytest.raises(ValueError, match="no class occurs twice"):
        measure_diversity(x[:2], torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="one label per image"):
        measure_diversity(x, y[:3])


def pairs(labels, size=6):
    return PairBatch(
        torch.rand(len(labels), 3, size, size),
        torch.rand(len(labels), 1, size, size),
        torch.tensor(labels),
    )


def test_bank_gives_back_what_it_took():
    bank, batch = ReplayBuffer(10), pairs([0, 1, 2, 0, 1])
    bank.add(batch)
    got = bank.sample(64)
    assert len(bank) == 5 and got.photo.dtype == torch.float32
    for p, s, y in zip(got.photo, got.sketch, got.label):
        i = (batch.photo - p).flatten(1).abs().amax(1).argmin()
        assert (
            (batch.photo[i] - p).abs().max() <= 0.5 / 255 + 1e-6
            and (batch.sketch[i] - s).abs().max() <= 0.5 / 255 + 1e-6
            and batch.label[i] == y
        )


def test_bank_keeps_classes_balanced_and_drops_the_oldest():
    bank = ReplayBuffer(12)
    first = pairs([0] * 12)
    bank.add(first)
    for _ in range(3):
        bank.add(pairs([1, 2]))
    assert torch.bincount(bank.pairs.label).tolist() == [6, 3, 3]
    kept = bank.pairs.photo[bank.pairs.label == 0]
    assert torch.equal(kept.sort(0).values, (first.photo[6:] * 255).round().byte().sort(0).values)
    bank.add(pairs([1] * 40))
    assert (
        len(bank) == 12
        and torch.bincount(bank.pairs.label).tolist() == [4, 5, 3]
        or max(torch.bincount(bank.pairs.label)) - min(torch.bincount(bank.pairs.label)) <= 2
    )


def test_bank_sampling_is_uniform_and_resumes(tmp_path):
    a = ReplayBuffer(8, seed=5)
    a.add(pairs(list(range(8))))
    a.sample(3)
    save_state(tmp_path / "bank.safetensors", a.state_dict())
    b = ReplayBuffer(8)
    b.load_state_dict(load_state(tmp_path / "bank.safetensors"))
    for _ in range(3):
        x, y = a.sample(5), b.sample(5)
        assert (
            torch.equal(x.photo, y.photo)
            and torch.equal(x.sketch, y.sketch)
            and torch.equal(x.label, y.label)
        )
        more = pairs([1, 3, 3])
        a.add(more)
        b.add(more)
    count = torch.bincount(ReplayBuffer.sample(a, 4000).label, minlength=8).float()
    share = torch.bincount(a.pairs.label, minlength=8) / len(a)
    assert (count / 4000 - share).abs().max() < 0.04


def test_bank_faults():
    with pytest.raises(ValueError, match="at least one pair"):
        ReplayBuffer(0)
    bank = ReplayBuffer(4)
    with pytest.raises(ValueError, match="empty"):
        bank.sample(2)
    bank.add(pairs([0]))
    with pytest.raises(ValueError, match="this bank holds"):
        bank.add(pairs([0], size=7))


def fit_to_class(batch, noise):
    "An objective with a known answer: brightness and ink follow the class."
    want = batch.label.float() / 2
    return {
        "photo": lambda: F.mse_loss(batch.photo.mean((1, 2, 3)), want),
        "sketch": lambda: F.mse_loss(batch.sketch.mean((1, 2, 3)), 1 - want / 5),
        "apart": lambda: diversity_loss(noise, batch.photo, batch.label),
    }


WEIGHTS = {"photo": 1.0, "sketch": 1.0, "apart": 0.01}


def estimator(objective=fit_to_class, weights=WEIGHTS, classes=3, **k):
    torch.manual_seed(1)
    options = dict(batch=12, warmup=30, patience=3) | k
    return PairEstimator(
        PixelGenerator(classes, 3, 16, width=8),
        StrokeGenerator(classes, 16, strokes=3, pages=2),
        objective,
        WeightedLoss(weights),
        make_fabric("cpu"),
        **options,
    )


def test_estimator_learns_the_objective_and_reports():
    e, seen = estimator(), []
    shown = e.synthesize(40, show=5, progress=lambda step, log: seen.append((step, log)))
    assert (
        len(shown) == 5
        and [s for s, _ in seen] == list(range(1, 41))
        and set(seen[0][1]) == {"photo", "sketch", "apart", "total"}
    )
    assert seen[-1][1]["photo"] < seen[0][1]["photo"] / 2
    batch = e.sample(7)
    assert (
        len(batch) == 7
        and not batch.photo.requires_grad
        and not batch.sketch.requires_grad
        and set(batch.label.tolist()) == {0, 1, 2}
    )
    assert set(e.diversity) == {"photo", "sketch"}


def test_resume_is_bit_for_bit(tmp_path):
    a = estimator()
    a.synthesize(7)
    save_state(tmp_path / "e.safetensors", a.state_dict())
    b = estimator(seed=99)
    b.synthesize(2)
    b.load_state_dict(load_state(tmp_path / "e.safetensors"))
    x, y = a.synthesize(6), b.synthesize(6)
    assert (
        torch.equal(x.photo, y.photo)
        and torch.equal(x.sketch, y.sketch)
        and torch.equal(x.label, y.label)
    )
    assert a.terms.last == b.terms.last and a.diversity == b.diversity

    def same(p, q):
        if isinstance(p, dict):
            assert p.keys() == q.keys()
            [same(p[k], q[k]) for k in p]
        elif isinstance(p, (list, tuple)):
            assert len(p) == len(q)
            [same(*z) for z in zip(p, q)]
        elif isinstance(p, torch.Tensor):
            assert torch.equal(p, q)
        else:
            assert p == q

    same(a.state_dict(), b.state_dict())


def test_half_precision_steps(tmp_path):
    torch.manual_seed(1)
    e = PairEstimator(
        PixelGenerator(3, 3, 16, width=8),
        StrokeGenerator(3, 16, strokes=3, pages=2),
        fit_to_class,
        WeightedLoss(WEIGHTS),
        make_fabric("cpu", "bf16-mixed"),
        batch=12,
        warmup=30,
        patience=3,
    )
    e.synthesize(4)
    assert e.sample(3).photo.dtype == torch.float32 and all(
        p.isfinite().all() for g in e.generators.values() for p in g.parameters()
    )


def test_seed_decides():
    assert torch.equal(estimator().sample(4).photo, estimator().sample(4).photo)
    assert not torch.equal(estimator().sample(4).photo, estimator(seed=1).sample(4).photo)


def test_collapse_is_named():
    white = lambda batch, noise: {
        "ink": lambda: F.relu(0.999 - batch.sketch).sum(),
        "photo": lambda: batch.photo.mean() * 0,
    }
    e = estimator(white, {"ink": 1.0, "photo": 1.0}, warmup=10**6)
    for p in e.generators["sketch"].parameters():
        p.data.fill_(-8.0) if p.ndim == 3 else None  # all strokes invisible
    with pytest.raises(EstimatorCollapsed, match="sketch estimates of one class differ by 0.00"):
        e.synthesize(30)


def test_a_healthy_start_does_not_alarm():
    e = estimator(floor=0.01, patience=1)
    e.synthesize(4)
    assert all(d > 0.01 for d in e.diversity.values())


def test_nan_is_named():
    with pytest.raises(NonFiniteTerm, match="bad"):
        estimator(
            lambda b, z: {"bad": lambda: b.photo.mean() * float("nan")}, {"bad": 1.0}
        ).synthesize(1)


def test_unconditioned_estimator_asks_for_names():
    with pytest.raises(ValueError, match="classify="):
        estimator(classes=0)
    bright = lambda batch: (batch.photo.mean((1, 2, 3)) > 0.5).long()
    e = estimator(
        lambda b, z: {"p": lambda: -b.photo.var(0).mean(), "s": lambda: b.sketch.mean()},
        {"p": 1.0, "s": 1.0},
        classes=0,
        classify=bright,
    )
    e.synthesize(3)
    batch = e.sample(9)
    assert torch.equal(batch.label, bright(batch))


def test_generators_must_fit_together():
    fabric, terms = make_fabric("cpu"), WeightedLoss({"a": 1.0})
    with pytest.raises(ValueError, match="shares noise and class"):
        PairEstimator(PixelGenerator(3, 3, 16), StrokeGenerator(2, 16), None, terms, fabric)
    with pytest.raises(ValueError, match="3 channels"):
        PairEstimator(PixelGenerator(3, 1, 16), StrokeGenerator(3, 16), None, terms, fabric)
