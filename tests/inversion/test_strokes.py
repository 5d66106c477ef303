"The rasteriser against a slow loop, autograd and finite differences; extreme strokes; SVG."

import math
import re
from xml.etree import ElementTree

import pytest
import torch
import torch.nn.functional as F
from inversion.counting import Counter
from inversion.loop_rasteriser import loop_draw

from dfsbir.inversion.strokes import (
    PolylineDistance,
    Strokes,
    draw_strokes,
    flatten_beziers,
    spread_strokes,
)


def random_strokes(n=2, s=3, dtype=torch.double, grad=False):
    "Strokes that reach a little beyond the canvas."
    points = torch.rand(n, s, 4, 2, dtype=dtype) * 1.4 - 0.2
    opacity = torch.rand(n, s, dtype=dtype)
    width = torch.rand(n, s, dtype=dtype) * 0.05 + 0.01
    return Strokes(*(t.requires_grad_(grad) for t in (points, opacity, width)))


def slow_curve(points, segments):
    "Corners of one curve's polyline, by the Bernstein polynomials."
    corners = []
    for k in range(segments + 1):
        t = k / segments
        weights = ((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t**3)
        corners.append([sum(w * p[j] for w, p in zip(weights, points)) for j in (0, 1)])
    return corners


def slow_distance(x, y, corners):
    "Distance of a point to a polyline."
    best = math.inf
    for (ax, ay), (bx, by) in zip(corners, corners[1:]):
        dx, dy = bx - ax, by - ay
        length = dx * dx + dy * dy
        t = ((x - ax) * dx + (y - ay) * dy) / length if length else 0.0
        t = min(1.0, max(0.0, t))
        best = min(best, math.hypot(x - ax - t * dx, y - ay - t * dy))
    return best


def sigmoid(z):
    return 1 / (1 + math.exp(-z))


def slow_draw(strokes, size, softness, segments):
    "One pixel, one stroke, one segment at a time, in plain Python."
    images = []
    parts = (t.tolist() for t in (strokes.points, strokes.opacity, strokes.width))
    for points, opacity, width in zip(*parts):
        image = [[1.0] * size for _ in range(size)]
        for p, v, w in zip(points, opacity, width):
            corners = slow_curve(p, segments)
            full = v / sigmoid(w / 2 / softness)
            for row in range(size):
                for col in range(size):
                    d = slow_distance((col + 0.5) / size, (row + 0.5) / size, corners)
                    image[row][col] *= 1 - full * sigmoid((w / 2 - d) / softness)
        images.append([image])
    return torch.tensor(images, dtype=torch.double)


@pytest.mark.parametrize("size,softness,segments", [(9, 0.04, 8), (16, 0.01, 3), (12, 0.02, 1)])
def test_drawing_equals_the_slow_loop(size, softness, segments):
    strokes = random_strokes()
    ours = draw_strokes(strokes, size, softness, segments)
    assert torch.allclose(ours, slow_draw(strokes, size, softness, segments), atol=1e-10)


def autograd_draw(points, opacity, width, size, softness, segments=8):
    "The formula, with all its derivatives left to autograd."
    pixels = torch.arange(size)
    grid = torch.stack(torch.meshgrid(pixels, pixels, indexing="xy"), -1)
    u = (grid[:, :, None].to(points.dtype) + 0.5) / size
    lines = flatten_beziers(points, segments)[:, :, None, None]
    a, d = lines[..., :-1, :], lines.diff(dim=-2)
    t = (((u - a) * d).sum(-1, keepdim=True) / d.square().sum(-1, keepdim=True)).clamp(0, 1)
    distance, half = (u - a - t * d).norm(dim=-1).amin(-1), width[..., None, None] / 2
    edge = torch.sigmoid((half - distance) / softness) / torch.sigmoid(half / softness)
    return (1 - opacity[..., None, None] * edge).prod(1)[:, None]


@pytest.mark.parametrize("dtype,tolerance", [(torch.double, 1e-9), (torch.float, 2e-3)])
def test_gradients_equal_autograd_of_the_plain_formula(dtype, tolerance):
    strokes = random_strokes(3, 4, dtype, grad=True)
    weight = torch.randn(3, 1, 20, 20, dtype=torch.double)
    leaves = (strokes.points, strokes.opacity, strokes.width)
    plain = [t.detach().double().requires_grad_() for t in leaves]
    ours = torch.autograd.grad((strokes.draw(20, 0.02).double() * weight).sum(), leaves)
    theirs = torch.autograd.grad((autograd_draw(*plain, 20, 0.02) * weight).sum(), plain)
    for a, b in zip(ours, theirs):
        assert (a - b).abs().max() <= tolerance * b.abs().max()


def test_gradient_by_finite_differences():
    lines = torch.rand(2, 5, 2, dtype=torch.double, requires_grad=True)

    def distance(corners):
        return PolylineDistance.apply(corners, 7)

    assert torch.autograd.gradcheck(distance, (lines,), eps=1e-7, atol=1e-5)


def drawing_and_gradients(draw, strokes, size, softness, dtype=torch.double):
    "A drawing, and the gradient of a fixed weighted sum of its pixels for every part of it."
    parts = (strokes.points, strokes.opacity, strokes.width)
    leaves = [t.detach().to(dtype, copy=True).requires_grad_() for t in parts]
    image = draw(Strokes(*leaves), size, softness)
    weight = torch.rand(image.shape, generator=torch.Generator().manual_seed(1))
    return image.detach(), torch.autograd.grad((image * weight.to(image)).sum(), leaves)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("size,softness", [(64, 0.04), (64, 0.01), (45, 0.02)])
def test_large_operations_equal_the_loop_over_segments(seed, size, softness):
    """The loop computes in double precision: in single precision a stroke through a pixel's centre
    makes its own gradient uncertain by up to 1e-4, and both are that far from each other."""
    torch.manual_seed(seed)
    strokes = Strokes(spread_strokes(6, 12), torch.rand(6, 12), torch.rand(6, 12) * 0.05 + 0.01)
    expected, expected_gradients = drawing_and_gradients(loop_draw, strokes, size, softness)
    for dtype, tolerance in ((torch.double, 1e-10), (torch.float, 1e-5)):
        image, gradients = drawing_and_gradients(draw_strokes, strokes, size, softness, dtype)
        assert (image - expected).abs().max() < tolerance
        for ours, theirs in zip(gradients, expected_gradients):
            assert (ours - theirs).norm() < tolerance * theirs.norm()


def test_black_strokes_through_pixel_centres_have_the_gradient_of_the_loop():
    "There factors of the product are 0, or minus a rounding error, seen in the loop."
    points = torch.rand(1, 2, 4, 2, dtype=torch.double)
    points[0, 0, :, 1] = 0.5  # the middle row of 15
    strokes = Strokes(points, torch.ones(1, 2, dtype=torch.double), 0.05)
    image, gradients = drawing_and_gradients(draw_strokes, strokes, 15, 0.02)
    expected, expected_gradients = drawing_and_gradients(loop_draw, strokes, 15, 0.02)
    assert expected.min().abs() < 1e-12
    assert torch.allclose(image, expected, atol=1e-12)
    for ours, theirs in zip(gradients, expected_gradients):
        assert torch.allclose(ours, theirs, atol=1e-3)


def test_a_drawing_does_not_depend_on_the_others():
    "Strokes are worked on in parts; where a part ends changes nothing."
    strokes = Strokes(spread_strokes(40, 3), torch.rand(40, 3))
    images = strokes.draw(64)
    for i in (0, 17, 39):
        assert torch.equal(strokes[i : i + 1].draw(64), images[i : i + 1])


def test_softness_may_be_a_tensor():
    strokes = random_strokes()
    softness = torch.tensor(0.02, dtype=torch.double)
    assert torch.equal(strokes.draw(16, softness), strokes.draw(16, 0.02))


@pytest.mark.parametrize("n,size", [(1, 32), (40, 64), (300, 32), (3, 224)])
def test_few_operations_at_any_batch_size(n, size):
    "Work is done in 32 parts at most. The loop over segments: 21,000 for 256 drawings at 64 px."
    points = spread_strokes(n, 12).requires_grad_()
    with Counter() as counter:
        Strokes(points, torch.ones(n, 12)).draw(size, 0.02).sum().backward()
    assert counter.count < 1500


@pytest.mark.parametrize("value", [0.5, 50.0, 0.0, 0.5 / 15])
def test_dots_have_finite_gradients(value):
    "Curves of one point: in the middle, far away, in the corner, and on a pixel centre."
    points = torch.full((1, 1, 4, 2), value, requires_grad=True)
    image = Strokes(points, torch.ones(1, 1)).draw(15)
    image.sum().backward()
    assert image.isfinite().all() and points.grad.isfinite().all()
    assert image.min() >= 0 and image.max() <= 1


def test_dots_far_points_and_empty_batches():
    dot, far = torch.full((1, 1, 4, 2), 0.5), torch.full((1, 1, 4, 2), 50.0)
    assert Strokes(dot, torch.ones(1, 1)).draw(15)[0, 0, 7, 7] < 0.01
    assert Strokes(far, torch.ones(1, 1)).draw(15).min() == 1
    assert Strokes(dot, torch.zeros(1, 1)).draw(15).min() == 1
    assert Strokes(torch.zeros(0, 2, 4, 2), torch.zeros(0, 2)).draw(15).shape == (0, 1, 15, 15)


def test_a_drawing_has_the_same_lines_at_every_size():
    strokes = random_strokes(2, 3, torch.float)
    big, small = strokes.draw(128, 0.05), strokes.draw(64, 0.05)
    assert (F.avg_pool2d(big, 2) - small).abs().max() < 0.03


def test_autocast_does_not_round_the_points():
    strokes = random_strokes(2, 3, torch.float)
    image = strokes.draw(24)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(strokes.draw(24), image)


def test_strokes_refuse_wrong_shapes():
    with pytest.raises(ValueError, match=re.escape("(2, 3, 4)")):
        Strokes(torch.rand(2, 3, 4), torch.rand(2, 3))
    with pytest.raises(ValueError, match=re.escape("(2, 4)")):
        Strokes(torch.rand(2, 3, 4, 2), torch.rand(2, 4))
    with pytest.raises(ValueError, match="softness=0"):
        random_strokes().draw(8, 0.0)
    with pytest.raises(ValueError, match="size=0"):
        random_strokes().draw(0)


def test_svg_reads_back():
    strokes = random_strokes(2, 5)
    strokes.opacity[1] = torch.tensor([1.0, 0.01, 0.5, 0.04, 0.2])
    root = ElementTree.fromstring(strokes.svg(1))
    assert root.get("viewBox") == "0 0 1 1"
    paths = [e for e in root.iter() if e.tag.endswith("path")]
    kept = [0, 2, 4]  # the others are nearly transparent
    assert len(paths) == len(kept)

    def numbers(texts):
        return torch.tensor([float(t) for t in texts], dtype=torch.double)

    digits = [number for e in paths for number in re.findall(r"-?\d+\.\d+", e.get("d"))]
    points = numbers(digits).view(-1, 4, 2)
    opacity, width = (numbers(e.get(k) for e in paths) for k in ("stroke-opacity", "stroke-width"))
    for back, original in (
        (points, strokes.points[1, kept]),
        (opacity, strokes.opacity[1, kept]),
        (width, strokes.width[1, kept]),
    ):
        assert torch.allclose(back, original, atol=5.1e-5)
    again = Strokes(points[None], opacity[None], width[None])
    original = Strokes(strokes.points[1:, kept], strokes.opacity[1:, kept], strokes.width[1:, kept])
    assert (again.draw(32) - original.draw(32)).abs().max() < 0.03
    assert strokes[1:]._repr_svg_() == strokes.svg(1)
