"""Drawing programs: what the numbers mean, and that variations and crosses keep to their word."""

import pytest
import torch

from dfsbir.data import drawing_programs as dp
from dfsbir.data.drawing_programs import (
    PARTS,
    PROGRAM_NUMBERS,
    crossover_programs,
    draw_programs,
    mutate_programs,
    new_programs,
)

PART, FRAME = dp._PART, dp._FRAME
ROW = sum(PART.values())


def random(seed=0):
    return torch.Generator().manual_seed(seed)


def place(widths, name):
    "The columns of a number by name."
    names = list(widths)
    before = sum(widths[n] for n in names[: names.index(name)])
    return slice(before, before + widths[name])


def plain(parts, **frame):
    """A program of parts that are given by their numbers; everything else is off or neutral.

    Numbers that are not given are those of a solid upright disc in the middle, seen from the front
    and drawn without gaps.
    """
    numbers = dict.fromkeys(PART, 0.9)
    numbers |= {"middle": 0.5, "side": 0.5, "aspect": 0.5, "waves": 0.5, "turn": 0.0, "stick": 0.9}
    neutral = dict.fromkeys(FRAME, 0.5) | {"shake": 0.0, "gap_level": 0.99, "ink": 0.9999}
    neutral |= {"see_through": 0.9, "symmetric": 0.9, **frame}
    program = torch.zeros(1, PROGRAM_NUMBERS)
    table = program[:, : PARTS * ROW].view(PARTS, ROW)
    for i in range(PARTS):
        for name, value in (numbers | (parts[i] if i < len(parts) else {})).items():
            table[i, place(PART, name)] = torch.as_tensor(value)
    for name, value in neutral.items():
        program[:, PARTS * ROW :][:, place(FRAME, name)] = torch.as_tensor(value)
    return program


def ink(program, size=64, pen=0.04):
    return 1 - draw_programs(program, size, pen)[0, 0]


def radius(size=64):
    side = (torch.arange(size) + 0.5) / size * 2 - 1
    return (side[:, None] ** 2 + side[None] ** 2).sqrt()


def test_a_disc_is_a_ring_of_ink_of_the_pens_width():
    found = ink(plain([{}]))
    expected = 0.4 + 0.35 / 2  # half way between the smallest and the largest side of a first part
    on = (radius() - expected).abs() < 0.04 - 0.03
    off = (radius() - expected).abs() > 0.04 + 0.08
    assert found[on].min() > 0.7
    assert found[off].max() < 0.05


def test_filled_and_hatched_discs_have_ink_inside():
    outline, filled, hatched = (
        ink(plain([change])) for change in ({}, {"fill": 0.01}, {"hatch": 0.05})
    )
    inside = radius() < 0.4
    assert outline[inside].max() < 0.05
    assert filled[inside].min() > 0.95
    assert 0.1 < hatched[inside].mean() < 0.7


def test_a_grid_is_the_same_after_a_quarter_turn_and_lines_are_not():
    grid, lines = (ink(plain([{"hatch": 0.05, "grid": g}])) for g in (0.1, 0.9))
    inside = radius() < 0.35
    assert (grid - grid.rot90()).abs()[inside].max() < 0.05
    assert (lines - lines.rot90()).abs()[inside].max() > 0.5


def test_an_open_part_is_a_piece_of_the_closed_one_and_hides_nothing():
    closed, arc = ink(plain([{}])), ink(plain([{"open": 0.05, "begin": 0.0}]))
    assert 0.2 < arc.sum() / closed.sum() < 0.8
    assert (arc <= closed + 1e-5).all()
    first, cover = {"side": 0.0}, {"exists": 0.1, "side": 0.999, "aspect": 0.9}
    ring = ink(plain([first])) > 0.9
    assert ink(plain([first, cover]))[ring].mean() < 0.1
    assert ink(plain([first, cover | {"open": 0.05}]))[ring].min() > 0.85


def test_a_part_hides_what_is_behind_it_unless_the_drawing_is_see_through():
    cover = [{"side": 0.0}, {"exists": 0.1, "side": 0.999, "aspect": 0.9}]
    solid, through = ink(plain(cover)), ink(plain(cover, see_through=0.1))
    ring = ink(plain(cover[:1])) > 0.9
    assert solid[ring].mean() < 0.1
    assert through[ring].min() > 0.85


def test_twins_make_a_drawing_symmetric():
    ear = {"exists": 0.1, "middle": torch.tensor([0.9, 0.2]), "side": 0.3, "twin": 0.1}
    one_sided = ink(plain([{}, ear]))
    symmetric = ink(plain([{}, ear], symmetric=0.1))
    assert (one_sided - one_sided.flip(1)).abs().max() > 0.5
    torch.testing.assert_close(symmetric, symmetric.flip(1), atol=1e-3, rtol=0)


def test_a_row_is_its_parts_side_by_side():
    window = {"exists": 0.1, "side": 0.0, "kind": 0.5, "power": 0.99, "gap": 0.9, "row_turn": 0.0}
    alone = ink(plain([{"side": 0.999}, window], see_through=0.1))
    row = ink(plain([{"side": 0.999}, window | {"row": 0.03}], see_through=0.1))  # 3 of them
    shift = round((0.15 + 0.9 * 0.35) * 32)
    frame = ink(plain([{"side": 0.999}]))
    windows = (alone - frame).clamp(min=0)
    expected = windows + windows.roll(shift, 1) + windows.roll(-shift, 1)
    inner = radius() < 0.6
    assert ((row - expected).abs()[inner] > 0.3).float().mean() < 0.05


def test_a_wider_pen_makes_wider_lines():
    program = new_programs(16, random())
    thin, wide = (1 - draw_programs(program, 56, pen) for pen in (0.02, 0.06))
    assert (wide.sum((1, 2, 3)) > 1.2 * thin.sum((1, 2, 3))).float().mean() > 0.9


def test_the_side_changes_the_resolution_and_not_the_drawing():
    program = new_programs(32, random())
    small, large = draw_programs(program, 28, 0.053), draw_programs(program, 112, 0.053)
    scaled = torch.nn.functional.interpolate(large, (28, 28), mode="bilinear", antialias=True)
    assert (small - scaled).abs().mean() < 0.05


def test_a_drawing_depends_on_its_own_program_alone():
    program = new_programs(20, random())
    together = draw_programs(program, 28)
    torch.testing.assert_close(together[7:8], draw_programs(program[7:8], 28), atol=1e-5, rtol=0)
    assert together.min() >= 0 and together.max() <= 1 and together.isfinite().all()


@pytest.mark.parametrize("amount", [0.05, 3.0])
def test_variations_stay_programs_and_leave_their_parents_alone(amount):
    program = new_programs(64, random())
    before = program.clone()
    varied = mutate_programs(program, random(1), amount)
    assert torch.equal(program, before)
    assert varied.shape == program.shape and varied.min() >= 0 and varied.max() < 1
    assert not torch.equal(varied, program)
    assert torch.equal(varied, mutate_programs(program, random(1), amount))


def test_small_variations_are_near_their_parents():
    program = new_programs(200, random())
    near = draw_programs(mutate_programs(program, random(1), 0.01, renewed=0.0), 28)
    drawings = draw_programs(program, 28)
    others = (drawings - drawings.roll(1, 0)).abs().mean()
    assert (near - drawings).abs().mean() < 0.3 * others


def test_a_cross_has_whole_parts_of_two_parents_and_the_frame_of_the_first():
    a, b = new_programs(400, random(1)), new_programs(400, random(2))
    crossed = crossover_programs(a, b, random(3))
    parts = [t[:, : PARTS * ROW].view(-1, PARTS, ROW) for t in (crossed, a, b)]
    of_a, of_b = ((parts[0] == other).all(2) for other in parts[1:])
    assert (of_a ^ of_b).all()
    assert torch.equal(crossed[:, PARTS * ROW :], a[:, PARTS * ROW :])
    assert 0.3 < of_b.any(1).float().mean() < 0.55  # half of them, and few of those take nothing


@pytest.mark.parametrize("shape", [(3, 5), (PROGRAM_NUMBERS,), (2, 2, PROGRAM_NUMBERS)])
def test_what_is_no_program_is_refused(shape):
    with pytest.raises(ValueError, match=rf"wanted programs \(N,{PROGRAM_NUMBERS}\)"):
        draw_programs(torch.zeros(shape))
