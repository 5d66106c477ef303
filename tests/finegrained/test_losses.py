"""Triplets and distances against slow loops."""

import math

import pytest
import torch
import torch.nn.functional as F

from dfsbir.finegrained.losses import HigherOrder, triplet_loss


def unit(*shape):
    return F.normalize(torch.randn(*shape), dim=1)


def mean_of_active(terms):
    active = [float(term) for term in terms if term > 0]
    return sum(active) / len(active)


@pytest.mark.parametrize("margin", (0.0, 0.3, 2.0))
def test_triplet_loss_slowly(margin):
    torch.manual_seed(1)
    a, b = torch.randn(5, 6), torch.randn(7, 6)
    ids, other = torch.arange(5), torch.tensor([0, 1, 2, 3, 4, 1, 9])
    distance = torch.cdist(F.normalize(a, dim=1), F.normalize(b, dim=1))
    terms = [
        margin + distance[i, j] - distance[i, k]
        for i in range(5)
        for j in range(7)
        for k in range(7)
        if other[j] == ids[i] and other[k] != ids[i]
    ]
    loss = triplet_loss(a, b, ids, other, margin)
    assert loss.item() == pytest.approx(mean_of_active(terms), abs=1e-4)


def test_both_sides_may_have_one_tensor_of_ids():
    "The library takes the same tensor to mean the same set, and finds no positive in it."
    torch.manual_seed(2)
    a, b, ids = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6), torch.arange(4)
    loss = triplet_loss(a, b, ids, ids, 0.5)
    assert loss.item() == pytest.approx(triplet_loss(a, b, ids, ids.clone(), 0.5).item())
    assert loss > 0.1
    loss.backward()
    assert a.grad.abs().sum() > 0


def test_a_perfect_embedding_costs_nothing():
    torch.manual_seed(2)
    b, ids = torch.randn(4, 6), torch.arange(4)
    assert triplet_loss(b, b, ids, ids, 0.01).item() == 0


def test_batch_hard_slowly():
    torch.manual_seed(3)
    a, b, ids = unit(5, 6), unit(5, 6), torch.arange(5)
    d = torch.cdist(a, b)
    terms = [d[i, i] - min(d[i, k] for k in range(5) if k != i) + 1.0 for i in range(5)]
    loss = triplet_loss(a, b, ids, ids, 1.0, "batch-hard")
    assert loss.item() == pytest.approx(mean_of_active(terms), abs=1e-4)


def test_an_unknown_miner_is_refused():
    with pytest.raises(ValueError, match="'soft'"):
        triplet_loss(unit(2, 3), unit(2, 3), torch.arange(2), torch.arange(2), 1.0, "soft")


@pytest.fixture
def higher_order():
    "(distance with random weights, sketches, photos, their distances by a slow loop)."
    torch.manual_seed(6)
    distance, sketches, photos = HigherOrder(3), unit(4, 3), unit(5, 3)
    with torch.no_grad():
        distance.offset.normal_()
    w = distance.weight.detach()
    slow = torch.zeros(4, 5)
    for row, s in enumerate(sketches):
        for column, p in enumerate(photos):
            squares = [w[i, j] * (s[i] - p[j]) ** 2 for i in range(3) for j in range(3)]
            slow[row, column] = math.sqrt(sum(squares))
    return distance, sketches, photos, slow


def test_higher_order_starts_as_the_euclidean_distance():
    s, p = unit(4, 3), unit(5, 3)
    assert torch.allclose(HigherOrder(3).pairwise(s, p), torch.cdist(s, p), atol=1e-3)


def test_higher_order_slowly(higher_order):
    distance, sketches, photos, slow = higher_order
    assert torch.allclose(distance.pairwise(sketches, photos), slow, atol=1e-4)


def test_an_inner_product_ranks_as_the_higher_order_distance(higher_order):
    distance, sketches, photos, slow = higher_order
    scores = distance.query(sketches) @ distance.gallery(photos).T
    assert (scores.argsort(1, descending=True) == slow.argsort(1)).all()


def test_triplets_of_the_higher_order_distance(higher_order):
    distance, sketches, photos, slow = higher_order
    ids = torch.arange(4)
    loss = triplet_loss(sketches, photos[:4], ids, ids, 0.5, metric=distance.metric())
    terms = [0.5 + slow[i, i] - slow[i, k] for i in range(4) for k in range(4) if i != k]
    assert loss.item() == pytest.approx(mean_of_active(terms), abs=1e-4)
    loss.backward()
    assert distance.offset.grad.abs().sum() > 0
