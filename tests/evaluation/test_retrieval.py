"Ranks, average precision and ties against slow loops; chunks; chance; Acc@q; embedding."

import gc
import itertools
import random
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from dfsbir.data.toy import toy_pairs
from dfsbir.evaluation import retrieval
from dfsbir.evaluation.retrieval import (
    RelevantRanks,
    accuracy_at,
    average_precision,
    chance_ap,
    embed,
    rank_topk,
    score_chunks,
    stable_topk,
)


def ranks_of(q, g, yq, yg):
    return RelevantRanks.of(q @ g.T, yq, yg)


# ---- the order


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("k", [1, 7, 57])
def test_topk_equals_a_stable_sort(problem, ties, negative, k):
    q, g, *_ = problem(3, ties=ties, negative=negative)
    scores, order = rank_topk(q, g, k)
    whole = (q @ g.T).sort(dim=1, descending=True, stable=True)
    assert torch.equal(scores, whole.values[:, :k])
    assert torch.equal(order, whole.indices[:, :k])


def test_ties_stand_in_gallery_order():
    q, g = torch.ones(1, 2), torch.ones(300, 2)  # enough for an unstable sort to show itself
    assert rank_topk(q, g, 300)[1].tolist() == [list(range(300))]
    zeros = torch.tensor([[0.0, -1], [-0.0, -1], [0.0, -1]])  # -0 is 0
    assert rank_topk(q, zeros, 3)[1].tolist() == [[0, 1, 2]]
    assert stable_topk(torch.tensor([[0.0, -0.0, 0.0]]), 2)[1].tolist() == [[0, 1]]


@pytest.mark.parametrize("size", [1, 57, 61, 1003])
@pytest.mark.parametrize("dim", [3, 64, 512])
def test_equal_vectors_have_equal_scores(size, dim):
    "A matrix product alone would add up the last columns in another order."
    make = torch.Generator().manual_seed(size)
    q, g = torch.randn(5, dim, generator=make), torch.randn(1, dim, generator=make)
    gallery = torch.cat([g.expand(size, dim), torch.randn(20, dim, generator=make)])
    gallery = gallery[torch.randperm(len(gallery), generator=make)]
    same = (gallery == g).all(1)
    for queries in (q[:1], q):
        for _, scores in score_chunks(queries, gallery):
            assert (scores[:, same] == scores[:, same][:, :1]).all()
            torch.testing.assert_close(scores, queries @ gallery.T, rtol=1e-4, atol=1e-4)


def test_never_holds_queries_by_gallery(problem, monkeypatch):
    monkeypatch.setattr(retrieval, "CHUNK_SCORES", 150)
    q, g, *_ = problem(0, queries=40, gallery=57)
    chunks = list(score_chunks(q, g))
    assert max(scores.numel() for _, scores in chunks) <= 150 and len(chunks) == 20
    small = rank_topk(q, g, 9)
    monkeypatch.undo()
    assert all(torch.equal(a, b) for a, b in zip(small, rank_topk(q, g, 9)))


def test_what_is_kept_of_a_chunk_is_not_the_chunk(problem, monkeypatch):
    "A slice of a sorted chunk keeps the whole chunk alive, and chunk by chunk the whole matrix."
    held, chunks = [], score_chunks

    def counted(*args):
        for part in chunks(*args):
            if part[0].start in (0, 360):  # the first chunk and the last
                tensors = [t for t in gc.get_objects() if type(t) is torch.Tensor]
                storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
                held.append(sum(s.nbytes() for s in storages.values()))
            yield part

    monkeypatch.setattr(retrieval, "CHUNK_SCORES", 20_000)
    monkeypatch.setattr(retrieval, "score_chunks", counted)
    rank_topk(*problem(0, queries=400, gallery=500)[:2], 5)
    assert len(held) == 2 and held[1] - held[0] < 500_000  # all scores with their order: 2.4 MB


def test_ranks_in_float32_under_autocast_and_from_half_precision():
    g = torch.linspace(0.9, 1, 200)[:, None]  # 200 scores that bfloat16 would merge into a few
    q = torch.ones(1, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        order = rank_topk(q, g, 200)[1]
    assert order[0].tolist() == list(range(199, -1, -1))
    assert rank_topk(q.bfloat16(), g.bfloat16(), 3)[0].dtype == torch.float32


# ---- average precision and ties


def orders_of(scores):
    "Every order of the photos in which scores fall."
    groups = [
        list(itertools.permutations(group))
        for _, group in itertools.groupby(
            sorted(range(len(scores)), key=lambda i: -scores[i]), key=lambda i: scores[i]
        )
    ]
    for choice in itertools.product(*groups):
        yield list(itertools.chain(*choice))


def exact_ap(hits, k):
    "Average precision of one order, in exact fractions."
    found, total = 0, Fraction(0)
    for rank, hit in enumerate(hits, 1):
        found += hit
        if hit and rank <= k:
            total += Fraction(found, rank)
    return total / min(found, k)


def mean_over_orders(scores, relevant, k):
    "AP@k and hits within k, in the mean over all orders."
    orders = [[bool(relevant[i]) for i in order] for order in orders_of(scores)]
    ap = sum(exact_ap(hits, k) for hits in orders) / len(orders)
    return float(ap), float(Fraction(sum(sum(hits[:k]) for hits in orders), len(orders)))


@pytest.mark.parametrize("k", [1, 2, 3, 4, 6, 9])
@pytest.mark.parametrize("seed", range(25))
def test_ties_equal_the_mean_over_all_permutations(seed, k):
    make = random.Random(seed)
    scores = [float(make.randint(0, make.choice([1, 2, 5]))) for _ in range(6)]
    relevant = [make.random() < 0.5 for _ in range(6)]
    relevant[make.randrange(6)] = True
    ranks = RelevantRanks.of(torch.tensor([scores]), torch.tensor([1]), torch.tensor(relevant) * 1)
    ap, within = mean_over_orders(scores, relevant, k)
    assert ranks.average_precision(k).item() == pytest.approx(ap, rel=1e-12)
    assert ranks.hits_within(k).item() == pytest.approx(within, rel=1e-12)
    if k >= 6:
        assert ranks.average_precision().item() == pytest.approx(ap, rel=1e-12)
    counts = [scores.count(s) for s in scores]
    assert ranks.tied_share.item() == pytest.approx(sum(c > 1 for c in counts) / 6)


def slow_tied_ap(scores, relevant, k):
    "The sum over groups and places of McSherry and Najork, in plain loops."
    total, above, relevant_above = 0.0, 0, 0
    for score in sorted(set(scores), reverse=True):
        group = [relevant[i] for i, s in enumerate(scores) if s == score]
        t, r = len(group), sum(group)
        for i in range(1, t + 1):
            if above + i <= k and r:
                earlier = (i - 1) * (r - 1) / (t - 1) if t > 1 else 0
                total += r / t * (relevant_above + 1 + earlier) / (above + i)
        above, relevant_above = above + t, relevant_above + r
    return total / min(sum(relevant), k)


@pytest.mark.parametrize("levels", [1, 3, 20, 10**6])
@pytest.mark.parametrize("k", [None, 1, 13, 200])
def test_ties_equal_slow_loops_over_groups(levels, k):
    make = torch.Generator().manual_seed(levels)
    scores = torch.randint(levels, (30, 150), generator=make).float() - levels / 2
    yq, yg = torch.arange(30) % 6, torch.randint(6, (150,), generator=make)
    ours = RelevantRanks.of(scores, yq, yg).average_precision(k)
    for row, label, ap in zip(scores.tolist(), yq.tolist(), ours.tolist()):
        assert ap == pytest.approx(slow_tied_ap(row, (yg == label).tolist(), k or 150), rel=1e-12)


@pytest.mark.parametrize("k", [None, 1, 10, 100])
def test_without_ties_it_is_the_usual_average_precision(k):
    make = torch.Generator().manual_seed(0)
    scores = torch.stack([torch.randperm(500, generator=make) for _ in range(40)]).float() - 250
    yq, yg = torch.arange(40) % 5, torch.randint(7, (500,), generator=make)
    ranks = RelevantRanks.of(scores, yq, yg)
    hits = (yg == yq[:, None]).gather(1, scores.sort(dim=1, descending=True).indices)
    torch.testing.assert_close(
        ranks.average_precision(k), average_precision(hits, k), rtol=1e-14, atol=0
    )
    assert torch.equal(ranks.hits_within(k or 500), hits[:, :k].sum(1).double())
    assert (ranks.tied_share == 0).all()


@pytest.mark.parametrize("size, dim", [(7, 2), (60, 64), (1003, 128)])
@pytest.mark.parametrize("k", [None, 5])
def test_a_collapsed_encoder_comes_to_the_floor(size, dim, k):
    "Whatever the gallery's order: here it is sorted by class, the worst case."
    yg = torch.arange(size) * 6 // size
    vector = torch.randn(1, dim, generator=torch.Generator().manual_seed(1))
    ((_, scores),) = score_chunks(vector.expand(6, -1), vector.expand(size, -1))
    ranks = RelevantRanks.of(scores, torch.arange(6), yg)
    torch.testing.assert_close(ranks.average_precision(k), chance_ap(ranks.relevant, size, k))
    assert (ranks.tied_share == 1).all()


def test_the_order_of_the_gallery_does_not_matter(problem):
    q, g, yq, yg = problem(9, ties=True)
    order = torch.randperm(len(g), generator=torch.Generator().manual_seed(2))
    one, other = ranks_of(q, g, yq, yg), ranks_of(q, g[order], yq, yg[order])
    assert torch.equal(one.average_precision(), other.average_precision())
    assert torch.equal(one.hits_within(10), other.hits_within(10))


def test_map_equals_scikit_learn_where_no_two_scores_are_equal(problem):
    sklearn = pytest.importorskip("sklearn.metrics")
    for negative in (False, True):
        q, g, yq, yg = problem(3, negative=negative)
        scores = (q @ g.T).double().numpy()
        assert all(len(set(s)) == len(s) for s in scores)
        want = [sklearn.average_precision_score((yg == c).numpy(), s) for c, s in zip(yq, scores)]
        found = ranks_of(q, g, yq, yg).average_precision()
        np.testing.assert_allclose(found.numpy(), want, rtol=1e-9)


def test_a_query_without_a_relevant_photo_has_no_ap(problem):
    q, g, yq, yg = problem(1)
    yq[::5] = 99
    ranks = ranks_of(q, g, yq, yg)
    assert ranks.average_precision().isnan().tolist() == (yq == 99).tolist()
    assert (ranks.hits_within(5)[yq == 99] == 0).all() and (ranks.relevant[yq == 99] == 0).all()
    nobody = ranks_of(q, g, yq + 100, yg)
    assert nobody.average_precision().isnan().all() and (nobody.hits_within(9) == 0).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_ranks_as_the_cpu_does(problem):
    data = problem(5, queries=300, gallery=2000, ties=True)
    there = [x.to("cuda") for x in data]
    assert torch.equal(rank_topk(*there[:2], 50)[1].cpu(), rank_topk(*data[:2], 50)[1])
    torch.testing.assert_close(
        ranks_of(*there).average_precision().cpu(), ranks_of(*data).average_precision()
    )


@pytest.mark.parametrize("size, R", [(1, 1), (4, 1), (5, 2), (6, 6), (6, 3)])
@pytest.mark.parametrize("k", [None, 1, 3, 50])
def test_chance_equals_the_mean_over_all_orders(size, R, k):
    places = list(itertools.combinations(range(size), R))
    hits = torch.tensor([[i in chosen for i in range(size)] for chosen in places])
    mean = average_precision(hits, k).mean().item()
    assert chance_ap(torch.tensor([R]), size, k).item() == pytest.approx(mean, rel=1e-12)


# ---- Acc@q


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_accuracy_equals_a_slow_loop(problem, ties, chunk):
    q, g, *_ = problem(4, queries=60, gallery=60, ties=ties)
    make = random.Random(0)
    gallery_ids = make.sample(range(1000), 60)
    query_ids = make.choices(gallery_ids, k=60)  # several sketches of one photo

    def share(k):
        total = Fraction(0)
        for query, own in zip(q, query_ids):
            scores = (g @ query).tolist()
            score = scores[gallery_ids.index(own)]
            places = range(sum(s > score for s in scores), sum(s >= score for s in scores))
            total += Fraction(sum(place < k for place in places), len(places))
        return float(total / 60)

    ids = torch.tensor(query_ids), torch.tensor(gallery_ids)
    found = accuracy_at(q, g, *ids, ks=(1, 5, 10, 60), chunk=chunk)
    assert found == {f"Acc@{k}": pytest.approx(share(k), rel=1e-12) for k in (1, 5, 10, 60)}


# ---- wrong input


@pytest.mark.parametrize(
    "call, match",
    [
        (lambda: rank_topk(torch.ones(2, 3), torch.ones(4, 2), 1), "3 dimensions"),
        (lambda: rank_topk(torch.ones(2, 3), torch.ones(0, 3), 1), "1 to 0"),
        (lambda: rank_topk(torch.ones(2, 3), torch.ones(4, 3), 0), "1 to 4"),
        (lambda: rank_topk(torch.ones(2, 3), torch.ones(4, 3), 1, chunk=0), "chunk is 0"),
        (lambda: rank_topk(torch.full((2, 3), torch.inf), torch.ones(4, 3), 1), "2 of 2 queries"),
        (lambda: rank_topk(torch.ones(3), torch.ones(4, 3), 1), r"queries have shape \(3,\)"),
        (lambda: average_precision(torch.ones(2, 3)), "float32"),
        (
            lambda: accuracy_at(
                torch.ones(2, 3), torch.ones(2, 3), torch.tensor([0, 1]), torch.tensor([1, 1])
            ),
            "1 gallery photos repeat",
        ),
        (
            lambda: accuracy_at(
                torch.ones(2, 3), torch.ones(2, 3), torch.tensor([0, 2]), torch.tensor([0, 1])
            ),
            "1 of 2 queries",
        ),
        (
            lambda: accuracy_at(torch.ones(2, 3), torch.ones(2, 3), torch.zeros(3), torch.zeros(2)),
            "query_labels",
        ),
        (lambda: embed(nn.Identity(), torch.ones(0, 3, 4, 4)), "empty"),
    ],
)
def test_wrong_input_says_what_was_found(call, match):
    with pytest.raises(ValueError, match=match):
        call()


# ---- embedding


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn, self.drop = nn.BatchNorm1d(3), nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.bn(x.mean((2, 3)))).bfloat16()


def test_embed_leaves_the_encoder_as_it_was_and_keeps_the_order():
    net, x = Net(), torch.rand(11, 3, 4, 4)
    net.drop.eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    vectors = embed(net, x, batch_size=4)
    assert net.training and not net.drop.training and vectors.dtype == torch.float32
    assert not vectors.requires_grad and not vectors.is_inference()
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    torch.testing.assert_close(vectors, x.mean((2, 3)), atol=0.01, rtol=0.01)
    net.eval()
    embed(net, x)
    assert not net.training


def test_embed_restores_the_mode_when_the_encoder_fails():
    net = Net()
    with pytest.raises(RuntimeError):
        embed(net, torch.rand(4, 5, 4, 4))
    assert net.training


def test_embed_of_an_image_set_equals_that_of_its_tensor():
    photos, _ = toy_pairs(20, size=28, seed=3, split="test")

    def some_pixels(x):
        return x.flatten(1)[:, ::97]

    vectors = embed(some_pixels, photos, batch_size=7)
    torch.testing.assert_close(vectors, some_pixels(photos.images()))
