"""Evaluation: oracles on ties, negative scores, single and no relevant photos; chunks; the results file; figures."""

import gc
import itertools
import math
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

from dfsbir.data.image_set import ImageSet
from dfsbir.data.toy import toy_pairs
from dfsbir.evaluation.report import evaluate_retrieval, released_protocol, show_topk
from dfsbir.evaluation.results import (
    METHODS,
    RESULT_COLUMNS,
    Table,
    append_results,
    read_results,
    results_table,
)
from dfsbir.evaluation.retrieval import (
    accuracy_at,
    average_precision,
    chance_ap,
    embed,
    rank_topk,
    ranked_chunks,
)


def problem(seed, queries=23, gallery=57, classes=4, dim=5, ties=False, negative=False):
    """Embeddings with integer entries (exact scores): many ties among few values, none among many."""
    make = torch.Generator().manual_seed(seed)
    top = 2 if ties else 10**3
    q, g = (
        torch.randint(-top, top + 1, (n, dim), generator=make).float() for n in (queries, gallery)
    )
    if negative:
        q, g = q.abs() + 1, -g.abs() - 1  # every score below zero
    yq, yg = (torch.randint(0, classes, (n,), generator=make) for n in (queries, gallery))
    return q, g, yq, yg


def slow_ranks(scores, relevant):
    """Ranks of the relevant photos, best first, ties in gallery order, in plain Python."""
    ranking = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    return [rank for rank, i in enumerate(ranking, 1) if relevant[i]]


def slow(q, g, yq, yg, ks):
    """mAP@all, Prec@k and mAP@k/min(R,k) of queries with a relevant photo, from the definitions."""
    ranks = [slow_ranks((g @ a).tolist(), (yg == c).tolist()) for a, c in zip(q, yq)]
    ranks = [r for r in ranks if r]
    mean = lambda values: sum(values) / len(ranks)
    ap = lambda r, k: sum(j / x for j, x in enumerate(r, 1) if x <= k) / min(len(r), k)
    out = {"mAP@all": mean([ap(r, len(g)) for r in ranks])}
    out |= {f"Prec@{k}": mean([sum(x <= k for x in r) / k for r in ranks]) for k in ks}
    return out | {f"mAP@{max(ks)}/min(R,{max(ks)})": mean([ap(r, max(ks)) for r in ranks])}


CASES = {
    "plain": {},
    "ties": {"ties": True},
    "negative": {"negative": True},
    "negative ties": {"ties": True, "negative": True},
    "one query": {"queries": 1},
    "one photo": {"gallery": 1, "classes": 1},
    "one class": {"classes": 1},
    "many classes": {"classes": 50},
    "1-d": {"dim": 1, "ties": True},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("chunk", [1, 5, 256])
def test_metrics_equal_slow_loops(case, chunk):
    data = problem(len(case), **CASES[case])
    report = evaluate_retrieval(*data, ks=(1, 10, 30), chunk=chunk)
    assert report.metrics == pytest.approx(slow(*data, (1, 10, 30)), abs=1e-12)


@pytest.mark.parametrize("negative", [False, True])
def test_map_equals_scikit_learn_where_no_two_scores_are_equal(negative):
    sklearn = pytest.importorskip("sklearn.metrics")
    q, g, yq, yg = problem(3, negative=negative)
    scores = (q @ g.T).double().numpy()
    assert all(len(set(s)) == len(s) for s in scores)
    want = [sklearn.average_precision_score((yg == c).numpy(), s) for c, s in zip(yq, scores)]
    report = evaluate_retrieval(q, g, yq, yg)
    np.testing.assert_allclose(report.ap.numpy(), want, rtol=1e-9)


def test_single_relevant_photo_gives_the_reciprocal_rank():
    q, g = torch.tensor([[1.0]]), torch.tensor([[5.0], [4], [3], [2]])
    for place in range(4):
        yg = torch.ones(4, dtype=torch.long)
        yg[place] = 0
        report = evaluate_retrieval(q, g, torch.tensor([0]), yg, ks=(2,))
        assert report.metrics["mAP@all"] == pytest.approx(1 / (place + 1))
        assert report.metrics["Prec@2"] == (0.5 if place < 2 else 0)


def test_ties_stand_in_gallery_order():
    q, g = (
        torch.ones(1, 2),
        torch.ones(300, 2),
    )  # long enough for a sort that is not stable to show itself
    assert rank_topk(q, g, 300)[1].tolist() == [list(range(300))]
    yg = torch.zeros(300, dtype=torch.long)
    yg[7] = 1
    assert evaluate_retrieval(q, g, torch.tensor([1]), yg).metrics["mAP@all"] == pytest.approx(
        1 / 8
    )
    assert rank_topk(q, torch.tensor([[0.0, -1], [-0.0, -1], [0.0, -1]]), 3)[1].tolist() == [
        [0, 1, 2]
    ]  # -0 is 0


def test_queries_without_a_relevant_photo_are_left_out_and_counted():
    q, g, yq, yg = problem(1, classes=3)
    yq[::5] = 99
    report = evaluate_retrieval(q, g, yq, yg, ks=(10,))
    kept = yq != 99
    assert report.metrics == pytest.approx(
        evaluate_retrieval(q[kept], g, yq[kept], yg, ks=(10,)).metrics, abs=1e-12
    )
    assert (
        report.ap.isnan().tolist() == (~kept).tolist()
        and "5 queries without" in report._repr_markdown_()
        and "99" not in report.per_class()
    )
    assert released_protocol(q, g, yq, yg)["mAP@all"] == pytest.approx(
        report.metrics["mAP@all"], abs=1e-12
    )
    for f in (evaluate_retrieval, released_protocol):
        with pytest.raises(ValueError, match="no query has a relevant"):
            f(q, g, yq + 100, yg)


def test_precision_divides_by_k_even_beyond_the_gallery():
    q, g, yq, yg = problem(2, gallery=12, classes=2)
    report = evaluate_retrieval(q, g, yq, yg, ks=(5, 100))
    R = torch.tensor([(yg == c).sum() for c in yq])
    assert (
        report.metrics["Prec@100"]
        == pytest.approx((R / 100).mean().item())
        == report.ceiling["Prec@100"]
        == report.floor["Prec@100"]
    )
    assert f"R_min {R.min()}, R_max {R.max()}" in report._repr_markdown_()
    assert report.topk.shape == (23, 12)


@pytest.mark.parametrize("size, R", [(1, 1), (4, 1), (5, 2), (6, 6), (6, 3)])
@pytest.mark.parametrize("k", [None, 1, 3, 50])
def test_chance_equals_the_mean_over_all_orders(size, R, k):
    hits = torch.tensor(
        [[i in places for i in range(size)] for places in itertools.combinations(range(size), R)]
    )
    assert chance_ap(torch.tensor([R]), size, k).item() == pytest.approx(
        average_precision(hits, k).mean().item(), rel=1e-12
    )


def test_floor_and_ceiling_bracket_random_and_perfect_encoders():
    yq, yg = torch.arange(400) % 8, torch.arange(320) % 8
    random_ = evaluate_retrieval(
        torch.randn(400, 64, generator=torch.Generator().manual_seed(0)),
        torch.randn(320, 64, generator=torch.Generator().manual_seed(1)),
        yq,
        yg,
        ks=(20, 100),
    )
    assert random_.metrics == pytest.approx(random_.floor, abs=0.01)
    perfect = evaluate_retrieval(torch.eye(8)[yq], torch.eye(8)[yg], yq, yg, ks=(20, 100))
    assert perfect.metrics == pytest.approx(perfect.ceiling, abs=1e-9) and perfect.ceiling[
        "Prec@100"
    ] == pytest.approx(0.4)


def test_never_holds_queries_by_gallery(monkeypatch):
    monkeypatch.setattr("dfsbir.evaluation.retrieval.CHUNK_SCORES", 150)
    data = problem(0, queries=40, gallery=57)
    sizes = [s.numel() for _, s, _ in ranked_chunks(*data[:2], chunk=256)]
    assert max(sizes) <= 150 and len(sizes) == 20
    small = evaluate_retrieval(*data)
    monkeypatch.undo()
    whole = evaluate_retrieval(*data)
    assert small.metrics == whole.metrics and torch.equal(small.topk, whole.topk)


@pytest.mark.parametrize(
    "call",
    [
        lambda *d: evaluate_retrieval(*d, ks=(5,)),
        lambda *d: rank_topk(*d[:2], 5),
        released_protocol,
    ],
)
def test_what_is_kept_of_a_chunk_is_not_the_chunk(monkeypatch, call):
    """A slice of a sorted chunk keeps the whole chunk alive, and chunk by chunk the whole matrix: count the bytes that live tensors hold."""

    def held():
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in gc.get_objects()
            if type(t) is torch.Tensor
        }
        return sum(storages.values())

    seen, ranked = [], ranked_chunks

    def spy(*args):
        for part in ranked(*args):
            if part[0].start in (0, 360):
                seen.append(held())  # the first chunk and the last
            yield part

    monkeypatch.setattr("dfsbir.evaluation.retrieval.CHUNK_SCORES", 20_000)
    monkeypatch.setattr("dfsbir.evaluation.retrieval.ranked_chunks", spy)
    call(*problem(0, queries=400, gallery=500))
    assert len(seen) == 2 and seen[1] - seen[0] < 500_000  # the whole matrix with its order: 2.4 MB


def test_ranks_in_float32_under_autocast_and_from_half_precision():
    g = torch.linspace(0.9, 1, 200)[:, None]  # 200 scores that bfloat16 would merge into a few
    q = torch.ones(1, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        order = rank_topk(q, g, 200)[1]
    assert order[0].tolist() == list(range(199, -1, -1))
    assert rank_topk(q.bfloat16(), g.bfloat16(), 3)[0].dtype == torch.float32


@pytest.mark.parametrize(
    "call, match",
    [
        (lambda: rank_topk(torch.ones(2, 3), torch.ones(4, 2), 1), "one shared space"),
        (lambda: rank_topk(torch.ones(2, 3), torch.ones(0, 3), 1), "wanted 1 to 0"),
        (lambda: rank_topk(torch.ones(2, 3), torch.ones(4, 3), 0), "wanted 1 to 4"),
        (lambda: rank_topk(torch.ones(2, 3), torch.ones(4, 3), 1, chunk=0), "at least 1 query"),
        (
            lambda: rank_topk(torch.full((2, 3), torch.inf), torch.ones(4, 3), 1),
            "2 of 2 queries hold NaN",
        ),
        (
            lambda: evaluate_retrieval(
                torch.ones(2, 3), torch.ones(4, 3), torch.zeros(3), torch.zeros(4)
            ),
            "query_labels",
        ),
        (
            lambda: evaluate_retrieval(
                torch.ones(2, 3), torch.ones(4, 3), torch.zeros(2), torch.zeros(4), ks=()
            ),
            "at least one rank",
        ),
        (
            lambda: accuracy_at(
                torch.ones(2, 3), torch.ones(2, 3), torch.tensor([0, 1]), torch.tensor([1, 1])
            ),
            "repeat an instance",
        ),
        (
            lambda: accuracy_at(
                torch.ones(2, 3), torch.ones(2, 3), torch.tensor([0, 2]), torch.tensor([0, 1])
            ),
            "1 of 2 queries have no true photo",
        ),
        (lambda: embed(nn.Identity(), torch.ones(0, 3, 4, 4)), "empty"),
    ],
)
def test_wrong_input_says_what_was_found(call, match):
    with pytest.raises(ValueError, match=match):
        call()


@pytest.mark.parametrize("ties", [False, True])
def test_accuracy_equals_a_slow_loop(ties):
    q, g, *_ = problem(4, queries=60, gallery=60, ties=ties)
    make = random.Random(0)
    gallery_ids, query_ids = make.sample(range(1000), 60), None
    query_ids = make.choices(gallery_ids, k=60)  # several sketches of one photo
    ranks = [
        slow_ranks((g @ a).tolist(), [i == t for i in gallery_ids])[0] for a, t in zip(q, query_ids)
    ]
    for chunk in (1, 7, 100):
        got = accuracy_at(
            q, g, torch.tensor(query_ids), torch.tensor(gallery_ids), ks=(1, 5, 10, 60), chunk=chunk
        )
        assert got == {
            f"Acc@{k}": pytest.approx(sum(r <= k for r in ranks) / 60) for k in (1, 5, 10, 60)
        }


def test_released_protocol_by_hand():
    """Ten early hits, forty at the very end: the released reading sees only the early ones."""
    hits = [1, 1] * 5 + [0] * 150 + [1] * 40
    g = torch.arange(len(hits), 0, -1.0)[:, None]
    both = released_protocol(torch.ones(1, 1), g, torch.tensor([1]), torch.tensor(hits))
    ranks = [r for r, h in enumerate(hits, 1) if h]
    assert both == {
        "mAP@all": pytest.approx(sum(j / r for j, r in enumerate(ranks, 1)) / 50),
        "released protocol (to hit 10)": pytest.approx(1.0),
    }
    assert both["mAP@all"] < 0.4


def test_released_protocol_equals_the_standard_where_all_hits_are_few():
    q, g, yq, yg = problem(5, gallery=30, classes=8)
    assert torch.bincount(yg).max() <= 10
    both = list(released_protocol(q, g, yq, yg).values())
    assert both[0] == pytest.approx(both[1], abs=1e-12)


# embedding


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn, self.drop = nn.BatchNorm1d(3), nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.bn(x.mean((2, 3)))).bfloat16()


def test_embed_leaves_the_encoder_as_it_was_and_keeps_the_order():
    net, x = Net(), torch.rand(11, 3, 4, 4)
    net.drop.eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    e = embed(net, x, batch_size=4)
    assert (
        net.training and e.dtype == torch.float32 and not e.requires_grad and not e.is_inference()
    )
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    torch.testing.assert_close(e, x.mean((2, 3)), atol=0.01, rtol=0.01)
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
    f = lambda x: x.flatten(1)[:, ::97]
    torch.testing.assert_close(embed(f, photos, batch_size=7), f(photos.images()))


def test_toy_pixels_are_near_chance():
    photos, sketches = toy_pairs(100, size=28, seed=1, split="test")

    def pixels(x):
        v = nn.functional.interpolate(
            x.mean(1, keepdim=True), 14, mode="bilinear", antialias=True
        ).flatten(1)
        return nn.functional.normalize(v - v.mean(1, keepdim=True))

    report = evaluate_retrieval(
        embed(pixels, sketches),
        embed(pixels, photos),
        sketches.labels,
        photos.labels,
        classes=photos.classes,
    )
    assert report.metrics["mAP@all"] < report.floor["mAP@all"] + 0.12
    assert list(report.per_class()) == photos.classes


# pictures


def test_figures_show_what_the_report_holds():
    q, g, yq, yg = problem(6, classes=4)
    report = evaluate_retrieval(q, g, yq, yg, ks=(10,), classes=["ant", "bee", "cat", "dog"])
    by_class = report.per_class()
    assert sum(v * (yq == c).sum().item() for c, v in enumerate(by_class.values())) / len(
        yq
    ) == pytest.approx(report.metrics["mAP@all"])
    bars = report.figure().axes[0]
    assert sorted(p.get_width() for p in bars.patches) == pytest.approx(sorted(by_class.values()))
    fig = report.show_topk(torch.rand(23, 1, 8, 8), torch.rand(57, 3, 8, 8), rows=[0, 5], k=4)
    for row, i in enumerate([0, 5]):
        frames = [ax.spines["top"] for ax in fig.axes[5 * row + 1 : 5 * row + 5]]
        right = [yg[j] == yq[i] for j in report.topk[i, :4]]
        assert [f.get_linestyle() == "-" for f in frames] == right
        assert all(
            f.get_edgecolor()[1] > f.get_edgecolor()[0]
            if ok
            else f.get_edgecolor()[0] > f.get_edgecolor()[1]
            for f, ok in zip(frames, right)
        )
    with pytest.raises(ValueError, match="same number"):
        show_topk(
            torch.rand(2, 1, 8, 8),
            torch.rand(5, 3, 8, 8),
            torch.zeros(3, 2, dtype=torch.long),
            torch.zeros(3, 2, dtype=torch.bool),
        )


def test_report_shows_image_sets_and_picks_middling_queries():
    photos, sketches = toy_pairs(30, size=28, seed=2, split="test")
    e = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    report = evaluate_retrieval(e, e.flip(0), sketches.labels, photos.labels, ks=(5,))
    assert (
        isinstance(photos, ImageSet) and len(report.show_topk(sketches, photos, k=3).axes) == 6 * 4
    )
    assert "Report(mAP@all" in repr(report)


# the results file


def row(method="random", seed=0, metric="mAP@all", value=0.5, **kw):
    return {
        "dataset": "toy",
        "method": method,
        "seed": seed,
        "metric": metric,
        "value": value,
        "seconds": 1.25,
        "device": "cpu",
        "run_id": "r1",
        **kw,
    }


def test_results_round_trip(tmp_path):
    path = tmp_path / "results.csv"
    append_results(path, [row(variant='a, "b"'), row(metric="Prec@100", value=1 / 3)])
    append_results(path, [row(metric="mAP@200/min(R,200)", seed=2)])
    text = path.read_text()
    assert (
        text.splitlines()[0] == "dataset,method,variant,seed,metric,value,seconds,device,run_id"
        and text.count("dataset,") == 1
    )
    rows = read_results(path)
    assert [tuple(r) for r in rows] == [RESULT_COLUMNS] * 3
    assert (
        rows[0]["variant"] == 'a, "b"'
        and rows[1]["value"] == pytest.approx(1 / 3, abs=1e-6)
        and rows[2]["seed"] == 2
    )


def test_results_of_a_repeated_measurement_count_once(tmp_path):
    path = tmp_path / "results.csv"
    append_results(path, [row(value=0.1), row(value=0.2, run_id="r2"), row(value=0.4, seed=1)])
    assert [r["value"] for r in read_results(path)] == [0.2, 0.4]
    assert "| random | 0.300 ± 0.141 | 2 |" in results_table(path, "toy", metrics=("mAP@all",))


def test_results_heal_a_line_without_an_end(tmp_path):
    path = tmp_path / "results.csv"
    append_results(path, [row()])
    path.write_text(path.read_text().rstrip("\n"))
    append_results(path, [row(seed=1)])
    assert [r["seed"] for r in read_results(path)] == [0, 1]


def test_results_from_several_writers_stay_whole(tmp_path):
    path = tmp_path / "results.csv"
    append_results(path, [row()])
    with ThreadPoolExecutor(8) as pool:
        list(
            pool.map(
                lambda s: append_results(
                    path, [row(seed=s, metric=m) for m in ("mAP@all", "Prec@100", "Prec@200")]
                ),
                range(1, 41),
            )
        )
    assert len(read_results(path)) == 121


@pytest.mark.parametrize(
    "bad, match",
    [
        ({"metric": "mAP@200"}, "unknown metric"),
        ({"metric": "map@all"}, "unknown metric"),
        ({"metric": "mAP@200/min(R,100)"}, "unknown metric"),
        ({"metric": "released protocol (to hit 10)"}, "unknown metric"),
        ({"value": math.nan}, "finite"),
        ({"method": " "}, "without"),
        ({"extra": 1}, "columns"),
    ],
)
def test_results_refuse_a_bad_row_and_write_nothing(tmp_path, bad, match):
    path = tmp_path / "results.csv"
    with pytest.raises(ValueError, match=match):
        append_results(path, [row(), row() | bad])
    assert not path.exists()


def test_results_refuse_foreign_files_and_unknown_data(tmp_path):
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="name another file"):
        append_results(path, [row()])
    with pytest.raises(ValueError, match="columns"):
        read_results(path)
    append_results(tmp_path / "results.csv", [row()])
    with pytest.raises(ValueError, match="knows \\['toy'\\]"):
        results_table(tmp_path / "results.csv", "pacs")


def test_table_runs_from_floor_to_ceiling_and_leaves_gaps(tmp_path):
    path = tmp_path / "results.csv"
    append_results(
        path,
        [row(m, s, value=0.5 + s / 10) for m in (*reversed(METHODS), "my-own") for s in range(3)]
        + [row("random", metric="Prec@100", value=0.1)],
    )
    table = results_table(path, "toy")
    lines = [[c.strip() for c in l.strip("|").split("|")] for l in table.splitlines()]
    assert [l[0] for l in lines[2:]] == [*METHODS, "my-own"] and len({len(l) for l in lines}) == 1
    assert lines[2] == ["random", "0.600 ± 0.100", "0.100", "", "3"] and isinstance(table, Table)
    append_results(path, [row("random", variant="mirror", value=0.9)])
    assert results_table(path, "toy", variant="") == table and "random (mirror)" in results_table(
        path, "toy"
    )
