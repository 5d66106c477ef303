"The fused programs of the rasteriser: in Triton's interpreter, through its compiler, and refused."

import os
import subprocess
import sys

import pytest
import torch

from dfsbir.inversion import strokes
from dfsbir.inversion.strokes import PolylineDistance

triton = pytest.importorskip("triton")

INTERPRETED = """
import torch
from dfsbir.data.polyline_kernels import gradient_sums, nearest_distance
from dfsbir.inversion import strokes

strokes._check_kernels(nearest_distance, gradient_sums, "cpu")
torch.manual_seed(0)
for lines, pieces, size in [(5, 8, 28), (1, 1, 7), (3, 4, 33), (2, 24, 16)]:
    corners = torch.rand(lines, pieces + 1, 2) * 1.6 - 0.3
    corners[0, 1] = corners[0, 0]  # a segment without length
    strokes._operations = lambda lines: (strokes._plain_distance, strokes._plain_sums)
    wanted = corners.clone().requires_grad_()
    distance = strokes.PolylineDistance.apply(wanted, size)
    rate = torch.randn_like(distance) * distance.detach()
    distance.backward(rate)
    strokes._operations = lambda lines: (nearest_distance, gradient_sums)
    found = corners.clone().requires_grad_()
    drawn = strokes.PolylineDistance.apply(found, size)
    drawn.backward(rate)
    assert (drawn - distance).abs().max() < 1e-6
    assert (found.grad - wanted.grad).abs().max() < 1e-5 * wanted.grad.abs().max()

corners = torch.rand(2, 5, 2)
corners[1, 2] = float("nan")
drawn = nearest_distance(strokes._axes(corners), 8)
assert torch.isfinite(drawn[0]).all() and torch.isnan(drawn[1]).all()
"""


def test_interpreted_programs_equal_the_plain_operations():
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=env, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize("capability", [80, 90])
def test_the_programs_compile_for_cards_that_are_not_here(monkeypatch, tmp_path, capability):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dfsbir.data import polyline_kernels as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kinds = {"segments": "*fp32", "rate": "*fp32", "out": "*fp32", "size": "i32", "blocks": "i32"}
    for program in (kernels._distance_program, kernels._sums_program):
        signature = {name: kinds.get(name, "constexpr") for name in program.arg_names}
        source = ASTSource(program, signature, {"pieces": 8, "block": kernels._BLOCK})
        made = triton.compile(source, GPUTarget("cuda", capability, 32))
        assert made.asm["cubin"]


def of_kernels(monkeypatch, *programs):
    "What `_kernels` gives where these are the fused programs and the CPU stands for the card."
    check = strokes._check_kernels
    monkeypatch.setattr(strokes, "_check_kernels", lambda *_: check(*programs, "cpu"))
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 2)
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    strokes._kernels.cache_clear()
    try:
        return strokes._kernels(), modes
    finally:
        strokes._kernels.cache_clear()


def test_programs_that_give_the_same_are_taken_and_waits_are_allowed_for_the_test_alone(
    monkeypatch,
):
    found, modes = of_kernels(monkeypatch, strokes._plain_distance, strokes._plain_sums)
    assert found is not None and modes == ["default", 2]


@pytest.mark.parametrize("fault", ["other numbers", "no compiler", "NaN"])
def test_programs_that_do_not_work_are_left_alone_with_the_reason(monkeypatch, fault):
    def distance(axes, size):
        if fault == "no compiler":
            raise RuntimeError("Failed to find C compiler\nand a long trace")
        found = strokes._plain_distance(axes, size)
        return found + 0.01 if fault == "other numbers" else found * float("nan")

    says = "Failed to find C compiler\\)" if fault == "no compiler" else "AssertionError"
    with pytest.warns(UserWarning, match=f"drawn by plain operations.*{says}"):
        found, modes = of_kernels(monkeypatch, distance, strokes._plain_sums)
    assert found is None and modes == ["default", 2]


def test_the_processor_uses_the_plain_operations(monkeypatch):
    monkeypatch.setattr(strokes, "_kernels", lambda: pytest.fail("not on a card"))
    lines = torch.rand(2, 4, 2, requires_grad=True)
    PolylineDistance.apply(lines, 8).sum().backward()
    assert lines.grad.abs().sum() > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("size", [28, 224])
def test_a_card_draws_what_the_plain_operations_draw(monkeypatch, size):
    corners = torch.rand(6, 9, 2, device="cuda")
    found = []
    for programs in (strokes._kernels(), (strokes._plain_distance, strokes._plain_sums)):
        monkeypatch.setattr(strokes, "_operations", lambda _, programs=programs: programs)
        lines = corners.clone().requires_grad_()
        distance = PolylineDistance.apply(lines, size)
        (distance.square() / 2).sum().backward()
        found.append((distance.detach(), lines.grad))
    assert strokes._kernels() is not None
    for fused, plain in zip(*found):
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-4)
