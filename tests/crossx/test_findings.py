"""What a report says of a file of results: against loops by hand."""

from statistics import mean, stdev

import pytest

from dfsbir.crossx.findings import (
    CEILING,
    OURS,
    Findings,
    bar_chart,
    bullets,
    change_chart,
    changes_from,
    compared,
    differences,
    is_clear,
    method_order,
    number,
    table_of,
    titled,
)
from dfsbir.evaluation.results import append_results

VALUES = {
    ("random", ""): (0.1, 0.1, 0.1),
    ("teacher-logits", ""): (0.6, 0.6, 0.6),
    ("teacher-posteriors", ""): (0.7, 0.72, 0.71),
    ("teacher-posteriors", "mirror"): (0.72, 0.73, 0.74),
    (OURS, ""): (0.75, 0.76, 0.77),
    (OURS, "no alignment"): (0.70, 0.72, 0.71),
    (OURS, "10%"): (0.2, 0.2, 0.2),
    (OURS, "100%"): (0.8, 0.9, 1.0),
    (CEILING, ""): (0.85, 0.85, 0.85),
}


@pytest.fixture(scope="module")
def findings(tmp_path_factory):
    file = tmp_path_factory.mktemp("results") / "results.csv"
    rows = [
        {
            "dataset": "toy",
            "method": method,
            "variant": variant,
            "seed": seed,
            "metric": "mAP@all",
            "value": value,
            "seconds": 10.0 + seed,
            "device": "cpu",
            "run_id": f"{method} {variant} {seed}",
        }
        for (method, variant), values in VALUES.items()
        for seed, value in enumerate(values)
    ]
    append_results(file, [*rows, {**rows[0], "metric": "Prec@100", "value": 0.3}])
    return Findings.read(file)


def test_values_by_seed(findings):
    assert findings.values("toy", OURS) == {0: 0.75, 1: 0.76, 2: 0.77}
    assert findings.values("toy", OURS, what="seconds") == {0: 10.0, 1: 11.0, 2: 12.0}
    assert findings.values("pacs", OURS) == {} == findings.values("toy", "released")
    assert {r["metric"] for r in findings.rows} == {"mAP@all"}


def test_names_and_orders(findings):
    assert findings.variants("toy", OURS) == ["", "10%", "100%", "no alignment"]
    assert findings.methods("toy")[0] == ("teacher-logits", "")
    assert findings.methods("toy")[-1] == (CEILING, "")
    assert method_order(("random", "")) < method_order((OURS, "")) < method_order(("mine", ""))
    assert titled(OURS, "x") == f"{OURS} (x)" and titled(OURS, "") == OURS


def test_the_best_embedding_has_the_best_mean(findings):
    assert findings.best_embedding("toy") == ("teacher-posteriors", "mirror")
    assert findings.best_embedding("pacs") is None
    assert findings.best_embedding("toy", "mirror") == ("teacher-posteriors", "mirror")


def test_variants_that_are_numbers(findings):
    curve = findings.by_number("toy", OURS, r"(\d+)%")
    assert list(curve) == [10, 100] and curve[100] == {0: 0.8, 1: 0.9, 2: 1.0}


def test_numbers_in_words():
    values = [0.7, 0.8]
    assert number(values) == f"{mean(values):.3f} ± {stdev(values):.3f} (2 seeds)"
    assert number({0: 0.5}) == "0.500 (1 seed)" and number({0: 0.5}, "+") == "+0.500 (1 seed)"
    assert number({}) == "not measured"


def test_differences_are_of_seeds_in_common():
    a, b = {0: 1.0, 1: 2.0, 5: 9.0}, {0: 0.5, 1: 2.5, 7: 0.0}
    assert differences(a, b) == [0.5, -0.5]
    assert "1 of 2" in compared(a, b)
    assert "no seed in common" in compared({0: 1.0}, {1: 0.5})


@pytest.mark.parametrize(
    "values, clear",
    [
        ([0.1, 0.11, 0.12], True),
        ([-0.1, -0.11, -0.12], True),
        ([0.1, -0.1, 0.2], False),
        ([0.01, 0.5, 0.02], False),
        ([0.1], False),
        ([0.0, 0.0], False),
    ],
)
def test_a_clear_difference(values, clear):
    assert is_clear(values) is clear


def test_switches_from_worst_to_best(findings):
    found = changes_from(findings, "toy", OURS, without=r"\d+%")
    assert list(found) == ["no alignment"]
    assert found["no alignment"] == pytest.approx([-0.05, -0.04, -0.06])
    assert list(changes_from(findings, "toy", OURS)) == ["10%", "no alignment", "100%"]


def test_bars_are_means(findings):
    keys = [("teacher-logits", ""), (OURS, "")]
    ax = bar_chart(findings, "toy", keys, {OURS: "C0"}).axes[0]
    assert [bar.get_width() for bar in ax.patches] == pytest.approx([0.6, 0.76])
    floor_and_ceiling = sorted(
        line.get_xdata()[0]
        for line in ax.lines
        if len(set(line.get_xdata())) == 1 and line.get_linestyle() in (":", "--")
    )
    assert floor_and_ceiling == pytest.approx([0.1, 0.85])


def test_a_dot_for_every_seed():
    ax = change_chart({"a": [0.1, 0.2], "b": [-0.1]}, "change", "toy").axes[0]
    dots = [
        line.get_xdata().tolist() if hasattr(line.get_xdata(), "tolist") else list(line.get_xdata())
        for line in ax.lines
    ]
    assert [0.1, 0.2] in dots and [-0.1] in dots


def test_sentences_and_tables():
    assert bullets(["a", "b"]) == "- a\n- b" and "No rows" in bullets([])
    assert table_of(["x", "y"], [["1", "2"]]).splitlines()[2] == "| 1 | 2 |"
