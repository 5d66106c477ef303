"""The toy set: its pixels, its promises, its difficulty."""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dfsbir.core.data_guard import DataFreeViolation, data_free
from dfsbir.data.toy import compose_photos, photo_layers, toy_instance, toy_pairs
from dfsbir.data.toy_shapes import SHAPES, TOY_CLASSES, TOY_HELD_OUT

DIGESTS = {  # (size, split, seed): first digits of the digests of 70 photos and 70 sketches
    (32, "train", 0): ("991ccb12c2b30c33", "ed2ce37054519ecf"),
    (32, "test", 5): ("84b2fe391553665b", "067d52fb0dcc2e30"),
    (64, "train", 1): ("d65404cfb085526f", "34d6cc742c6a8c5d"),
    (64, "test", 0): ("d83c50281c1f9755", "1e03e39a9152a066"),
}


@pytest.mark.parametrize("size, split, seed", DIGESTS)
def test_pixels_are_those_of_every_earlier_version(size, split, seed):
    "Numbers published for the toy set are numbers of exactly these images."
    found = [images.digest()[:16] for images in toy_pairs(70, size, seed, split=split)]
    assert tuple(found) == DIGESTS[size, split, seed]


def test_what_the_toy_set_is(toy):
    photos, sketches = toy
    assert photos.images().shape == (200, 3, 32, 32)
    assert sketches.images().shape == (200, 1, 32, 32)
    assert torch.equal(photos.labels, sketches.labels)
    assert torch.equal(photos.instances, sketches.instances)
    assert torch.bincount(photos.labels).tolist() == [20] * 10
    assert photos.classes == list(TOY_CLASSES)
    assert sketches.images().mean() > 0.8, "sketches are dark ink on white paper"
    assert (sketches.images().amin((1, 2, 3)) < 0.7).all(), "no sketch is empty"
    assert photos.images().std((1, 2, 3)).min() > 0.03, "no photo is blank"


def test_classes_of_the_task_and_held_out_classes_are_apart():
    assert len(TOY_CLASSES) >= 10 and len(TOY_HELD_OUT) >= 4
    assert not set(TOY_CLASSES) & set(TOY_HELD_OUT)


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_lies_near_the_square_and_follows_its_random_numbers(name):
    for seed in range(20):
        parts = SHAPES[name](np.random.default_rng(seed).uniform)
        again = SHAPES[name](np.random.default_rng(seed).uniform)
        assert all(np.array_equal(a.points, b.points) for a, b in zip(parts, again, strict=True))
        points = np.concatenate([part.points for part in parts])
        assert points.shape[1] == 2 and np.abs(points).max() < 1.35
        assert {part.tone for part in parts} <= {0, 1, 2, 3}
        assert any(part.closed and not part.detail for part in parts), "something always stays"


def test_an_instance_does_not_depend_on_n(toy):
    for few, many in zip(toy_pairs(41, 32, seed=1, split="test"), toy):
        assert torch.equal(few.pixels(), many.pixels()[:41])


def test_seeds_and_splits_share_no_image(toy):
    known = {image.numpy().tobytes() for images in toy for image in images.pixels()}
    assert len(known) == 400, "every image differs from every other"
    for others in (toy_pairs(64, 32, seed=1), toy_pairs(64, 32, seed=2, split="test")):
        for images in others:
            assert not known & {image.numpy().tobytes() for image in images.pixels()}


def test_an_instance_looks_the_same_at_another_size():
    "Not equal, for grain is drawn per pixel; but another instance correlates far less."
    small, large = toy_pairs(32, 32, seed=4), toy_pairs(32, 64, seed=4)
    for a, b, least in zip(small, large, (0.85, 0.8)):
        halved = F.avg_pool2d(b.images(), 2)
        for x, y in zip(a.images(), halved):
            assert np.corrcoef(x.ravel(), y.ravel())[0, 1] > least


def test_photo_and_sketch_share_their_instance():
    """Width over height of the object in the photo and of the ink in the sketch go together,
    within each class."""

    def log_ratio(mask):
        rows, columns = np.nonzero(mask)
        return np.log((1 + np.ptp(columns)) / (1 + np.ptp(rows)))

    for name in ("bottle", "fish", "umbrella"):
        _, sketches = toy_pairs(160, 48, seed=2, classes=[name], split="test")
        layers = [photo_layers(toy_instance(i, name, seed=2), 48) for i in range(160)]
        in_photo = [log_ratio(photo.thing[..., 3] > 100) for photo in layers]
        in_sketch = [log_ratio(image[0].numpy() < 0.6) for image in sketches.images()]
        correlation = np.corrcoef(in_photo, in_sketch)[0, 1]
        assert correlation > 0.35, f"{name}: {correlation:.2f}"


def test_a_pair_is_made_of_its_instance(toy):
    layers = [photo_layers(toy_instance(i, TOY_CLASSES[i % 10], seed=1), 32) for i in range(32)]
    assert torch.equal(compose_photos(layers), toy[0].pixels()[:32])


@pytest.mark.parametrize("size", (28, 224))
def test_smallest_and_largest_size(size):
    photos, sketches = toy_pairs(3, size, classes=TOY_HELD_OUT)
    assert photos.images().shape == (3, 3, size, size) and sketches.size == size


def mean_ap(query, gallery, labels):
    "Mean average precision of the cosine, the slow way."
    scores = F.normalize(query, dim=1) @ F.normalize(gallery, dim=1).T
    found = []
    for label, score in zip(labels, scores):
        hits = (labels[score.argsort(descending=True)] == label).float()
        precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
        found.append((precision * hits).sum() / hits.sum())
    return float(torch.stack(found).mean())


def test_pixels_retrieve_next_to_nothing(toy):
    photos, sketches = toy
    grey = photos.images().mean(1).flatten(1)
    assert mean_ap(sketches.images().flatten(1), grey, photos.labels) < 0.1 + 0.08


@pytest.mark.parametrize(
    "wrong, says",
    [
        (dict(n=0), "n >= 1"),
        (dict(size=20), "28 to 224"),
        (dict(size=300), "28 to 224"),
        (dict(split="val"), "'train' and 'test'"),
        (dict(classes=["dragon"]), "dragon"),
        (dict(seed=-1), "seed >= 0"),
    ],
)
def test_what_the_toy_set_has_not_is_refused(wrong, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        toy_pairs(**{"n": 2, **wrong})


def test_training_images_obey_the_data_free_law():
    with data_free():
        toy_pairs(2, 28, split="test")
        with pytest.raises(DataFreeViolation):
            toy_pairs(2, 28)
