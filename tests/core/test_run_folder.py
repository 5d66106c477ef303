"Run folders: going on, beginning anew, two writers, the log."

import json
import subprocess
import sys

import pytest
from conftest import ROOT

from dfsbir.core.run_folder import RunFolder, RunFolderInUse

CONFIG = {"lr": 0.1, "seed": 0, "sizes": (1, 2)}
WRITER = """
import sys
from dfsbir.core.run_folder import RunFolder
run = RunFolder(sys.argv[1], {"lr": 0.1, "seed": 0, "sizes": (1, 2)})
print("open", flush=True)
sys.stdin.read()
"""


def second_process(folder):
    "A process that opens the folder for writing and keeps it until its input ends."
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, folder],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def stop(process):
    process.communicate(timeout=60)


# ---- the same run


def test_the_same_config_goes_on(tmp_path):
    run = RunFolder(tmp_path / "run", CONFIG)
    run.log(1, loss=2)
    run.save_checkpoint("last", {"step": 1})
    again = RunFolder(tmp_path / "run", CONFIG)
    assert again.metrics() == [{"step": 1, "loss": 2.0}]
    assert again.has_checkpoint("last") and not again.has_checkpoint("first")
    assert again.load_checkpoint("last") == {"step": 1}
    assert again.config["parameters"] == {"lr": 0.1, "seed": 0, "sizes": [1, 2]}
    assert again.config["versions"]["torch"]


def test_another_config_lists_the_differences(tmp_path):
    RunFolder(tmp_path / "run", CONFIG).log(1, loss=2)
    with pytest.raises(ValueError) as error:
        RunFolder(tmp_path / "run", {"lr": 0.2, "sizes": (1, 2), "new": 3})
    listed = [line.strip() for line in str(error.value).splitlines()]
    assert {"lr: 0.1 there, 0.2 here", "new: absent there, 3 here"} <= set(listed)
    assert "seed: 0 there, absent here" in listed
    assert not any(line.startswith("sizes") for line in listed)
    assert RunFolder(tmp_path / "run").config["parameters"]["lr"] == 0.1


@pytest.mark.parametrize(
    "made",
    [
        "checkpoints/last.safetensors",
        "encoders/photo.safetensors",
        "samples/a.png",
        "teachers/photo.safetensors",
        "metrics.jsonl",
    ],
)
def test_a_folder_without_results_is_begun_anew(tmp_path, made):
    "A run that died at once does not keep its folder; one that has made anything does."
    RunFolder(tmp_path / "run", CONFIG)
    (tmp_path / "run" / "record.json").write_text("{}")
    (tmp_path / "run" / "teachers").mkdir()
    (tmp_path / "run" / "teachers" / "photo.lock").touch()  # of a process that was killed
    run = RunFolder(tmp_path / "run", {"lr": 0.2})
    assert not run.has_results
    assert RunFolder(tmp_path / "run").config["parameters"] == {"lr": 0.2}
    (tmp_path / "run" / made).parent.mkdir(exist_ok=True)
    (tmp_path / "run" / made).write_text("x")
    assert run.has_results
    with pytest.raises(ValueError, match="lr"):
        RunFolder(tmp_path / "run", CONFIG)


def test_what_is_pinned_may_not_change(tmp_path):
    run = RunFolder(tmp_path / "run", CONFIG)
    run.pin("teachers", {"photo": "a", "sketch": "b"})
    run.log(1, loss=2)
    again = RunFolder(tmp_path / "run", CONFIG)
    again.pin("teachers", {"photo": "a", "sketch": "b"})
    with pytest.raises(ValueError, match="sketch: 'b' there, 'c' here"):
        again.pin("teachers", {"photo": "a", "sketch": "c"})
    assert RunFolder(tmp_path / "run").config["teachers"] == {"photo": "a", "sketch": "b"}


# ---- reading and writing


def test_reading_writes_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json"):
        RunFolder(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps({"parameters": {}, "git": None}))
    run = RunFolder(tmp_path / "run")
    assert [path.name for path in run.path.iterdir()] == ["config.json"]
    for write in (
        lambda: run.log(1, loss=1),
        lambda: run.rewind(0),
        lambda: run.save_checkpoint("last", {}),
        lambda: run.pin("teachers", {}),
    ):
        with pytest.raises(PermissionError, match="reading"):
            write()


def test_two_writers_are_refused_and_readers_are_not(tmp_path):
    folder = tmp_path / "run"
    other = second_process(folder)
    try:
        assert other.stdout.readline() == "open\n", other.stderr.read()
        with pytest.raises(RunFolderInUse, match="run"):
            RunFolder(folder, CONFIG)
        assert RunFolder(folder).config["parameters"]["lr"] == 0.1
    finally:
        stop(other)
    RunFolder(folder, CONFIG).log(1, loss=1)


def test_a_lent_folder_is_written_by_others_and_comes_back(tmp_path):
    run = RunFolder(tmp_path / "run", CONFIG)
    run.log(1, loss=2)
    with run.lent():
        process = second_process(tmp_path / "run")
        assert process.stdout.readline() == "open\n"
        stop(process)
        RunFolder(tmp_path / "run", CONFIG).pin("teachers", {"photo": "a"})
    assert run.config["teachers"] == {"photo": "a"}, "what others noted is known"
    refused = second_process(tmp_path / "run")
    assert "RunFolderInUse" in refused.communicate(timeout=60)[1]


def test_a_killed_writer_leaves_no_lock(tmp_path):
    other = second_process(tmp_path / "run")
    other.stdout.readline()
    other.kill()
    stop(other)
    RunFolder(tmp_path / "run", CONFIG)


@pytest.mark.parametrize("way", ["close", "with", "forgotten"])
def test_the_folder_is_let_go(tmp_path, way):
    run = RunFolder(tmp_path / "run", CONFIG)
    if way == "close":
        run.close()
    elif way == "with":
        with run:
            pass
    else:
        del run
    other = second_process(tmp_path / "run")
    assert other.stdout.readline() == "open\n", other.stderr.read()
    stop(other)


def test_one_process_may_open_its_folder_again(tmp_path):
    "As a notebook does whose cell is run twice; the lock holds until the last one is closed."
    first, second = (RunFolder(tmp_path / "run", CONFIG) for _ in range(2))
    first.close()
    other = second_process(tmp_path / "run")
    assert other.stdout.readline() == ""
    stop(other)
    second.close()
    other = second_process(tmp_path / "run")
    assert other.stdout.readline() == "open\n", other.stderr.read()
    stop(other)


# ---- the log


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    run = RunFolder(tmp_path / "run", CONFIG)
    for step in range(3):
        run.log(step, loss=step)
    file = run.path / "metrics.jsonl"
    file.write_text(file.read_text()[:-5])
    assert [line["step"] for line in run.metrics()] == [0, 1]
    run.rewind(0)
    run.log(1, loss=9)
    assert [line["loss"] for line in run.metrics()] == [0, 9]


def test_it_shows_its_parameters(tmp_path):
    run = RunFolder(tmp_path / "run", CONFIG)
    assert "| lr | 0.1 |" in run._repr_markdown_()
