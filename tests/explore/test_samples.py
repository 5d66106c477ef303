"Samples of the estimators: pairs, drawings, walks."

from types import SimpleNamespace

import pytest
import torch

from dfsbir.core.types import MODALITIES, Modality
from dfsbir.explore.samples import (
    ORDERS,
    VERDICTS,
    blend_classes,
    nearest_images,
    pair_confidence,
    procedural_pairs,
    sample_drawing,
    sample_pairs,
    select_pairs,
    show_objects,
    show_samples,
    verifier_confidence,
)
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


def lowest_confidence(run, pairs):
    "The smaller confidence of the two teachers in each pair's class, slowly."
    found = []
    for i in range(len(pairs)):
        k = pairs.label[i]
        both = [run.posteriors("teacher", m, pairs.of(m)[i : i + 1])[0, k] for m in MODALITIES]
        found.append(min(float(p) for p in both))
    return found


def test_confidence_is_that_of_the_own_class(run):
    pairs = sample_pairs(run, "car", 6)
    confidence = pair_confidence(run, pairs)["teacher"]
    lowest = torch.minimum(*(confidence[m] for m in MODALITIES))
    assert lowest.tolist() == pytest.approx(lowest_confidence(run, pairs), abs=1e-5)


@pytest.mark.parametrize("order", ORDERS)
def test_pairs_are_filtered_and_sorted_by_confidence(run, order):
    pairs = sample_pairs(run, "car", 24)
    every = lowest_confidence(run, pairs)
    middle = sorted(every)[12]
    kept = lowest_confidence(run, select_pairs(run, pairs, middle - 1e-6, order))
    wanted = [p for p in every if p >= middle - 1e-6]
    if order != "as drawn":
        wanted.sort(reverse=order == "most confident first")
    assert kept == pytest.approx(wanted, abs=1e-5) and 0 < len(kept) < 24


def test_the_title_says_what_was_asked_for(run):
    def title(**asked):
        return "".join(text.get_text() for text in show_samples(run, "car", **asked).figure.texts)

    assert title() == "car, seed 0"
    sorted_alone = title(order="least confident first")
    assert "64 of 64 samples" in sorted_alone and "teachers" not in sorted_alone
    assert "0.01 or more of both teachers" in title(least=0.01)


def test_a_bound_that_no_sample_reaches_is_reported(run):
    with pytest.raises(ValueError, match="lower bound"):
        show_samples(run, "car", least=1.01)


class Verifier:
    "Recognises a sample as `fish` where its mean is above a bound, else as `car`."

    classes = ("Car", "Fish")

    def __init__(self, bound):
        self.bound = bound

    def __call__(self, images, bn):
        fish = (images.mean((1, 2, 3)) > self.bound).float()
        return SimpleNamespace(logits=4 * torch.stack([1 - fish, fish], 1))


@pytest.fixture
def verifiers(run):
    "Verifiers that recognise about half of the samples of class fish."
    pairs = sample_pairs(run, "fish", 64)
    return {m: Verifier(pairs.of(m).mean((1, 2, 3)).quantile(0.3)) for m in MODALITIES}


def test_samples_are_filtered_by_the_verifiers(run, verifiers):
    pairs = sample_pairs(run, "fish", 64)
    judged = torch.stack([pairs.of(m).mean((1, 2, 3)) > verifiers[m].bound for m in MODALITIES])
    for verdict, wanted in (("recognises both", judged.all(0)), (VERDICTS[-1], ~judged.all(0))):
        kept = select_pairs(run, pairs, verifiers=verifiers, verdict=verdict)
        assert 0 < len(kept) < 64 and torch.equal(kept.photo, pairs.photo[wanted])
    shown = show_samples(run, "fish", n=4, verifiers=verifiers, verdict="recognises both")
    assert len(captions(shown)) == 8 and all("verifier .98" in text for text in captions(shown))
    unknown = sample_pairs(run, "bottle", 2)
    with pytest.raises(ValueError, match="bottle"):
        verifier_confidence(run, unknown, verifiers)


def test_a_verifier_of_one_modality_is_enough(run, verifiers):
    only = {Modality.SKETCH: verifiers[Modality.SKETCH]}
    shown = captions(show_samples(run, "fish", n=3, verifiers=only, verdict="shown"))
    assert ["verifier" in text for text in shown] == [False] * 3 + [True] * 3


def test_the_nearest_test_image_is_the_nearest(run, sets):
    samples = sample_pairs(run, "fish", 3)
    for m, images in zip(MODALITIES, sets):
        places, similarity = nearest_images(run, samples.of(m), images)
        encoder = run.encoders[m]
        slow = encoder(samples.of(m)) @ encoder(images.images()).T
        assert places == slow.argmax(1).tolist()
        torch.testing.assert_close(similarity, slow.max(1).values, atol=1e-5, rtol=0)


def captions(picture):
    return [ax.get_xlabel() for ax in picture.axes]


def test_samples_carry_class_and_numbers_with_words(run, sets):
    shown = captions(show_samples(run, "fish", n=3, test_images=sets))
    assert len(shown) == 4 * 3  # sample and nearest test image, of photo and sketch
    own = [text for text in shown if "teacher" in text]
    assert len(own) == 6 and all(t.startswith("fish\n") and "student" in t for t in own)
    assert all("similarity" in text for text in shown if text not in own)


def test_objects_are_shown_with_what_they_are_taken_for(objects):
    shown = captions(show_objects(objects, seed=1, n=3))
    assert len(shown) == 6 and all("teacher" in t and "student" in t for t in shown)
    first, again = (procedural_pairs(objects, 2, 5) for _ in range(2))
    assert torch.equal(first.photo, again.photo)


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
