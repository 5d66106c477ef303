"""Stroke pages: drawings by construction, moved by their control points."""

import math

import pytest
import torch

from dfsbir.inversion.stroke_pages import (
    StrokePages,
    _exchange_curves,
    _move_curves,
    _move_pages,
)
from dfsbir.inversion.strokes import Strokes


def pages(n=3, strokes=4, size=20, **changes):
    random = torch.Generator().manual_seed(0)
    return StrokePages(StrokePages.draw_start(n, strokes, random), size, **changes)


def test_the_start_is_the_generators_alone():
    torch.manual_seed(1)
    first = pages().values()
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(first, pages().values()))


def test_values_make_the_same_pages_again():
    made = pages(width=0.04)
    with torch.no_grad():
        made.points += 0.1
        made.opacity_logit -= 3
    again = StrokePages(made.values(), 20, 0.04)
    assert torch.equal(made(), again())


@pytest.mark.parametrize("width", [0.05, 0.1])
def test_pages_are_ink_on_paper_with_lines_of_the_pen(width):
    "One straight line of length .6 covers its length times its width."
    line = torch.tensor([[0.2, 0.5], [0.4, 0.5], [0.6, 0.5], [0.8, 0.5]])
    page = StrokePages([line.view(1, 1, 4, 2), torch.full((1, 1), 9.0)], 200, width)
    with torch.no_grad():
        picture = page()
    assert picture.amin() >= 0 and picture.amax() <= 1 and picture[0, 0, 5, 5] > 0.99
    assert (1 - picture).mean().item() == pytest.approx(0.6 * width, rel=0.3)


def test_a_view_moves_control_points_by_a_loop():
    made = pages(n=4)
    u = 2 * torch.rand(4, 4, generator=torch.Generator().manual_seed(5)) - 1
    moved = torch.zeros(4, 4, 4, 2)
    for i in range(4):
        turn, scale = 0.15 * u[0, i].item(), math.exp(0.15 * u[1, i].item())
        for s in range(4):
            for k in range(4):
                x, y = (made.points[i, s, k] - 0.5).tolist()
                moved[i, s, k, 0] = scale * (math.cos(turn) * x - math.sin(turn) * y)
                moved[i, s, k, 1] = scale * (math.sin(turn) * x + math.cos(turn) * y)
        moved[i] += 0.5 + 0.05 * u[2:, i]
    want = Strokes(moved, made.opacity_logit.sigmoid(), made.width).draw(28, made.softness)
    view = made.view(28, torch.Generator().manual_seed(5))
    torch.testing.assert_close(view, want, rtol=1e-4, atol=1e-4)


def test_half_precision_does_not_round_control_points():
    made = pages()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = made.view(28, torch.Generator().manual_seed(5))
    torch.testing.assert_close(mixed, made.view(28, torch.Generator().manual_seed(5)))


def test_edges_harden_and_pictures_are_always_crisp():
    made = pages()
    picture, edges = made(), []
    for progress in (0.0, 0.4, 0.8, 1.0):
        made.anneal(progress)
        edges.append(made.softness)
        assert torch.equal(made(), picture)
    assert edges == pytest.approx([0.04, 0.02, 0.01, 0.01])


def test_every_parameter_feels_the_loss():
    made = pages()
    made.view(20, torch.Generator().manual_seed(1)).square().sum().backward()
    assert made.points.grad.abs().sum(-1).gt(0).any((1, 2)).all()
    assert made.opacity_logit.grad.abs().gt(0).all()
    rates = [(len(group["params"]), group["lr"]) for group in made.groups(0.1)]
    assert rates == [(1, pytest.approx(0.02)), (1, pytest.approx(0.08))]


def redrawn(made, seed=1):
    return made.redraw(torch.Generator().manual_seed(seed))


def test_pages_are_drawn_again_and_stay_as_they_are():
    made = pages(n=4)
    before, picture = made.values(), made()
    again = redrawn(made)
    assert again.shape == picture.shape and again.min() >= 0 and again.max() <= 1
    assert not again.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(before, made.values()))
    assert torch.equal(again, redrawn(made))
    assert not torch.equal(again, redrawn(made, seed=2))


def test_global_random_numbers_do_not_draw():
    made = pages()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    redrawn(made)
    assert torch.equal(before, torch.get_rng_state())


def test_a_curve_in_ten_goes_and_some_come_from_other_pages():
    n, curves = 400, 10
    number = torch.arange(n * curves).view(n, curves)
    points = number[..., None, None].expand(-1, -1, 4, 2).float()
    drawn = Strokes(points, torch.ones(n, curves))
    found = _exchange_curves(drawn, torch.Generator().manual_seed(0))
    came = found.points[..., 0, 0].long()
    assert torch.equal(came % curves, number % curves)  # the same place of some page
    foreign = (came // curves) != torch.arange(n)[:, None]
    assert foreign.any(1).float().mean().item() == pytest.approx(0.46, abs=0.06)
    assert foreign.float().mean().item() == pytest.approx(0.125, abs=0.02)
    assert (found.opacity == 0).float().mean().item() == pytest.approx(0.1, abs=0.02)
    sources = [set((row // curves).tolist()) - {i} for i, row in enumerate(came)]
    assert max(map(len, sources)) == 1  # one other page at most


def test_moved_curves_stay_near_and_keep_their_size():
    drawn = pages(n=50, strokes=8).strokes()
    moved = _move_curves(drawn, torch.Generator().manual_seed(0)).points
    centres = [x.mean(2) for x in (drawn.points, moved)]
    assert (centres[1] - centres[0]).abs().amax() < 0.04
    spread = [x.std(2).norm(dim=-1).mean() for x in (drawn.points, moved)]
    assert (spread[1] / spread[0]).item() == pytest.approx(1, abs=0.05)


def test_whole_pages_turn_scale_stretch_and_shift():
    "All curves of a page by one map: parallels stay parallel, and the middle moves by .1 at most."
    square = torch.tensor([[0.4, 0.4], [0.6, 0.4], [0.6, 0.6], [0.4, 0.6]])
    drawn = Strokes(square.expand(60, 1, 4, 2), torch.ones(60, 1))
    moved = _move_pages(drawn, torch.Generator().manual_seed(0)).points[:, 0]
    a, b, c, d = moved.unbind(1)
    torch.testing.assert_close(b - a, c - d)
    assert (moved.mean(1) - 0.5).abs().amax() <= 0.1 + 1e-6
    sides = torch.stack([(b - a).norm(dim=-1), (d - a).norm(dim=-1)]) / 0.2
    assert sides.amin() > math.exp(-0.37 - 0.01) and sides.amax() < math.exp(0.37 + 0.01)
    assert sides.std() > 0.05
