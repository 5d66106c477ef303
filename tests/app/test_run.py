"""dfsbir run: mistakes end before anything starts."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from app.helpers import fails, notebook_of

from dfsbir.app.executed import TEXT_BARS
from dfsbir.app.parameters import notebook_parameters
from dfsbir.app.run import StageLines, run_notebook, summarise_run
from dfsbir.crossx.experiment import open_run, prepare_experiment
from dfsbir.evaluation.results import append_results


def test_mistaken_parameters_end_before_anything_starts(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "'seed'" in fails(capsys, "run", "-p", "sead", 1)
    assert "seed wants int" in fails(capsys, "run", "-p", "seed", "one")
    assert "true or false" in fails(capsys, "run", "-p", "ceiling", "maybe")
    assert not list(tmp_path.iterdir())


def test_a_failed_start_leaves_an_earlier_run_as_it_is(capsys, tmp_path, monkeypatch):
    "Mistakes that only the experiment can find, and parameters that differ from the run's."
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    parameters = {p.name: p.default for p in notebook_parameters()}
    _, configs = prepare_experiment(parameters)
    open_run({**parameters, "run_folder": str(run)}, configs["dfsbir"]).close()
    for name in ("run_experiment.ipynb", "report.html", "metrics.jsonl"):
        (run / name).write_text('{"step": 1}\n')
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    for name, value, named in [
        ("preset", "opn", "'open'"),
        ("photo_teacher", "nowhere.safetensors", "nowhere.safetensors"),
        ("teacher_net", "torchvision/resnet19", "resnet19"),
        ("changes", '{"students.rl": 1}', "students.lr"),
        ("changes", '{"students.start.kind": "cold", "students.start.net": "x/y"}', "timm"),
        ("photo_epochs", 0, "photo_epochs"),
        ("teacher_lr", -1, "teacher_lr"),
        ("seed", 1, "seed: 0 there, 1 here"),
    ]:
        assert named in fails(capsys, "run", "-p", "run_folder", run, "-p", name, value)
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_a_missing_extra_is_named(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "papermill", None)
    assert "dfsbir[run]" in fails(capsys, "run") and not list(tmp_path.iterdir())


# ---- stages and the summary


def write_record(run, done, seconds):
    run.mkdir(exist_ok=True)
    (run / "record.json").write_text(json.dumps({"run_id": "r", "done": done, "seconds": seconds}))


def test_a_line_a_stage_and_nothing_else_in_a_log_file(tmp_path):
    "Also where the folder appears later, and where a file is half written."
    stream, run = io.StringIO(), tmp_path / "run"
    with StageLines(run, stream) as stages:
        stages.update()
        write_record(run, [], {"teachers": 3.0})
        (run / "metrics.jsonl").write_text('{"step": 1, "student/total": 2.0}\n')
        stages.update()
        write_record(run, ["teachers"], {"teachers": 7.0, "crossx": 1.0})
        stages.update()
        (run / "record.json").write_text("{")
        stages.update()
        write_record(run, ["teachers", "crossx"], {"teachers": 7.0, "crossx": 200.0})
    assert stream.getvalue().splitlines() == ["teachers: 7 s", "crossx: 3 min"]


def test_a_continued_run_says_what_was_done_before(tmp_path):
    write_record(tmp_path, ["teachers"], {"teachers": 7.0})
    stream = io.StringIO()
    with StageLines(tmp_path, stream):
        write_record(tmp_path, ["teachers", "crossx"], {"teachers": 7.0, "crossx": 2.0})
    first, second = stream.getvalue().splitlines()
    assert "continued" in first and "teachers" in first and second == "crossx: 2 s"


class Terminal(io.StringIO):
    "A stream that shows what is on each line once all of it is written."

    def isatty(self):
        return True

    def lines(self):
        shown = [line.split("\r\x1b[K")[-1] for line in self.getvalue().split("\n")]
        return [line for line in shown if line]


BARS = ["\rphoto teacher:  50%|##  | 1/2, loss=0.8", "\rphoto teacher: 100%|###", "#| 2/2\n"]


def test_a_terminal_shows_bars_with_losses_and_keeps_the_finished_ones(tmp_path):
    stream = Terminal()
    with StageLines(tmp_path, stream) as stages:
        stages.write("a warning of some library\n")
        stages.write(BARS[0])
        assert stream.lines() == [BARS[0][1:]]
        write_record(tmp_path, ["test images"], {"test images": 1.0})
        stages.update()
        assert stream.lines() == ["test images: 1 s", BARS[0][1:]], "the bar stays below"
        for part in BARS[1:]:
            stages.write(part)
        stages.write("\rsketch teacher:   0%|    | 0/2")
    assert stream.lines() == ["test images: 1 s", "photo teacher: 100%|####| 2/2"]


def test_a_log_file_shows_no_bars(tmp_path):
    stream = io.StringIO()
    with StageLines(tmp_path, stream) as stages:
        for part in BARS:
            stages.write(part)
    assert stream.getvalue() == ""


def test_a_warning_is_a_line_at_once_and_again_in_the_summary(tmp_path):
    stream = io.StringIO()
    with StageLines(tmp_path, stream) as stages:
        record = {"run_id": "r", "done": [], "seconds": {}, "warnings": ["the teacher guesses"]}
        (tmp_path / "record.json").write_text(json.dumps(record))
        stages.update()
        stages.update()
    assert stream.getvalue().splitlines() == ["WARNING: the teacher guesses"]
    assert "WARNING: the teacher guesses" in summarise_run(tmp_path / "none.csv", tmp_path)


@pytest.mark.parametrize("stream, text_bars", [(Terminal, True), (io.StringIO, False)])
def test_bars_are_asked_for_where_they_can_be_shown(stream, text_bars, tmp_path, monkeypatch):
    "And the environment is afterwards what it was."
    papermill, seen = pytest.importorskip("papermill"), {}
    monkeypatch.setattr(papermill, "execute_notebook", lambda *a, **k: seen.update(os.environ))
    monkeypatch.setattr(sys, "stderr", stream())
    before = dict(os.environ)
    run_notebook({"run_folder": str(tmp_path / "run"), "device": "cpu"})
    assert (seen.get(TEXT_BARS) == "1") == text_bars and dict(os.environ) == before


def rows_of(run_id, **values):
    shared = dict(dataset="toy", seed=0, metric="mAP@all", seconds=1, device="cpu")
    return [{**shared, "run_id": run_id, "method": m, "value": v} for m, v in values.items()]


def test_the_summary_goes_from_the_floor_to_the_ceiling(tmp_path):
    "Of this run alone; the best of each kind; and only what was measured."
    write_record(tmp_path, [], {})
    mine = {"random": 0.1, "teacher-logits": 0.3, "teacher-features": 0.4, "crossx-paper": 0.5}
    append_results(tmp_path / "all.csv", rows_of("other", **{"crossx-dfsbir": 0.99}))
    append_results(tmp_path / "all.csv", rows_of("r", **mine))
    lines = summarise_run(tmp_path / "all.csv", tmp_path).splitlines()
    found = [value for line in lines for value in re.findall(r"0\.\d{3}", line)]
    assert found == ["0.100", "0.400", "0.500"]
    assert any("report.html" in line for line in lines)
    assert any(f"dfsbir index PHOTOS --run {tmp_path}" in line for line in lines)
    assert any(f"dfsbir explore {tmp_path}" in line for line in lines)
    append_results(tmp_path / "all.csv", rows_of("r", **{"data-dependent": 0.9}))
    assert "0.900" in summarise_run(tmp_path / "all.csv", tmp_path)


def test_a_summary_without_results_still_says_what_comes_next(tmp_path):
    text = summarise_run(tmp_path / "none.csv", tmp_path)
    assert "report.html" in text and "dfsbir index" in text


# ---- runs that end early


@pytest.fixture
def stopped(monkeypatch):
    "Makes papermill do something in the run folder, save the notebook, and raise an error."
    papermill = pytest.importorskip("papermill")

    def prepare(error, work=lambda run: None):
        def execute(notebook, output, values, **options):
            run = Path(values["run_folder"])
            work(run)
            shutil.copy(notebook, output)
            raise error

        monkeypatch.setattr(papermill, "execute_notebook", execute)

    return prepare


def test_a_dead_kernel_says_why_and_how_to_go_on(stopped, capsys, tmp_path):
    "In the message, and in the report; what was done stays."
    from nbclient.exceptions import DeadKernelError

    run = tmp_path / "run"
    stopped(DeadKernelError("Kernel died"), lambda run: (run / "metrics.jsonl").write_text("{}\n"))
    text = fails(capsys, "run", "-p", "run_folder", run, "-p", "device", "cpu")
    assert "memory" in text and str(run) in text and "same command" in text
    assert (run / "config.json").is_file() and (run / "metrics.jsonl").is_file()
    page = (run / "report.html").read_text()
    assert "did not finish" in page and "memory" in page


def test_a_kernel_that_is_killed_is_noticed(monkeypatch, tmp_path):
    "By papermill itself, with a notebook whose process ends as one does that the system kills."
    pytest.importorskip("papermill")
    notebook = tmp_path / "n.ipynb"
    notebook.write_text(notebook_of("x = 1", "import os, signal; os.kill(os.getpid(), 9)"))
    monkeypatch.setattr("dfsbir.app.run.packaged_notebook", lambda name: notebook)
    monkeypatch.setattr("dfsbir.app.run.check_start", lambda p: None)
    monkeypatch.setattr("dfsbir.app.run.check_values", lambda *_: {"run_folder": tmp_path / "run"})
    with pytest.raises(RuntimeError, match="memory"):
        run_notebook({})


def teach_in_vain(run):
    "What the notebook leaves where the teacher's training stops at once."
    values = {p.name: p.default for p in notebook_parameters()} | {"run_folder": str(run)}
    open_run(values, prepare_experiment(values)[1]["dfsbir"]).close()
    (run / "teachers").mkdir()
    (run / "record.json").write_text(json.dumps({"run_id": "r", "done": [], "seconds": {}}))


@pytest.mark.parametrize("error", [RuntimeError("bad"), KeyboardInterrupt("stop")], ids=repr)
def test_a_run_that_made_nothing_leaves_no_config(error, stopped, tmp_path):
    "The notebook and its report stay; the corrected command finds no other parameters."
    run = tmp_path / "run"
    stopped(error, teach_in_vain)
    with pytest.raises(type(error)):
        run_notebook({"run_folder": str(run), "device": "cpu"})
    left = {path.name for path in run.iterdir() if not path.name.startswith(".")}
    assert left == {"run_experiment.ipynb", "report.html"}


def test_a_run_that_made_something_keeps_its_config(stopped, tmp_path):
    def work(run):
        teach_in_vain(run)
        (run / "teachers" / "photo.safetensors").write_text("weights")

    run = tmp_path / "run"
    stopped(RuntimeError("bad"), work)
    with pytest.raises(RuntimeError):
        run_notebook({"run_folder": str(run), "device": "cpu"})
    assert (run / "config.json").is_file() and (run / "record.json").is_file()


LONG_RUN = """
import sys
from dfsbir.core.run_folder import RunFolder
run = RunFolder(sys.argv[1], {"seed": 0})
(run.path / "record.json").write_text('{"run_id": "r", "done": [], "seconds": {}}')
(run.path / "report.html").write_text("of the run that goes on")
print("begun", flush=True)
sys.stdin.read()
"""


def test_a_run_that_came_second_leaves_the_first_ones_folder_as_it_is(stopped, tmp_path):
    run, begun = tmp_path / "run", []

    def come_second(run):
        command = [sys.executable, "-c", LONG_RUN, str(run)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        begun.append(subprocess.Popen(command, text=True, **pipes))
        assert begun[0].stdout.readline() == "begun\n"

    stopped(RuntimeError("RunFolderInUse"), come_second)
    with pytest.raises(RuntimeError, match="RunFolderInUse"):
        run_notebook({"run_folder": str(run), "device": "cpu"})
    begun[0].communicate()
    for name in ("config.json", "record.json", "checkpoints", "encoders", "samples"):
        assert (run / name).exists()
    assert (run / "report.html").read_text() == "of the run that goes on"
