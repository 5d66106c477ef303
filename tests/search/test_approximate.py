"""Approximate indexes: the recall that is reported is the recall that a search has."""

import sys

import pytest
import torch
import torch.nn.functional as F

from dfsbir.search.approximate import INDEX_KINDS, ApproximateIndex
from dfsbir.search.exact import nearest
from dfsbir.search.gallery import write_parquet


def unit_vectors(n, seed, dim=12):
    return F.normalize(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.mark.parametrize("kind", INDEX_KINDS)
def test_the_recall_is_what_a_search_finds(kind):
    pytest.importorskip("faiss", reason="faiss is not installed (extra: search)")
    vectors, queries = unit_vectors(3000, 0), unit_vectors(100, 1)
    exact = nearest(queries, vectors, 10)[1].tolist()
    index, efforts = ApproximateIndex.build(vectors, kind), []
    for recall in (0.5, 0.9, 1.0):
        index.tune(vectors, queries, recall)
        scores, places = index.search(queries, 10, vectors)
        found = sum(len(set(a) & set(b)) for a, b in zip(places.tolist(), exact)) / 1000
        assert index.recall >= recall and found == pytest.approx(index.recall, abs=1e-3)
        assert index.summary()["recall@10"] == pytest.approx(index.recall, abs=1e-4)
        assert index.summary()["queries"] == 100 and (scores.diff(dim=1) <= 0).all()
        efforts.append(index.effort)
    assert efforts == sorted(efforts)
    again = ApproximateIndex.from_state(*index.to_state())
    assert again.summary() == index.summary()
    assert torch.equal(again.search(queries, 10, vectors)[1], places)


@pytest.mark.parametrize("kind", INDEX_KINDS)
@pytest.mark.parametrize("n", [1, 3, 39, 80])
def test_small_galleries_have_indexes_too(kind, n):
    pytest.importorskip("faiss", reason="faiss is not installed (extra: search)")
    vectors = unit_vectors(n, 0)
    index = ApproximateIndex.build(vectors, kind)
    assert index.tune(vectors, vectors, 1.0) == 1
    k = min(n, 5)
    assert torch.equal(index.search(vectors, k, vectors)[1], nearest(vectors, vectors, k)[1])


def test_few_in_a_cell_are_completed_exactly():
    pytest.importorskip("faiss", reason="faiss is not installed (extra: search)")
    vectors = unit_vectors(2000, 0, dim=4)
    index = ApproximateIndex.build(vectors, "ivf")
    index.effort = 1
    assert torch.equal(
        index.search(vectors[:5], 900, vectors)[1], nearest(vectors[:5], vectors, 900)[1]
    )


def test_mistakes():
    pytest.importorskip("faiss", reason="faiss is not installed (extra: search)")
    vectors = unit_vectors(50, 0)
    with pytest.raises(ValueError, match="lsh"):
        ApproximateIndex.build(vectors, "lsh")
    for recall in (0, 1.1):
        with pytest.raises(ValueError, match=str(recall)):
            ApproximateIndex.build(vectors).tune(vectors, vectors, recall)


@pytest.mark.parametrize("module", ["faiss", "pyarrow"])
def test_a_missing_extra_is_named(module, gallery, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    act = gallery.add_index if module == "faiss" else lambda: write_parquet(gallery, "x.parquet")
    with pytest.raises(ImportError, match=r"dfsbir\[search\]"):
        act()
