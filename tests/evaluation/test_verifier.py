"The verifier: shares, distances and neighbours against slow loops, and what it refuses."

import json
import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from dfsbir.core.data_guard import DataFreeViolation, data_free
from dfsbir.data.toy import toy_pairs
from dfsbir.evaluation.verifier import (
    class_distances,
    features_and_logits,
    mean_distance,
    verify,
)


class Output(NamedTuple):
    features: torch.Tensor
    logits: torch.Tensor


class Colours(nn.Module):
    "Features are mean colours; the class is the strongest of three."

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        colour = self.drop(x.mean((2, 3)))
        return Output(colour, 10 * colour)


class Real:
    "Real images with labels, as an image set has them."

    def __init__(self, images, labels):
        self.stored, self.labels = images, labels

    def __len__(self):
        return len(self.stored)

    def __getitem__(self, i):
        return self.stored[i], self.labels[i]

    def loader(self, batch_size, workers=None):
        return DataLoader(self, batch_size)


NAMES = ["red", "green", "blue"]


def coloured(labels, seed, noise=0.3):
    "Images in the colour of their class, and some noise."
    make = torch.Generator().manual_seed(seed)
    base = F.one_hot(labels, 3).float()[:, :, None, None] * 0.5
    return (base + noise * torch.rand(len(labels), 3, 1, 1, generator=make)).expand(-1, -1, 4, 4)


@pytest.fixture
def judged():
    "A verification of 11 estimates, of which two are of another colour, by 20 real images."
    labels, real_labels = torch.arange(11) % 3, torch.arange(20) % 3
    shown = labels.clone()
    shown[[2, 5]] = 0
    estimates, real = coloured(shown, 0), Real(coloured(real_labels, 1), real_labels)
    return verify(Colours(), estimates, labels, real, NAMES, k=4), estimates, real


def cosine(a, b):
    return 1 - F.cosine_similarity(a, b, dim=0).item()


def test_distances_against_slow_loops():
    x = torch.randn(9, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.tensor([0, 1, 0, 1, 1, 0, 2, 0, 0])
    for label, found in enumerate(class_distances(x, y, 4)):
        rows = x[y == label]
        pairs = [cosine(a, b) for i, a in enumerate(rows) for b in rows[:i]]
        if pairs:
            assert found == pytest.approx(sum(pairs) / len(pairs), rel=1e-9)
        else:
            assert math.isnan(found)
    assert mean_distance(torch.tensor([[1.0, 0], [-1.0, 0]])) == pytest.approx(2)
    assert mean_distance(torch.tensor([[1.0, 0], [3.0, 0]])) == pytest.approx(0)


def test_shares_and_neighbours_against_slow_loops(judged):
    found, estimates, real = judged
    means, real_means = estimates.mean((2, 3)), real.stored.mean((2, 3))
    wrong = [i for i in range(11) if i not in found.recognised.nonzero().flatten().tolist()]
    assert wrong == [2, 5] and found.share == pytest.approx(9 / 11)
    assert found.ceiling == 1 and found.floor == pytest.approx(1 / 3)
    for i in range(11):
        distances = [cosine(means[i], other) for other in real_means]
        order = sorted(range(20), key=distances.__getitem__)
        assert found.neighbours[i].tolist() == order[:4]
        assert found.distance[i].item() == pytest.approx(min(distances), abs=1e-6)
    for j in range(20):
        others = [cosine(real_means[j], x) for i, x in enumerate(real_means) if i != j]
        assert found.real_distance[j].item() == pytest.approx(min(others), abs=1e-6)


def test_tables_say_the_same(judged):
    found, *_ = judged
    about = json.loads(json.dumps(found.as_dict()))
    assert about["recognised"] == found.share and about["estimates"] == 11 and about["real"] == 20
    assert list(about["per_class"]) == NAMES
    assert about["per_class"]["green"]["recognised"] == 1
    assert about["per_class"]["blue"]["recognised"] == pytest.approx(1 / 3)
    text = found._repr_markdown_()
    for name, row in about["per_class"].items():
        assert f"| {name} | {row['recognised']:.2f} ({row['real_recognised']:.2f})" in text
    assert f"{found.share:.3f}" in text and f"{found.share:.3f}" in repr(found)


def test_a_collapsed_class_is_seen(judged):
    _, _, real = judged
    labels = torch.arange(12) % 3
    one = verify(Colours(), coloured(labels, 3, noise=0.0), labels, real, NAMES)
    assert one.share == 1 and max(one.spread) < 1e-6 < min(one.real_spread)


def test_the_net_is_evaluated_and_left_as_it_was():
    net, x = Colours(), torch.rand(7, 3, 4, 4)
    features, logits = features_and_logits(net, x, batch_size=3)
    assert torch.equal(logits, 10 * features), "dropout was off"
    torch.testing.assert_close(features, x.mean((2, 3)))
    assert net.training and net.drop.training
    net.eval()
    features_and_logits(net, x)
    assert not net.training and not net.drop.training


def test_an_image_set_of_the_toy_set():
    photos, _ = toy_pairs(30, size=28, seed=0, split="test")
    labels = torch.tensor([0, 1, 2])
    one = verify(Colours(), photos.images()[:3], labels, photos.take(torch.arange(3)), NAMES, k=9)
    assert one.neighbours.shape == (3, 3)
    assert one.neighbours[:, 0].tolist() == [0, 1, 2] and one.distance.abs().max() < 1e-6


def test_pictures_of_neighbours(judged):
    found, estimates, real = judged
    fig = found.show_neighbours(estimates, real, [0, 2])
    assert len(fig.axes) == 2 * 5
    frames = [ax.spines["top"].get_linestyle() for ax in fig.axes[6:10]]
    same = real.labels[found.neighbours[2]] == found.labels[2]
    assert [frame == "-" for frame in frames] == same.tolist()


def test_it_is_refused_while_the_law_holds(judged):
    found, estimates, real = judged
    with data_free(), pytest.raises(DataFreeViolation):
        verify(Colours(), estimates, found.labels, real, NAMES)


@pytest.mark.parametrize(
    "labels, real, classes, match",
    [
        (torch.zeros(3).long(), 20, NAMES, r"\(3,\) for 11"),
        (torch.zeros(11).long(), 1, NAMES, "1 real images"),
        (torch.zeros(11).long(), 20, ["red"], "3 outputs for 1"),
    ],
)
def test_what_does_not_fit_is_named(judged, labels, real, classes, match):
    _, estimates, every = judged
    some = Real(every.stored[:real], every.labels[:real])
    with pytest.raises(ValueError, match=match):
        verify(Colours(), estimates, labels, some, classes)
