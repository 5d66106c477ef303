"The results file: what goes in comes out, what is wrong stays out, tables from floor to ceiling."

import math
from concurrent.futures import ThreadPoolExecutor

import pytest

from dfsbir.evaluation.results import (
    METHODS,
    RESULT_COLUMNS,
    Table,
    append_once,
    append_results,
    read_results,
    result_rows,
    results_table,
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "results.csv"


def row(method="random", seed=0, metric="mAP@all", value=0.5, **other):
    return {
        "dataset": "toy",
        "method": method,
        "seed": seed,
        "metric": metric,
        "value": value,
        "seconds": 1.25,
        "device": "cpu",
        "run_id": "r1",
        **other,
    }


def test_rows_come_back_as_they_were(path):
    append_results(path, [row(variant='a, "b"'), row(metric="Prec@100", value=1 / 3)])
    append_results(path, [row(metric="mAP@200/min(R,200)", seed=2)])
    text = path.read_text()
    assert text.count("dataset,") == 1
    first = text.splitlines()[0]
    assert first == "dataset,method,variant,seed,metric,value,seconds,device,run_id"
    rows = read_results(path)
    assert [tuple(r) for r in rows] == [RESULT_COLUMNS] * 3
    assert rows[0]["variant"] == 'a, "b"' and rows[2]["seed"] == 2
    assert rows[1]["value"] == pytest.approx(1 / 3, abs=1e-6)


def test_a_repeated_measurement_counts_once(path):
    append_results(path, [row(value=0.1), row(value=0.2, run_id="r2"), row(value=0.4, seed=1)])
    assert [r["value"] for r in read_results(path)] == [0.2, 0.4]
    assert "| random | 0.300 ± 0.141 | 2 |" in results_table(path, "toy", metrics=("mAP@all",))


def test_a_line_without_an_end_is_mended(path):
    append_results(path, [row()])
    path.write_text(path.read_text().rstrip("\n"))
    append_results(path, [row(seed=1)])
    assert [r["seed"] for r in read_results(path)] == [0, 1]


def test_lines_that_were_cut_are_left_out_and_named(path):
    "Wherever the line was cut, in a quoted metric too, the rows around it are there."
    append_results(path, [row()])
    whole = path.read_text()
    append_results(path, [row(metric="mAP@200/min(R,200)", seed=1, run_id="r")])
    line = path.read_text().removeprefix(whole).rstrip("\n")
    for length in range(1, len(line)):
        path.write_text(whole + line[:length])
        append_results(path, [row(metric="mAP@200/min(R,200)", seed=2)])
        with pytest.warns(UserWarning, match=r"results\.csv .*: 3\."):
            found = read_results(path)
        assert [r["seed"] for r in found] == [0, 2]


def test_rows_of_several_writers_stay_whole(path):
    append_results(path, [row()])

    def write(seed):
        names = ("mAP@all", "Prec@100", "Prec@200")
        append_results(path, [row(seed=seed, metric=name) for name in names])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(1, 41)))
    assert len(read_results(path)) == 121


@pytest.mark.parametrize(
    "bad, match",
    [
        ({"metric": "mAP@200"}, "mAP@200"),
        ({"metric": "map@all"}, "map@all"),
        ({"metric": "mAP@200/min(R,100)"}, "R,100"),
        ({"metric": "released protocol (to hit 10)"}, "released"),
        ({"value": math.nan}, "nan"),
        ({"method": " "}, "method"),
        ({"extra": 1}, "extra"),
    ],
)
def test_a_bad_row_is_refused_and_nothing_written(path, bad, match):
    with pytest.raises(ValueError, match=match):
        append_results(path, [row(), row() | bad])
    assert not path.exists()


def test_foreign_files_and_unknown_data_are_refused(path, tmp_path):
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    for use in (lambda: append_results(other, [row()]), lambda: read_results(other)):
        with pytest.raises(ValueError, match="other.csv"):
            use()
    assert other.read_text() == "a,b\n1,2\n"
    append_results(path, [row()])
    with pytest.raises(ValueError, match="pacs.*'toy'"):
        results_table(path, "pacs")


def test_a_table_runs_from_floor_to_ceiling_and_leaves_gaps(path):
    methods = (*reversed(METHODS), "my-own")
    every = [row(m, s, value=0.5 + s / 10) for m in methods for s in range(3)]
    append_results(path, [*every, row("random", metric="Prec@100", value=0.1)])
    table = results_table(path, "toy")
    lines = [[c.strip() for c in line.strip("|").split("|")] for line in table.splitlines()]
    assert [line[0] for line in lines[2:]] == [*METHODS, "my-own"]
    assert len({len(line) for line in lines}) == 1
    assert lines[2] == ["random", "0.600 ± 0.100", "0.100", "", "3"]
    assert isinstance(table, Table) and table._repr_markdown_() == table


def test_a_table_of_one_variant(path):
    append_results(path, [row(), row(metric="Prec@100")])
    plain = results_table(path, "toy")
    append_results(path, [row(variant="mirror", value=0.9)])
    assert results_table(path, "toy", variant="") == plain
    assert "random (mirror)" in results_table(path, "toy")


def test_rows_are_appended_once(tmp_path):
    metrics = {
        ("random", ""): {"mAP@all": 0.1, "Prec@100": 0.2, "Prec@200": 0.3},
        ("crossx-dfsbir", "x"): {"mAP@all": 0.5, "Prec@100": 0.6, "Prec@200": 0.7},
    }
    rows = result_rows("toy", metrics, {("crossx-dfsbir", "x"): 9.0}, 1, "cpu", "run-1")
    file = tmp_path / "shared" / "results.csv"
    append_once(file, rows)
    append_once(file, rows)
    found = read_results(file)
    assert len(found) == 6 and {r["seconds"] for r in found} == {0.0, 9.0}
    assert {(r["method"], r["variant"], r["seed"]) for r in found} == {
        ("random", "", 1),
        ("crossx-dfsbir", "x", 1),
    }
