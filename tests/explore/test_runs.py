"Runs opened for reading."

import json
import os
import shutil

import pytest
import torch

from dfsbir.core.checkpoint import load_state
from dfsbir.core.types import MODALITIES, Modality
from dfsbir.crossx.build import build_crossx
from dfsbir.explore.runs import Run, find_runs, tiny_run
from dfsbir.explore.samples import sample_pairs


def test_runs_are_found_by_name_and_nothing_is_written(home, run):
    before = sorted(home.rglob("*"))
    assert sorted(find_runs(home)) == ["one", "one/paper"]
    assert list(find_runs(home / "one" / "paper")) == ["paper"]
    assert run.generators and run.teachers and run.encoders and run.metrics() and run.previews
    assert sorted(home.rglob("*")) == before


def test_the_newest_run_comes_first(home, tmp_path):
    for name, age in (("b", 20), ("a", 30), ("c", 10)):
        shutil.copytree(home / "one" / "encoders", tmp_path / name / "encoders")
        shutil.copy(home / "one" / "config.json", tmp_path / name)
        file = tmp_path / name / "encoders" / "photo.safetensors"
        now = file.stat().st_mtime
        os.utime(file, (now - age, now - age))
    assert list(find_runs(tmp_path)) == ["c", "b", "a"]


def test_runs_on_objects_are_found_and_have_no_generators(objects):
    (found,) = find_runs(objects.path.parent).values()
    assert found.pairs_kind == "objects" and found.classes
    with pytest.raises(ValueError, match="estimators"):
        _ = found.generators


def test_runs_of_other_methods_are_left_out(home, tmp_path):
    shutil.copytree(home / "one" / "encoders", tmp_path / "other" / "encoders")
    file = tmp_path / "other" / "config.json"
    file.write_text(json.dumps({"parameters": {"method": "another"}}))
    shutil.copytree(home / "one" / "encoders", tmp_path / "alone" / "encoders")
    assert find_runs(tmp_path) == {}


def test_a_tiny_run_reports_what_it_does(tmp_path):
    said = []
    small = {"images": 50, "epochs": 1, "warmup": 2, "student_steps": 1}
    tiny_run(tmp_path, ("car", "fish"), **small, report=said.append)
    assert "photo teacher" in said[0] and "sketch teacher" in said[1]
    assert "4 of 4" in said[-1]


def test_generators_come_back_as_they_were_saved(run):
    "The pairs drawn from the loaded generators are those of the last saved picture."
    crossx = build_crossx(*run.teachers.values(), run.config)
    checkpoints = run.path / "checkpoints"
    state = load_state(checkpoints / "last.safetensors")
    crossx.load_state_dict(state, checkpoints / "last-pairs")
    noise, label = crossx.pairs.preview_noise(16)
    for m in MODALITIES:
        assert torch.equal(crossx.preview().of(m), run.generators[m](noise, label))


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        Run(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"parameters": {}}))
    run = Run(tmp_path)
    with pytest.raises(FileNotFoundError, match="teachers/"):
        _ = run.teachers


def test_a_tiny_run_is_opened_again_not_made_again(home, run):
    file = run.path / "encoders" / "photo.safetensors"
    before = file.stat().st_mtime_ns
    assert tiny_run(home / "one").classes == run.classes
    assert file.stat().st_mtime_ns == before


def test_teacher_posteriors_are_its_softmax(run):
    "Both teachers know the same classes in the same order, so there is nothing to add up."
    x = sample_pairs(run, "car", 4).photo
    logits = run.teachers[Modality.PHOTO](x).logits
    wanted = (logits / run.config.students.head.temperature).softmax(1)
    torch.testing.assert_close(run.posteriors("teacher", "photo", x), wanted)


def test_what_was_computed_is_kept_with_the_run(home):
    first, again = Run(home / "one"), Run(home / "one")
    made = first.computed("key", lambda: [1])
    assert first.computed("key", lambda: [2]) is made
    assert again.computed("key", lambda: [3]) == [3]
