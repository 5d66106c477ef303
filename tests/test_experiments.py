"""The experiment notebook by papermill, very small: what it writes, that it goes on, and how it fails."""

import csv
import json
import subprocess
import sys

import pytest
from conftest import ROOT

from dfsbir.app.executed import failed_cell
from dfsbir.app.parameters import notebook_parameters
from dfsbir.core.checkpoint import read_card
from dfsbir.core.types import MODALITIES
from dfsbir.data.toy import toy_pairs
from dfsbir.data.toy_shapes import TOY_CLASSES
from dfsbir.evaluation.results import RESULT_COLUMNS, read_results, results_table
from dfsbir.students.encoder import load_encoders
from dfsbir.teachers.embeddings import TEACHER_EMBEDDINGS

TINY = dict(
    toy_images=120,
    toy_test=60,
    size=28,
    teacher_net="tiny",
    photo_epochs=2,
    sketch_epochs=1,
    device="cpu",
    preset="both",
    changes=json.dumps(
        {
            "warmup": 4,
            "new_pairs": 20,
            "student_steps": 3,
            "bank": 20,
            "batch": 20,
            "strokes": 3,
            "pages": 2,
            "width": 8,
            "save_every": 2,
            "sample_every": 2,
            "log_every": 1,
            "student_batch": 10,
            "paper": {"rounds": 4, "warmup": 0, "student_steps": 1, "guidance": "teachers"},
        }
    ),
)


def papermill(cwd, elsewhere, **parameters):
    "Plain papermill from `cwd`; the finished process."
    words = [
        w
        for k, v in parameters.items()
        for w in (("-r" if isinstance(v, str) else "-p"), k, str(v))
    ]
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "papermill",
            str(ROOT / "nbs" / "run_experiment.ipynb"),
            "out.ipynb",
            "--no-progress-bar",
            *words,
        ],
        cwd=cwd,
        env=elsewhere,
        capture_output=True,
        text=True,
        timeout=900,
    )


def dfsbir(cwd, elsewhere, *words):
    return subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from dfsbir.app.cli import main; sys.exit(main())",
            *map(str, words),
        ],
        cwd=cwd,
        env=elsewhere,
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.fixture(scope="module")
def env():
    "This environment, one thread, no download."
    import os

    return {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
    }


@pytest.fixture(scope="module")
def first(tmp_path_factory, env):
    "(working folder, finished process) of the tiny experiment with both presets by plain papermill."
    cwd = tmp_path_factory.mktemp("experiment")
    return cwd, papermill(cwd, env, **TINY, run_folder="runs/tiny", results="shared/results.csv")


def texts(notebook):
    "Everything that the cells of an executed notebook said."
    for cell in json.loads(notebook.read_text())["cells"]:
        for out in cell.get("outputs", []):
            yield "".join(out.get("text", "")) + "".join(
                out.get("data", {}).get("text/markdown", "")
            )


# ---- a whole run


def test_it_runs(first):
    cwd, done = first
    assert done.returncode == 0, done.stderr[-3000:]
    assert failed_cell(cwd / "out.ipynb") == ""


def test_the_run_folder(first):
    "As architecture.md says, for each preset; nothing outside of the run folder but what was asked for."
    cwd, _ = first
    run = cwd / "runs" / "tiny"
    for folder, preset in ((run, "dfsbir"), (run / "paper", "paper")):
        config = json.loads((folder / "config.json").read_text())
        assert {"parameters", "versions", "git"} <= set(config)
        assert (folder / "checkpoints" / "last.safetensors").is_file() and list(
            (folder / "samples").glob("estimates_*.png")
        )
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert any("estimator/total" in line for line in lines) and any(
            "student/total" in line for line in lines
        )
        encoders = load_encoders(folder / "encoders")
        assert encoders["photo"].card["classes"] == sorted(TOY_CLASSES) or encoders["photo"].card[
            "classes"
        ] == list(TOY_CLASSES)
    config = json.loads((run / "config.json").read_text())
    assert {p.name for p in notebook_parameters()} - {"run_folder", "results"} <= set(
        config["parameters"]
    ) and config["parameters"]["crossx.warmup"] == 4
    assert set(config["teachers"]) == set(MODALITIES) and all(
        len(v) == 64 for v in config["teachers"].values()
    )
    assert (
        read_card(run / "teachers" / "photo.safetensors")["seed"] == 0
        and read_card(run / "teachers" / "sketch.safetensors")["seed"] == 1000
    )
    assert {p.name for p in cwd.iterdir()} == {"runs", "shared", "out.ipynb"}


def test_the_report(first):
    page = (first[0] / "runs" / "tiny" / "report.html").read_text()
    assert (
        "data:image/png;base64" in page
        and "teacher-posteriors" in page
        and "The estimates as they grow" in page
    )


def test_the_results(first):
    "A tidy row for each method and metric; the table that others make from them."
    rows = read_results(first[0] / "shared" / "results.csv")
    methods = {
        "random",
        "teacher-features",
        "teacher-logits",
        "teacher-posteriors",
        "crossx-paper",
        "crossx-dfsbir",
        "data-dependent",
    }
    assert {r["method"] for r in rows} == methods
    assert {(r["method"], r["variant"]) for r in rows} == {(m, "") for m in methods} | set(
        TEACHER_EMBEDDINGS
    )
    assert {r["metric"] for r in rows} == {"mAP@all", "Prec@100", "Prec@200"} and len(
        rows
    ) == 3 * len({(r["method"], r["variant"]) for r in rows})
    assert {(r["dataset"], r["seed"]) for r in rows} == {("toy", 0)} and len(
        {r["run_id"] for r in rows}
    ) == 1
    assert all(0 <= r["value"] <= 1 and r["seconds"] >= 0 for r in rows) and all(
        r["seconds"] > 0 for r in rows if r["method"].startswith("crossx")
    )
    assert "crossx-dfsbir" in results_table(first[0] / "shared" / "results.csv", "toy")


def test_what_it_shows(first):
    cells = json.loads((first[0] / "out.ipynb").read_text())["cells"]
    said = "\n".join(texts(first[0] / "out.ipynb"))
    assert (
        sum("image/png" in out.get("data", {}) for cell in cells for out in cell.get("outputs", []))
        >= 9
    )
    for what in (
        "photo teacher**",
        "shared classes",
        "before,",
        "after; modality guidance: none",
        "distance within a class",
        "real test images",
        "| random |",
        "rows appended",
    ):
        assert what in said, what


def test_the_preset_for_unseen_classes(tmp_path, env):
    "Students of objects without a name: no estimators to look at, a row with its variant, and no ceiling."
    done = papermill(
        tmp_path,
        env,
        **{
            **TINY,
            "preset": "open",
            "changes": json.dumps(
                {
                    "new_pairs": 20,
                    "student_steps": 3,
                    "bank": 20,
                    "student_batch": 10,
                    "log_every": 1,
                }
            ),
        },
        run_folder="runs/open",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = read_results(tmp_path / "runs" / "open" / "results.csv")
    assert ("crossx-dfsbir", "open") in {
        (r["method"], r["variant"]) for r in rows
    } and "data-dependent" not in {r["method"] for r in rows}
    said = "\n".join(texts(tmp_path / "out.ipynb"))
    assert "objects without a name" in said and "none for this preset" in said
    assert (
        load_encoders(tmp_path / "runs" / "open" / "encoders")["photo"].card["head"]["kind"]
        == "joint"
    )


def test_it_continues(first, env):
    "The same run folder again: nothing is trained anew, the same numbers, no row twice."
    cwd, _ = first
    run, csv_file = cwd / "runs" / "tiny", cwd / "shared" / "results.csv"
    kept = [run / "teachers" / "photo.safetensors", run / "ceiling" / "photo.safetensors"]
    before, rows, table = (
        [p.stat().st_mtime_ns for p in kept],
        csv_file.read_text(),
        [t for t in texts(cwd / "out.ipynb") if "| random |" in t],
    )
    weights, seconds = (
        (run / "encoders" / "photo.safetensors").read_bytes(),
        json.loads((run / "record.json").read_text())["seconds"],
    )
    (
        run / "paper" / "encoders" / "photo.safetensors"
    ).unlink()  # as if it had stopped before its end
    done = papermill(cwd, env, **TINY, run_folder="runs/tiny", results="shared/results.csv")
    assert done.returncode == 0, done.stderr[-3000:]
    assert [p.stat().st_mtime_ns for p in kept] == before and csv_file.read_text() == rows
    assert (run / "encoders" / "photo.safetensors").read_bytes() == weights and (
        run / "paper" / "encoders" / "photo.safetensors"
    ).is_file()
    assert [t for t in texts(cwd / "out.ipynb") if "| random |" in t] == table and json.loads(
        (run / "record.json").read_text()
    )["seconds"] == seconds


# ---- mistakes


def test_an_unknown_parameter_is_an_error(tmp_path, env):
    "Papermill only warns; the notebook does not go on, and has written nothing. (Kinds of values: test_cli.py.)"
    done, says = papermill(tmp_path, env, sead=1), "did you mean 'seed'"
    assert done.returncode != 0 and says in done.stderr
    assert says in failed_cell(tmp_path / "out.ipynb") and [p.name for p in tmp_path.iterdir()] == [
        "out.ipynb"
    ]


def test_a_failing_cell_leaves_the_notebook_and_its_report(tmp_path, env):
    "By the command: one message that names the cell, exit code 2, the notebook up to there, and the report."
    from torchvision.utils import save_image

    for m, data in zip(MODALITIES, toy_pairs(20, size=28, split="test")):
        for i in range(20):
            for split in ("train", "test"):
                (tmp_path / split / m / TOY_CLASSES[i % 10]).mkdir(parents=True, exist_ok=True)
                save_image(data[i][0], tmp_path / split / m / TOY_CLASSES[i % 10] / f"{i}.png")
    torn = tmp_path / "test" / "sketch" / TOY_CLASSES[3] / "3.png"
    torn.write_bytes(torn.read_bytes()[:60])
    folders = [
        w
        for m in MODALITIES
        for split in ("train", "test")
        for w in ("-p", f"{m}_{split}", tmp_path / split / m)
    ]
    small = [
        w
        for k, v in (TINY | dict(teacher_batch=2, ceiling=False, preset="dfsbir")).items()
        if k not in ("toy_images", "toy_test")
        for w in ("-p", k, v)
    ]
    done = dfsbir(
        tmp_path, env, "run", "-p", "dataset", "folders", *folders, *small, "-p", "run_folder", "r"
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert (
        "BrokenImage" in done.stderr
        and "3.png" in done.stderr
        and 'under "Test images' in done.stderr
        and "r/run_experiment.ipynb" in done.stderr
    )
    assert (
        "BrokenImage" in failed_cell(tmp_path / "r" / "run_experiment.ipynb")
        and "BrokenImage" in (tmp_path / "r" / "report.html").read_text()
    )
    assert (tmp_path / "r" / "teachers" / "photo.safetensors").is_file(), "what was done is kept"

    torn.unlink()  # the image is removed: the same command goes on, with own data to its end
    (torn.parent / "13.png").rename(torn)
    done = dfsbir(
        tmp_path, env, "run", "-p", "dataset", "folders", *folders, *small, "-p", "run_folder", "r"
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = read_results(tmp_path / "r" / "results.csv")
    assert {r["dataset"] for r in rows} == {"photo"} and "data-dependent" not in {
        r["method"] for r in rows
    }
    with open(tmp_path / "r" / "results.csv") as f:
        assert next(csv.reader(f)) == list(RESULT_COLUMNS)

    done = dfsbir(
        tmp_path,
        env,
        "evaluate",
        "r",
        "--photos",
        tmp_path / "test" / "photo",
        "--sketches",
        tmp_path / "test" / "sketch",
        "--size",
        28,
        "--json",
        "e.json",
        "--device",
        "cpu",
    )
    assert done.returncode == 0, done.stderr
    ours = next(
        r["value"] for r in rows if (r["method"], r["metric"]) == ("crossx-dfsbir", "mAP@all")
    )
    assert json.loads((tmp_path / "e.json").read_text())["metrics"]["mAP@all"] == pytest.approx(
        ours, abs=1e-5
    ), "the command measures what the notebook measured"


def test_own_checkpoints(first, tmp_path, env):
    "Teachers that are brought along, one with its card and one without; no training images at all."
    from safetensors.torch import save_file

    from dfsbir.core.checkpoint import load_weights

    teachers = first[0] / "runs" / "tiny" / "teachers"
    save_file(load_weights(teachers / "sketch.safetensors"), tmp_path / "bare.safetensors")
    card = read_card(teachers / "sketch.safetensors")
    done = papermill(
        tmp_path,
        env,
        **TINY | dict(preset="dfsbir", ceiling=False, compare=False),
        run_folder="r",
        photo_teacher=str(teachers / "photo.safetensors"),
        sketch_teacher="bare.safetensors",
        sketch_card=json.dumps({k: card[k] for k in ("classes", "input", "source", "name")}),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert not (tmp_path / "r" / "teachers").exists()
    rows = read_results(tmp_path / "r" / "results.csv")
    assert {r["method"] for r in rows} == {"random", "crossx-dfsbir"}
    theirs = {
        (r["method"], r["metric"]): r["value"]
        for r in read_results(first[0] / "shared" / "results.csv")
    }
    assert {r["value"] for r in rows if r["method"] == "crossx-dfsbir"} == {
        theirs["crossx-dfsbir", k] for k in ("mAP@all", "Prec@100", "Prec@200")
    }, "the same teachers, the same numbers"
