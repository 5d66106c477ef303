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
from dfsbir.teachers.loading import save_teacher


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


def test_verifiers_are_those_in_the_folder(run, paper, tmp_path):
    assert run.verifiers == {}
    shutil.copytree(run.path, tmp_path / "one")
    folder = tmp_path / "one" / "verifiers"
    save_teacher(run.teachers[Modality.PHOTO], folder / "photo.safetensors")
    for path in (tmp_path / "one", tmp_path / "one" / "paper"):  # the inner run has its outer one's
        found = Run(path).verifiers
        assert list(found) == [Modality.PHOTO] and found[Modality.PHOTO].classes


def test_a_run_inside_another_comes_after_it(ceiling):
    "Although it is newer: who looks at a run wants the run, not its ceiling."
    assert list(find_runs(ceiling.path.parent.parent)) == ["one", "one/ceiling"]
    assert ceiling.finished >= Run(ceiling.path.parent).finished
    assert "real" in ceiling.learnt_from and ceiling.image_size == 32


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


def test_a_run_without_its_sketch_encoder_is_not_finished(home, tmp_path):
    "The photo encoder is written first."
    shutil.copytree(home / "one", tmp_path / "one", ignore=shutil.ignore_patterns("paper"))
    assert list(find_runs(tmp_path)) == ["one"]
    (tmp_path / "one" / "encoders" / "sketch.safetensors").unlink()
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
    config = {"parameters": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="CrossX"):
        Run(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "crossx": {}}))
    run = Run(tmp_path)
    with pytest.raises(FileNotFoundError, match="teachers/"):
        _ = run.teachers


def experiment_run(home, folder, **parameters):
    "A copy of a run without its teachers, as an experiment with brought teachers leaves it."
    shutil.copytree(home / "one", folder, ignore=shutil.ignore_patterns("teachers", "paper"))
    config = json.loads((folder / "config.json").read_text())
    given = {"dataset": "toy", "size": 32, "teacher_size": 0, "aliases": ""}
    for m in MODALITIES:
        given |= {f"{m}_teacher": str(home / "one" / "teachers" / f"{m}.safetensors")}
        given |= {f"{m}_card": ""}
    config["parameters"] = {**given, **parameters}
    (folder / "config.json").write_text(json.dumps(config))
    return Run(folder)


def test_teachers_that_were_brought_along_are_read_where_they_were(home, run, tmp_path):
    brought = experiment_run(home, tmp_path / "run")
    x = sample_pairs(run, "car", 2)
    for m in MODALITIES:
        wanted = run.posteriors("teacher", m, x.of(m))
        assert torch.equal(brought.posteriors("teacher", m, x.of(m)), wanted)


def test_a_brought_teacher_that_has_changed_is_refused(home, tmp_path):
    file = tmp_path / "photo.safetensors"
    teacher = Run(home / "one").teachers[Modality.PHOTO]
    with torch.no_grad():
        next(teacher.net.parameters()).add_(1.0)
    save_teacher(teacher, file)
    changed = experiment_run(home, tmp_path / "run", photo_teacher=str(file))
    with pytest.raises(ValueError, match="changed"):
        _ = changed.teachers


def test_aliases_of_the_experiment(home, tmp_path):
    text = json.dumps({"automobile": "car"})
    assert experiment_run(home, tmp_path / "a", aliases=text).aliases == {"automobile": "car"}
    (tmp_path / "table.json").write_text(text)
    file = str(tmp_path / "table.json")
    assert experiment_run(home, tmp_path / "b", aliases=file).aliases == {"automobile": "car"}


def test_files_that_lie_beside_a_run_move_with_it(home, tmp_path, monkeypatch):
    "The experiment names them from the folder in which it was started."
    first, moved = tmp_path / "here", tmp_path / "there"
    first.mkdir()
    teacher = first / "photo.safetensors"
    shutil.copy(home / "one" / "teachers" / "photo.safetensors", teacher)
    (first / "aliases.json").write_text(json.dumps({"automobile": "car"}))
    given = {"aliases": "here/aliases.json", "photo_teacher": "here/photo.safetensors"}
    experiment_run(home, first / "two", **given)
    first.rename(moved)
    monkeypatch.chdir(home)
    run, known = Run(moved / "two"), Run(home / "one")
    assert run.aliases == {"automobile": "car"}
    assert run.teachers[Modality.PHOTO].classes == known.teachers[Modality.PHOTO].classes


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
