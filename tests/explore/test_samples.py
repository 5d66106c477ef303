"Samples of the estimators: pairs, drawings, walks."

import pytest
import torch

from dfsbir.core.types import MODALITIES, Modality
from dfsbir.explore.samples import blend_classes, sample_drawing, sample_pairs, show_samples
from dfsbir.inversion.generators import PixelGenerator


def test_pairs_are_reproducible(run):
    a, b, c = (sample_pairs(run, "fish", 3, seed) for seed in (1, 1, 2))
    assert torch.equal(a.photo, b.photo) and torch.equal(a.sketch, b.sketch)
    assert not torch.equal(a.photo, c.photo)


def test_pairs_of_an_unconditioned_run_are_of_the_class_for_its_teachers(paper):
    label = max(paper.classes, key=lambda name: len(sample_pairs(paper, name, 3)))
    pairs = sample_pairs(paper, label, 3)
    score = sum(paper.posteriors("teacher", m, pairs.of(m)) for m in MODALITIES)
    assert len(pairs) and (score.argmax(1) == paper.classes.index(label)).all()
    missing = [name for name in paper.classes if not len(sample_pairs(paper, name, 3))]
    for name in missing:
        with pytest.raises(ValueError, match=name):
            show_samples(paper, name, n=3)


def test_a_drawing_is_what_the_generator_draws(run):
    "The polylines, drawn with a hard pen, cover the estimate's dark pixels."
    svg, strokes = sample_drawing(run, "car", 2, faint=0.0)
    assert svg.count("<path") == len(strokes) == run.config.pairs.sketch.strokes
    noise = torch.randn(1, run.config.pairs.latent, generator=torch.Generator().manual_seed(2))
    drawn = run.generators[Modality.SKETCH].strokes(noise, torch.tensor([1]))
    dark = drawn.draw(64)[0, 0] < 0.5
    lines = torch.tensor(strokes).reshape(-1, 2)
    middle = (torch.arange(64) + 0.5) / 64
    grid = torch.stack(torch.meshgrid(middle, middle, indexing="xy"), -1)[dark]
    assert len(grid) and (torch.cdist(grid, lines).min(1).values < 0.12).all()


def test_pixel_sketches_have_no_strokes(paper):
    with pytest.raises(ValueError, match="pixels"):
        sample_drawing(paper, "fish")


@torch.no_grad()
def test_a_walk_begins_and_ends_at_its_classes(run):
    noise = torch.randn(1, run.config.pairs.latent, generator=torch.Generator().manual_seed(0))
    start, end = torch.tensor([0]), torch.tensor([2])
    for m in MODALITIES:
        g = run.generators[m]
        there = blend_classes(g, 0, 2, 1.0)(noise, start)
        torch.testing.assert_close(there, g(noise, end))
        assert torch.equal(blend_classes(g, 0, 2, 0.0)(noise, start), g(noise, start))
        assert not torch.equal(blend_classes(g, 0, 2, 0.5)(noise, start), g(noise, start))


@torch.no_grad()
@pytest.mark.parametrize("classes, channels", [(12, 3), (4, 1), (16, 3)])
def test_a_walk_leaves_alone_what_all_classes_share(classes, channels):
    "Even where a convolution happens to have as many channels as there are classes."
    torch.manual_seed(0)
    g = PixelGenerator(classes, channels, 16, 8, 8).eval().requires_grad_(False)
    noise = torch.randn(1, 8)
    for table in g.tables():
        table.normal_(1, 0.3)
    there = blend_classes(g, 0, 1, 1.0)(noise, torch.tensor([0]))
    torch.testing.assert_close(there, g(noise, torch.tensor([1])))
