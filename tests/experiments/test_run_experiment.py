"""The experiment notebook by papermill, very small: what it writes, how it resumes and fails."""

import base64
import io
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT
from PIL import Image
from safetensors.torch import save_file
from torchvision.utils import save_image

from dfsbir.app.executed import failed_cell
from dfsbir.app.parameters import notebook_parameters
from dfsbir.core.checkpoint import load_weights, read_card
from dfsbir.core.types import MODALITIES
from dfsbir.data.toy import toy_pairs
from dfsbir.data.toy_shapes import TOY_CLASSES
from dfsbir.evaluation.results import RESULT_COLUMNS, read_results, results_table
from dfsbir.students.encoder import load_encoders
from dfsbir.teachers.embeddings import TEACHER_EMBEDDINGS

TINY = {
    "toy_images": 120,
    "toy_test": 60,
    "size": 28,
    "teacher_net": "tiny",
    "photo_epochs": 2,
    "sketch_epochs": 1,
    "device": "cpu",
    "preset": "both",
    "changes": json.dumps(
        {
            "pairs.batch": 20,
            "pairs.photo.width": 8,
            "buffer.capacity": 20,
            "schedule.new_pairs": 20,
            "students.batch": 10,
            "logging.log_every": 1,
            "logging.sample_every": 2,
            "logging.save_every": 2,
            "dfsbir": {
                "pairs.sketch.strokes": 3,
                "pairs.sketch.templates_per_class": 2,
                "pairs.warmup_steps": 4,
                "schedule.distill_steps": 3,
            },
            "paper": {
                "pairs.sketch.width": 8,
                "pairs.guidance.kind": "teachers",
                "schedule.rounds": 4,
            },
        }
    ),
}
OPEN = json.dumps(
    {
        "buffer.capacity": 20,
        "schedule.new_pairs": 20,
        "schedule.distill_steps": 3,
        "students.batch": 10,
        "logging.log_every": 1,
    }
)
METRICS = ("mAP@all", "Prec@100", "Prec@200")


@pytest.fixture(scope="module")
def env():
    "This environment, one thread, no download."
    own = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    return own | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


def started(cwd, env, *words):
    "A finished process."
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=900,
    )


def papermill(cwd, env, **parameters):
    "Plain papermill from `cwd`."
    words = ["-m", "papermill", ROOT / "nbs" / "run_experiment.ipynb", "out.ipynb"]
    words.append("--no-progress-bar")
    for name, value in parameters.items():
        words += ["-r" if isinstance(value, str) else "-p", name, value]
    return started(cwd, env, *words)


def dfsbir(cwd, env, *words):
    "The command."
    code = "import sys; from dfsbir.app.cli import main; sys.exit(main())"
    return started(cwd, env, "-c", code, *words)


@pytest.fixture(scope="module")
def first(tmp_path_factory, env):
    "Working folder and finished process of the tiny experiment with both presets."
    cwd = tmp_path_factory.mktemp("experiment")
    return cwd, papermill(cwd, env, **TINY, run_folder="runs/tiny", results="shared/results.csv")


def outputs(notebook):
    "Every output of an executed notebook."
    cells = json.loads(notebook.read_text())["cells"]
    return [out for cell in cells for out in cell.get("outputs", [])]


def texts(notebook):
    "Every text that an executed notebook shows."
    shown = [
        (out.get("text", ""), out.get("data", {}).get("text/markdown", ""))
        for out in outputs(notebook)
    ]
    return ["".join(text) + "".join(markdown) for text, markdown in shown]


# ---- a whole run


def test_it_runs(first):
    cwd, done = first
    assert done.returncode == 0, done.stderr[-3000:]
    assert failed_cell(cwd / "out.ipynb") == ""


@pytest.mark.parametrize("folder", ["runs/tiny", "runs/tiny/paper"])
def test_the_run_folder_of_each_preset(first, folder):
    run = first[0] / folder
    config = json.loads((run / "config.json").read_text())
    assert {"parameters", "versions", "git", "teachers", "crossx"} <= set(config)
    assert set(config["teachers"]) == set(MODALITIES)
    assert all(len(v) == 64 for v in config["teachers"].values())
    assert (run / "checkpoints" / "last.safetensors").is_file()
    assert list((run / "samples").glob("estimates_*.png"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any("estimator/total" in line for line in lines)
    assert any("student/total" in line for line in lines)
    classes = load_encoders(run / "encoders")["photo"].card["classes"]
    assert sorted(classes) == sorted(TOY_CLASSES)


def test_the_config_has_every_parameter(first):
    cwd, _ = first
    run = cwd / "runs" / "tiny"
    parameters = json.loads((run / "config.json").read_text())["parameters"]
    places = {"run_folder", "results", "pairs_from"}
    assert {p.name for p in notebook_parameters()} - places <= set(parameters)
    assert parameters["crossx.pairs.warmup_steps"] == 4
    seeds = [read_card(run / "teachers" / f"{m}.safetensors")["seed"] for m in MODALITIES]
    assert seeds == [0, 1000]
    assert {p.name for p in cwd.iterdir()} == {"runs", "shared", "out.ipynb"}, "nothing elsewhere"


def test_the_report(first):
    "The answer, its chart and its table before anything else; nothing from elsewhere."
    page = (first[0] / "runs" / "tiny" / "report.html").read_text()
    page = page[page.index("<main>") :]
    opening = page[: page.index("<details>")]
    assert "sketches search" in opening and "crossx-" in opening
    assert opening.count("<img") == 1 and opening.count("<table") == 1
    assert "teacher-posteriors" in opening and "data:image" in opening
    assert "skip_exec" not in page and "<script src" not in page
    assert "10 shared classes" in page and "photo members" not in page


def test_figures_have_150_dots_an_inch(first):
    pictures = [
        out for out in outputs(first[0] / "out.ipynb") if "image/png" in out.get("data", {})
    ]
    for out in pictures:
        with Image.open(io.BytesIO(base64.b64decode(out["data"]["image/png"]))) as image:
            shown = out["metadata"]["image/png"]["width"]
            assert image.info["dpi"][0] == pytest.approx(150, abs=1)
            assert image.width >= 2 * shown


def test_nets_apart_judge_the_estimates(first):
    "The shares of both presets and modalities, in the record and beside the pictures."
    cwd, _ = first
    run = cwd / "runs" / "tiny"
    verified = json.loads((run / "record.json").read_text())["verified"]
    assert {(p, m) for p in verified for m in verified[p]} == {
        (p, m) for p in ("dfsbir", "paper") for m in MODALITIES
    }
    said = "\n".join(texts(cwd / "out.ipynb"))
    for found in verified.values():
        for m, values in found.items():
            assert 0 <= values["recognised"] <= 1 and values["floor"] == pytest.approx(0.1)
            assert f"{values['recognised']:.0%} of {values['estimates']} {m} estimates" in said
    assert {p.stem for p in (run / "verifiers").glob("*.safetensors")} == set(MODALITIES)


def test_a_teacher_near_chance_is_warned_of(first):
    "These teachers were hardly trained: the notebook, the record and the report say so."
    cwd, _ = first
    run = cwd / "runs" / "tiny"
    warnings = json.loads((run / "record.json").read_text())["warnings"]
    assert any("teacher" in text and "mean and std" in text for text in warnings)
    page = (run / "report.html").read_text()
    page = page[page.index("<main>") :]
    assert all(text[:40] in page[: page.index("<details>")] for text in warnings)


def test_the_results(first):
    "A tidy row for each method and metric; the table that others make from them."
    file = first[0] / "shared" / "results.csv"
    rows = read_results(file)
    trained = {("crossx-paper", ""), ("crossx-dfsbir", ""), ("data-dependent", "")}
    keys = {(r["method"], r["variant"]) for r in rows}
    assert keys == {("random", ""), *TEACHER_EMBEDDINGS, *trained}
    assert {r["metric"] for r in rows} == set(METRICS) and len(rows) == 3 * len(keys)
    assert {(r["dataset"], r["seed"]) for r in rows} == {("toy", 0)}
    assert len({r["run_id"] for r in rows}) == 1
    for r in rows:
        assert 0 <= r["value"] <= 1 and r["seconds"] >= 0
        assert r["seconds"] > 0 or (r["method"], r["variant"]) not in trained
    assert "crossx-dfsbir" in results_table(file, "toy")


def test_what_it_shows(first):
    shown = outputs(first[0] / "out.ipynb")
    assert sum("image/png" in out.get("data", {}) for out in shown) >= 9
    said = "\n".join(texts(first[0] / "out.ipynb"))
    for what in (
        "photo teacher",
        "shared classes",
        "before,",
        "distance within a class",
        "real test images",
        "| random |",
        "rows appended",
    ):
        assert what in said, what


def test_it_goes_on(first, env):
    "The same run folder again: nothing is trained anew, the same numbers, no row twice."
    cwd, _ = first
    run, csv_file = cwd / "runs" / "tiny", cwd / "shared" / "results.csv"
    kept = [run / "teachers" / "photo.safetensors", run / "ceiling/encoders/photo.safetensors"]

    def state():
        tables = [t for t in texts(cwd / "out.ipynb") if "| random |" in t]
        seconds = json.loads((run / "record.json").read_text())["seconds"]
        weights = (run / "encoders" / "photo.safetensors").read_bytes()
        return [p.stat().st_mtime_ns for p in kept], csv_file.read_text(), tables, seconds, weights

    before = state()
    lost = run / "paper" / "encoders" / "photo.safetensors"
    lost.unlink()  # as if it had stopped before its end
    done = papermill(cwd, env, **TINY, run_folder="runs/tiny", results="shared/results.csv")
    assert done.returncode == 0, done.stderr[-3000:]
    assert state() == before and lost.is_file()


def test_the_preset_for_unseen_classes(tmp_path, env):
    "Procedural objects: no estimates to look at, a row with its variant, no ceiling."
    changes = {"preset": "open", "changes": OPEN, "run_folder": "runs/open"}
    done = papermill(tmp_path, env, **TINY | changes)
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "runs" / "open"
    rows = read_results(run / "results.csv")
    assert ("crossx-dfsbir", "open") in {(r["method"], r["variant"]) for r in rows}
    assert "data-dependent" not in {r["method"] for r in rows}
    assert load_encoders(run / "encoders")["photo"].card["head"]["kind"] == "joint"
    assert "verified" not in json.loads((run / "record.json").read_text()), "objects have no class"


def test_own_checkpoints(first, tmp_path, env):
    "Teachers that are brought along, one with its card and one without; no training images."
    teachers = first[0] / "runs" / "tiny" / "teachers"
    save_file(load_weights(teachers / "sketch.safetensors"), tmp_path / "bare.safetensors")
    card = read_card(teachers / "sketch.safetensors")
    own = {
        "preset": "dfsbir",
        "ceiling": False,
        "compare": False,
        "run_folder": "r",
        "photo_teacher": str(teachers / "photo.safetensors"),
        "sketch_teacher": "bare.safetensors",
        "sketch_card": json.dumps({k: card[k] for k in ("classes", "input", "source", "name")}),
    }
    done = papermill(tmp_path, env, **TINY | own)
    assert done.returncode == 0, done.stderr[-3000:]

    def ours(file):
        rows = [r for r in read_results(file) if r["method"] == "crossx-dfsbir"]
        return {r["metric"]: r["value"] for r in rows}

    theirs = first[0] / "shared" / "results.csv"
    assert ours(tmp_path / "r" / "results.csv") == ours(theirs), "the same teachers and numbers"
    assert {r["method"] for r in read_results(tmp_path / "r" / "results.csv")} == {
        "random",
        "crossx-dfsbir",
    }


# ---- mistakes


@pytest.mark.parametrize(
    "mistake, named",
    [
        ({"sead": 1}, "'seed'"),
        ({"preset": "opn"}, "'open'"),
        ({"changes": '{"students.rl": 1}'}, "students.lr"),
    ],
    ids=str,
)
def test_a_mistake_is_found_before_anything_is_written(tmp_path, env, mistake, named):
    "Papermill only warns of an unknown name; the notebook does not go on."
    done = papermill(tmp_path, env, **mistake)
    assert done.returncode != 0 and named in failed_cell(tmp_path / "out.ipynb")
    assert [p.name for p in tmp_path.iterdir()] == ["out.ipynb"]


@pytest.fixture
def own_images(tmp_path):
    "Class folders of 20 toy images for each split and modality."
    for m, data in zip(MODALITIES, toy_pairs(20, size=28, split="test")):
        for i in range(20):
            for split in ("train", "test"):
                folder = tmp_path / split / m / TOY_CLASSES[i % 10]
                folder.mkdir(parents=True, exist_ok=True)
                save_image(data[i][0], folder / f"{i}.png")
    return tmp_path


def test_a_failing_cell_leaves_what_was_done_and_the_command_goes_on(own_images, env):
    "One message that names the cell, exit code 2, the notebook up to there, and the report."
    folder = own_images
    torn = folder / "test" / "sketch" / TOY_CLASSES[3] / "3.png"
    torn.write_bytes(torn.read_bytes()[:60])
    given = {k: v for k, v in TINY.items() if k not in ("toy_images", "toy_test")}
    given |= {"dataset": "folders", "preset": "dfsbir", "teacher_batch": 2, "ceiling": False}
    given |= {f"{m}_{s}": folder / s / m for m in MODALITIES for s in ("train", "test")}
    given["run_folder"] = "r"
    words = [w for name, value in given.items() for w in ("-p", name, value)]
    done = dfsbir(folder, env, "run", *words)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "3.png" in done.stderr and "Test images" in done.stderr
    run = folder / "r"
    assert "3.png" in failed_cell(run / "run_experiment.ipynb")
    assert "3.png" in (run / "report.html").read_text()
    assert (run / "teachers" / "photo.safetensors").is_file(), "what was done is kept"

    torn.unlink()  # the image is removed: the same command goes on to its end
    (torn.parent / "13.png").rename(torn)
    done = dfsbir(folder, env, "run", *words)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = read_results(run / "results.csv")
    assert {r["dataset"] for r in rows} == {"photo"}
    assert "data-dependent" not in {r["method"] for r in rows}
    assert (run / "results.csv").read_text().splitlines()[0] == ",".join(RESULT_COLUMNS)

    images = ["--photos", folder / "test" / "photo", "--sketches", folder / "test" / "sketch"]
    options = ["--size", 28, "--json", "e.json", "--device", "cpu"]
    done = dfsbir(folder, env, "evaluate", "r", *images, *options)
    assert done.returncode == 0, done.stderr
    key = "crossx-dfsbir", "mAP@all"
    ours = next(r["value"] for r in rows if (r["method"], r["metric"]) == key)
    found = json.loads((folder / "e.json").read_text())["metrics"]["mAP@all"]
    assert found == pytest.approx(ours, abs=1e-5), "the command measures what the notebook does"
