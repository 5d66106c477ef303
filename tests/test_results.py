"""What README and results say is what the runs wrote."""
from collections import defaultdict
from statistics import mean

import pytest
from conftest import ROOT

from dfsbir.evaluation import read_results, results_table

RESULTS = ROOT / "nbs" / "results.csv"
SEEDS = {"toy": 3, "pacs": 3}
METHODS = {"random", "teacher-features", "teacher-logits", "teacher-posteriors", "crossx-paper", "crossx-dfsbir", "data-dependent"}


@pytest.mark.parametrize("dataset", ["toy", "pacs"])
def test_readme_shows_the_table_of_results(dataset):
    assert str(results_table(RESULTS, dataset)) in (ROOT / "README.md").read_text(encoding="utf-8"), f"README's {dataset} table is not results_table({RESULTS.name!r}, {dataset!r})"


@pytest.mark.parametrize("dataset", ["toy", "pacs"])
def test_every_method_has_its_seeds_and_all_metrics(dataset):
    seeds = defaultdict(set)
    for row in read_results(RESULTS):
        if row["dataset"] == dataset:
            seeds[row["method"], row["metric"]].add(row["seed"])
    assert {(m, k) for m in METHODS for k in ("mAP@all", "Prec@100", "Prec@200")} <= set(seeds)
    assert all(len(s) >= SEEDS[dataset] for s in seeds.values()), {k: s for k, s in seeds.items() if len(s) < SEEDS[dataset]}


@pytest.mark.parametrize("dataset", ["toy", "pacs"])
def test_what_the_results_must_show(dataset):
    of = defaultdict(list)
    for row in read_results(RESULTS):
        if row["dataset"] == dataset and row["metric"] == "mAP@all":
            of[row["method"], row["variant"]].append(row["value"])
    ours = mean(of["crossx-dfsbir", ""])
    assert ours >= mean(of["teacher-posteriors", ""])
    assert ours >= mean(of["teacher-features", ""]) + .1
    assert all(ours >= .95 * mean(v) for (method, _), v in of.items() if method == "data-dependent")
