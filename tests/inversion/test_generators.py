"What every generator promises, at every size; templates, annealing, learning rates, wrong inputs."

import pytest
import torch

from dfsbir.inversion.generators import PixelGenerator, StrokeGenerator


def pixel_photo(classes, size):
    return PixelGenerator(classes, 3, size, width=8)


def pixel_sketch(classes, size):
    return PixelGenerator(classes, 1, size, width=8)


def stroke_sketch(classes, size):
    return StrokeGenerator(classes, size, strokes=4, templates_per_class=3)


KINDS = {"pixel": pixel_photo, "pixel sketch": pixel_sketch, "stroke": stroke_sketch}


@pytest.mark.parametrize("classes", [3, 0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [28, 45, 64, 224])
def test_generators_keep_their_contract(kind, size, classes):
    g = KINDS[kind](classes, size)
    noise, label = torch.randn(4, 64), torch.tensor([0, 2, 1, 2]) if classes else None
    x = g(noise, label)
    assert x.shape == (4, g.channels, size, size) and x.dtype == torch.float32
    assert x.min() >= 0 and x.max() <= 1
    x.square().mean().backward()
    gradients = [p.grad for p in g.parameters()]
    assert all(d is not None and d.isfinite().all() for d in gradients)
    assert any(d.abs().sum() > 0 for d in gradients)


@pytest.mark.parametrize("classes", [3, 0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [28, 45, 64, 224])
def test_a_trained_image_depends_on_its_own_noise_alone(kind, size, classes):
    g = KINDS[kind](classes, size).eval()
    noise, label = torch.randn(4, 64), torch.tensor([0, 2, 1, 2]) if classes else None
    x = g(noise, label)
    assert torch.equal(x, g(noise, label))
    alone = g(noise[1:2], None if label is None else label[1:2])
    assert torch.allclose(x[1:2], alone, atol=1e-5)
    assert (x[1] - x[3]).abs().mean() > 1e-4  # same class, other noise


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_is_in_one_group(kind):
    g = KINDS[kind](3, 28)
    in_groups = [id(p) for group in g.groups() for p in group["params"]]
    assert sorted(in_groups) == sorted(id(p) for p in g.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_tables_have_a_row_per_class(kind):
    assert all(len(t) == 3 for t in KINDS[kind](3, 28).tables())


@pytest.mark.parametrize("kind", KINDS)
def test_generators_name_wrong_inputs(kind):
    g = KINDS[kind](3, 28)
    with pytest.raises(ValueError, match="label for each"):
        g(torch.randn(4, 64))
    with pytest.raises(ValueError, match=r"\(4, 63\)"):
        g(torch.randn(4, 63), torch.zeros(4).long())
    with pytest.raises(ValueError, match="4 labels"):
        g(torch.randn(4, 64), torch.zeros(3).long())
    with pytest.raises(ValueError, match="size=8"):
        KINDS[kind](3, 8)


def small_stroke_generator():
    return StrokeGenerator(2, 28, strokes=3, templates_per_class=2)


def test_annealing_hardens_the_edge_and_is_saved():
    g, softness = small_stroke_generator(), []
    for progress in (0.0, 0.4, 0.8, 1.0):
        g.anneal(progress)
        softness.append(g.softness.item())
    assert softness == pytest.approx([0.04, 0.02, 0.01, 0.01])
    loaded = small_stroke_generator()
    loaded.load_state_dict(g.state_dict())
    noise, label = torch.randn(3, 64), torch.tensor([0, 1, 1])
    assert torch.equal(g(noise, label), loaded(noise, label))


def test_templates_that_are_seldom_selected_have_lower_rates():
    g = StrokeGenerator(8, 28, strokes=3, templates_per_class=16)  # 128 templates
    rates = {b: g.groups(1e-3, b)[0]["lr"] for b in (16, 64, 256)}
    assert rates == pytest.approx({16: 0.01, 64: 0.02, 256: 0.02})


def test_strokes_of_a_generator_are_its_drawing():
    g = small_stroke_generator().eval()
    noise, label = torch.randn(3, 64), torch.tensor([0, 1, 1])
    drawing = g.strokes(noise, label).draw(28, g.softness.item())
    assert torch.equal(drawing, g(noise, label))


def test_strokes_of_one_pen():
    g = StrokeGenerator(3, 28, strokes=4, templates_per_class=3, pen=0.053)
    noise, label = torch.randn(4, 64), torch.tensor([0, 2, 1, 2])
    assert (g.strokes(noise, label).width == 0.053).all()
    g(noise, label).mean().backward()
    assert (g.width_logit.grad == 0).all() and (g.points.grad != 0).any()
    free = StrokeGenerator(3, 28, strokes=4, templates_per_class=3).strokes(noise, label)
    assert (free.width < 0.025).all()
