"Reports: every metric against slow loops, floor and ceiling, the tables, the released protocol."

import gc
import json

import pytest
import torch
from torch import nn

from dfsbir.data.image_set import ImageSet
from dfsbir.data.toy import toy_pairs
from dfsbir.evaluation import report as report_module
from dfsbir.evaluation import retrieval
from dfsbir.evaluation.report import evaluate_retrieval, released_protocol, show_topk
from dfsbir.evaluation.retrieval import embed, score_chunks


def slow_ranks(scores, relevant):
    "Ranks of the relevant photos, best first, ties in gallery order, in plain Python."
    ranking = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    return [rank for rank, i in enumerate(ranking, 1) if relevant[i]]


def slow_ap(ranks, k):
    return sum(j / rank for j, rank in enumerate(ranks, 1) if rank <= k) / min(len(ranks), k)


def slow(q, g, yq, yg, ks):
    "All metrics, over queries with a relevant photo, from the definitions."
    ranks = [slow_ranks((g @ a).tolist(), (yg == c).tolist()) for a, c in zip(q, yq)]
    ranks = [r for r in ranks if r]

    def mean(values):
        return sum(values) / len(ranks)

    last = max(ks)
    found = {"mAP@all": mean([slow_ap(r, len(g)) for r in ranks])}
    found |= {f"Prec@{k}": mean([sum(x <= k for x in r) / k for r in ranks]) for k in ks}
    return found | {f"mAP@{last}/min(R,{last})": mean([slow_ap(r, last) for r in ranks])}


CASES = {
    "plain": {},
    "negative": {"negative": True},
    "one query": {"queries": 1},
    "one photo": {"gallery": 1, "classes": 1},
    "one class": {"classes": 1},
    "many classes": {"classes": 50},
}
TIED = {
    "ties": {"ties": True},
    "negative ties": {"ties": True, "negative": True},
    "1-d": {"dim": 1, "ties": True},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("chunk", [1, 5, 256])
def test_metrics_equal_slow_loops(problem, case, chunk):
    data = problem(len(case), **CASES[case])
    report = evaluate_retrieval(*data, ks=(1, 10, 30), chunk=chunk)
    assert report.metrics == pytest.approx(slow(*data, (1, 10, 30)), abs=1e-12)
    assert report.tied == 0


@pytest.mark.parametrize("case", TIED)
@pytest.mark.parametrize("chunk", [1, 256])
def test_with_ties_metrics_are_means_over_shuffled_galleries(problem, case, chunk):
    q, g, yq, yg = problem(len(case), **TIED[case])
    report = evaluate_retrieval(q, g, yq, yg, ks=(1, 10, 30), chunk=chunk)
    make, runs = torch.Generator().manual_seed(0), []
    for _ in range(100):
        order = torch.randperm(len(g), generator=make)
        runs.append(slow(q, g[order], yq, yg[order], (1, 10, 30)))
    for name, value in report.metrics.items():
        values = torch.tensor([run[name] for run in runs], dtype=torch.float64)
        error = values.std() / 10
        assert abs(values.mean() - value) <= 4 * error + 1e-12, name
    assert 0 < report.tied <= 1


def test_chunks_change_nothing(problem, monkeypatch):
    data = problem(0, queries=40, gallery=57, ties=True)
    whole = evaluate_retrieval(*data)
    monkeypatch.setattr(retrieval, "CHUNK_SCORES", 150)
    small = evaluate_retrieval(*data)
    assert small.metrics == whole.metrics and torch.equal(small.topk, whole.topk)
    assert torch.equal(small.ap, whole.ap) and small.tied == whole.tied


@pytest.mark.parametrize("call", [evaluate_retrieval, released_protocol])
def test_what_is_kept_of_a_chunk_is_not_the_chunk(problem, monkeypatch, call):
    "A slice of a chunk keeps the whole chunk alive, and chunk by chunk the whole matrix."
    held = []

    def counted(*args):
        for part in score_chunks(*args):
            if part[0].start in (0, 360):  # the first chunk and the last
                tensors = [t for t in gc.get_objects() if type(t) is torch.Tensor]
                storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
                held.append(sum(s.nbytes() for s in storages.values()))
            yield part

    monkeypatch.setattr(retrieval, "CHUNK_SCORES", 20_000)
    monkeypatch.setattr(report_module, "score_chunks", counted)
    call(*problem(0, queries=400, gallery=500))
    assert len(held) == 2 and held[1] - held[0] < 1_500_000  # the top 200 of 360 queries: 0.6 MB


def test_single_relevant_photo_gives_the_reciprocal_rank():
    q, g = torch.tensor([[1.0]]), torch.tensor([[5.0], [4], [3], [2]])
    for place in range(4):
        yg = torch.ones(4, dtype=torch.long)
        yg[place] = 0
        report = evaluate_retrieval(q, g, torch.tensor([0]), yg, ks=(2,))
        assert report.metrics["mAP@all"] == pytest.approx(1 / (place + 1))
        assert report.metrics["Prec@2"] == (0.5 if place < 2 else 0)


def test_queries_without_a_relevant_photo_are_left_out_and_counted(problem):
    q, g, yq, yg = problem(1, classes=3)
    yq[::5] = 99
    kept = yq != 99
    report = evaluate_retrieval(q, g, yq, yg, ks=(10,))
    alone = evaluate_retrieval(q[kept], g, yq[kept], yg, ks=(10,))
    assert report.metrics == pytest.approx(alone.metrics, abs=1e-12)
    assert report.ap.isnan().tolist() == (~kept).tolist() and "99" not in report.per_class()
    for text in (str(report), report._repr_markdown_()):
        assert "5 queries without" in text
    assert report.as_dict()["queries_without_relevant"] == 5
    both = released_protocol(q, g, yq, yg)
    assert both["mAP@all"] == pytest.approx(report.metrics["mAP@all"], abs=1e-12)
    for function in (evaluate_retrieval, released_protocol):
        with pytest.raises(ValueError, match="no query has a relevant"):
            function(q, g, yq + 100, yg)


def test_precision_divides_by_k_even_beyond_the_gallery(problem):
    q, g, yq, yg = problem(2, gallery=12, classes=2)
    report = evaluate_retrieval(q, g, yq, yg, ks=(5, 100))
    R = torch.tensor([(yg == c).sum() for c in yq])
    precision = report.metrics["Prec@100"]
    assert precision == pytest.approx((R / 100).mean().item())
    assert precision == report.ceiling["Prec@100"] == report.floor["Prec@100"]
    assert report.topk.shape == (23, 12)


def test_floor_and_ceiling_bracket_random_and_perfect_encoders():
    yq, yg = torch.arange(400) % 8, torch.arange(320) % 8
    q = torch.randn(400, 64, generator=torch.Generator().manual_seed(0))
    g = torch.randn(320, 64, generator=torch.Generator().manual_seed(1))
    random_ = evaluate_retrieval(q, g, yq, yg, ks=(20, 100))
    assert random_.metrics == pytest.approx(random_.floor, abs=0.01)
    perfect = evaluate_retrieval(torch.eye(8)[yq], torch.eye(8)[yg], yq, yg, ks=(20, 100))
    assert perfect.metrics == pytest.approx(perfect.ceiling, abs=1e-9)
    assert perfect.ceiling["Prec@100"] == pytest.approx(0.4)


def test_a_collapsed_encoder_gets_the_floor():
    yg = torch.arange(70).sort().values // 10
    q, g = torch.ones(7, 3), torch.ones(70, 3)
    report = evaluate_retrieval(q, g, torch.arange(7), yg, ks=(5, 100))
    assert report.metrics == pytest.approx(report.floor, rel=1e-9)
    assert report.tied == 1 and "100.0%" in str(report) and "tied" in report._repr_markdown_()


@pytest.mark.parametrize(
    "labels, ks, match",
    [
        ((torch.zeros(3), torch.zeros(4)), (5,), "query_labels"),
        ((torch.zeros(2), torch.zeros(4)), (), "at least one rank"),
        ((torch.zeros(2), torch.zeros(4)), (0, 5), "at least one rank"),
    ],
)
def test_wrong_input_says_what_was_found(labels, ks, match):
    with pytest.raises(ValueError, match=match):
        evaluate_retrieval(torch.ones(2, 3), torch.ones(4, 3), *labels, ks=ks)


# ---- tables


def test_terminal_notebook_and_json_say_the_same(problem):
    report = evaluate_retrieval(*problem(2, ties=True), ks=(10,))
    about = json.loads(json.dumps(report.as_dict()))
    assert about["metrics"] == report.metrics and about["per_class"] == report.per_class()
    assert about["queries"] == 23 and about["gallery"] == 57
    assert about["R_min"] == report.relevant.min() and about["R_max"] == report.relevant.max()
    for text in (str(report), report._repr_markdown_()):
        for name in report.metrics:
            (line,) = [x for x in text.splitlines() if x.strip("| ").startswith(name)]
            for values in (report.floor, report.metrics, report.ceiling):
                assert f"{values[name]:.3f}" in line
        assert f"R_min {about['R_min']}, R_max {about['R_max']}" in text
    assert len({len(line) for line in str(report).splitlines()[: len(report.metrics) + 1]}) == 1
    assert "Report(mAP@all" in repr(report)


# ---- the released protocol


def test_released_protocol_by_hand():
    "Ten early hits, forty at the very end: the released number sees only the early ones."
    hits = [1, 1] * 5 + [0] * 150 + [1] * 40
    g = torch.arange(len(hits), 0, -1.0)[:, None]
    both = released_protocol(torch.ones(1, 1), g, torch.tensor([1]), torch.tensor(hits))
    ranks = [r for r, h in enumerate(hits, 1) if h]
    assert both == {
        "mAP@all": pytest.approx(slow_ap(ranks, len(hits))),
        "released protocol (to hit 10)": pytest.approx(1.0),
    }
    assert both["mAP@all"] < 0.4


def test_released_protocol_equals_the_standard_where_all_hits_are_few(problem):
    q, g, yq, yg = problem(5, gallery=30, classes=8)
    assert torch.bincount(yg).max() <= 10
    standard, released = released_protocol(q, g, yq, yg).values()
    assert standard == pytest.approx(released, abs=1e-12)


# ---- pictures


def test_toy_pixels_are_near_chance():
    photos, sketches = toy_pairs(100, size=28, seed=1, split="test")

    def pixels(x):
        grey = x.mean(1, keepdim=True)
        small = nn.functional.interpolate(grey, 14, mode="bilinear", antialias=True).flatten(1)
        return nn.functional.normalize(small - small.mean(1, keepdim=True))

    vectors = embed(pixels, sketches), embed(pixels, photos)
    labels = sketches.labels, photos.labels
    report = evaluate_retrieval(*vectors, *labels, classes=photos.classes)
    assert report.metrics["mAP@all"] < report.floor["mAP@all"] + 0.12
    assert list(report.per_class()) == photos.classes


def test_bars_show_what_the_report_holds(problem):
    q, g, yq, yg = problem(6, classes=4)
    report = evaluate_retrieval(q, g, yq, yg, ks=(10,), classes=["ant", "bee", "cat", "dog"])
    by_class = report.per_class()
    weighted = sum(v * (yq == c).sum().item() for c, v in enumerate(by_class.values()))
    assert weighted / len(yq) == pytest.approx(report.metrics["mAP@all"])
    widths = [bar.get_width() for bar in report.figure().axes[0].patches]
    assert sorted(widths) == pytest.approx(sorted(by_class.values()))


def test_frames_show_what_is_relevant(problem):
    q, g, yq, yg = problem(6, classes=4)
    report = evaluate_retrieval(q, g, yq, yg, ks=(10,))
    fig = report.show_topk(torch.rand(23, 1, 8, 8), torch.rand(57, 3, 8, 8), rows=[0, 5], k=4)
    for row, query in enumerate([0, 5]):
        frames = [ax.spines["top"] for ax in fig.axes[5 * row + 1 : 5 * row + 5]]
        relevant = [bool(yg[i] == yq[query]) for i in report.topk[query, :4]]
        assert [frame.get_linestyle() == "-" for frame in frames] == relevant
        for frame, good in zip(frames, relevant):
            red, green, *_ = frame.get_edgecolor()
            assert (green > red) == good


def test_pictures_and_ranks_must_fit():
    topk, right = torch.zeros(3, 2, dtype=torch.long), torch.zeros(3, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="2 query images, 3 rows"):
        show_topk(torch.rand(2, 1, 8, 8), torch.rand(5, 3, 8, 8), topk, right)


def test_it_shows_image_sets_and_picks_median_queries():
    photos, sketches = toy_pairs(30, size=28, seed=2, split="test")
    vectors = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    report = evaluate_retrieval(vectors, vectors.flip(0), sketches.labels, photos.labels, ks=(5,))
    assert isinstance(photos, ImageSet)
    assert len(report.show_topk(sketches, photos, k=3).axes) == 6 * 4
    for query in report.median_queries():
        same_class = report.ap[report.query_labels == report.query_labels[query]]
        assert (same_class < report.ap[query]).sum() <= len(same_class) / 2
