"""Ranks, intervals, reports."""

import math

import pytest
import torch

from dfsbir.evaluation.retrieval import accuracy_at
from dfsbir.finegrained.evaluation import (
    InstanceReport,
    bootstrap,
    embed_pair,
    evaluate_instances,
    spread,
    true_ranks,
)


@pytest.fixture
def vectors():
    "(queries, gallery, instances drawn, instances of the gallery)."
    torch.manual_seed(7)
    queries, gallery, ids = torch.randn(30, 4), torch.randn(20, 4), torch.randperm(40)[:20]
    return queries, gallery, ids[torch.randint(20, (30,))], ids


def test_ranks_against_accuracy_at(vectors):
    ranks = true_ranks(*vectors)
    for k in (1, 5, 10):
        wanted = accuracy_at(*vectors, (k,))[f"Acc@{k}"]
        assert (ranks <= k).double().mean().item() == pytest.approx(wanted)


def test_ties_are_ranked_in_gallery_order(vectors):
    _, gallery, _, ids = vectors
    assert true_ranks(torch.zeros(2, 4), gallery, ids[[0, 5]], ids).tolist() == [1, 6]


def test_what_has_no_rank_is_refused(vectors):
    queries, gallery, drawn, ids = vectors
    with pytest.raises(ValueError, match="no true photo"):
        true_ranks(queries, gallery[:1], drawn, ids[:1])
    with pytest.raises(ValueError, match="19 gallery photos"):
        true_ranks(queries, gallery, drawn, ids * 0)
    with pytest.raises(ValueError, match="NaN"):
        true_ranks(queries * math.nan, gallery, drawn, ids)


def test_bootstrap():
    assert bootstrap(torch.ones(50)) == (1.0, 1.0)
    low, high = bootstrap((torch.arange(400) % 2).double())
    assert low == pytest.approx(0.45, abs=0.02) and high == pytest.approx(0.55, abs=0.02)
    assert bootstrap(torch.arange(9.0)) == bootstrap(torch.arange(9.0))


def test_seeds_are_averaged_before_sketches_are_drawn():
    assert bootstrap(torch.tensor([[0.0, 1.0] * 50, [1.0, 0.0] * 50])) == (0.5, 0.5)


def test_drawings_of_one_photo_are_drawn_anew_together():
    hits = (torch.arange(60) % 2).double()
    once = bootstrap(hits)
    order = torch.randperm(180, generator=torch.Generator().manual_seed(0))
    photos = torch.arange(60).repeat(3)[order]
    assert bootstrap(hits.repeat(3)[order], photos) == pytest.approx(once)
    low, high = bootstrap(hits.repeat(3))
    assert high - low < 0.7 * (once[1] - once[0])


def test_a_photo_with_more_drawings_weighs_more():
    low, high = bootstrap(torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.tensor([7, 7, 7, 2]), 4000)
    assert (low, high) == (0.0, 1.0)
    values = torch.cat([torch.ones(300), torch.zeros(100)])
    photos = torch.cat([torch.arange(100).repeat(3), torch.arange(100, 200)])
    low, high = bootstrap(values, photos)
    assert 0.68 < low < 0.75 < high < 0.82  # photos alone would give .5


def test_report():
    agreement = torch.tensor([0.5, 1.0, math.nan, 0.0], dtype=torch.float64)
    report = InstanceReport(torch.tensor([1, 1, 4, 12]), 20, agreement)
    assert report.metrics == {
        "Acc@1": 0.5,
        "Acc@5": 0.75,
        "Acc@10": 0.75,
        "mean rank": 4.5,
        "triplets": 0.5,
    }
    low, high = report.interval("Acc@5")
    assert low <= 0.75 <= high
    assert "| Acc@1 | 0.050 | **0.500** |" in report._repr_markdown_()


def test_several_drawings_a_photo_count_by_drawing_and_by_photo():
    report = InstanceReport(
        torch.tensor([1, 9, 6, 1, 9]), 20, instances=torch.tensor([4, 4, 2, 4, 2])
    )
    assert report.metrics["Acc@1"] == pytest.approx(0.4)
    assert report.metrics["any Acc@1"] == 0.5 and report.metrics["any Acc@10"] == 1.0
    assert report.interval("Acc@1") == bootstrap(report.values("Acc@1"), report.instances)
    low, high = report.interval("any Acc@1")
    assert low <= 0.5 <= high and "any Acc@1" in report._repr_markdown_()


def test_peoples_triplets(toy, teacher):
    queries, gallery = embed_pair(teacher, *toy)
    triplets = torch.tensor([[0, 1, 2], [0, 2, 1], [3, 4, 5]])
    report = evaluate_instances(teacher, *toy, triplets)
    scores = queries @ gallery.T
    assert report.agreement[0] == 0.5 and report.agreement[1:3].isnan().all()
    assert report.agreement[3] == float(scores[3, 4] > scores[3, 5])


def test_measuring_leaves_the_encoder_in_its_mode(toy, tiny_encoder):
    encoder = tiny_encoder()
    evaluate_instances(encoder, *toy)
    assert encoder.training


def test_spread():
    lines = [{"test/Acc@1": v} for v in (0.9, 0.1, 0.9, 0.1, 0.2, 0.4)]
    assert spread(lines) == pytest.approx(torch.tensor([0.2, 0.4]).std().item())
    assert spread([{"test/Acc@1": 0.5}] * 9) == 0
    with pytest.raises(ValueError, match="at least 6"):
        spread(lines[:5])
