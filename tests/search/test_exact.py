"""Exact search: equal to sorting everything, ties included, and to faiss' flat index."""

import numpy as np
import pytest
import torch

from dfsbir.evaluation.retrieval import rank_topk
from dfsbir.search.exact import nearest


@pytest.mark.parametrize("n, k", [(1, 1), (40, 40), (500, 7)])
def test_nearest_is_the_exact_ranking_with_ties_in_order(n, k):
    torch.manual_seed(0)
    cases = [
        (torch.randn(9, 6), torch.randn(n, 6)),
        (torch.randn(9, 3).round(), torch.randn(n, 3).round()),
        (torch.zeros(2, 3), torch.randn(n, 3)),
    ]
    for queries, vectors in cases:
        scores, places = nearest(queries, vectors, k)
        wanted, order = rank_topk(queries, vectors, k)
        assert torch.equal(places, order)
        torch.testing.assert_close(scores, wanted)


def test_nearest_is_faiss_flat():
    faiss = pytest.importorskip("faiss", reason="faiss is not installed (extra: search)")
    torch.manual_seed(0)
    queries, vectors = torch.randn(30, 16), torch.randn(2000, 16)
    flat = faiss.IndexFlatIP(16)
    flat.add(vectors.numpy())
    scores, places = flat.search(queries.numpy(), 20)
    our_scores, our_places = nearest(queries, vectors, 20)
    assert np.array_equal(our_places.numpy(), places)
    np.testing.assert_allclose(our_scores.numpy(), scores, rtol=1e-5, atol=1e-5)


def test_nearest_in_chunks_is_nearest_one_by_one():
    torch.manual_seed(0)
    queries, vectors = torch.randn(7, 4), torch.randn(2**20, 4)  # four queries a chunk
    one_by_one = torch.cat([nearest(row[None], vectors, 3)[1] for row in queries])
    assert torch.equal(nearest(queries, vectors, 3)[1], one_by_one)


@pytest.mark.parametrize("n, dim", [(27, 12), (1000, 16), (1001, 64), (4099, 300)])
@pytest.mark.parametrize("offset", [0, 1, 2])
def test_copies_have_equal_scores_wherever_they_lie(n, dim, offset):
    "In the matrix, and in memory; also where more copies than k are the best."
    torch.manual_seed(n)
    vectors = torch.empty(n * dim + offset)[offset:].view(n, dim).copy_(torch.randn(n, dim))
    copies = sorted({0, 5, n // 2, n - 2, n - 1})
    vectors[copies] = vectors[5].clone()
    for k in (1, 3, len(copies), len(copies) + 2):
        scores, places = nearest(vectors[5:6], vectors, k)
        shown = min(k, len(copies))
        assert places[0, :shown].tolist() == copies[:shown]
        assert len(scores[0, :shown].unique()) == 1
