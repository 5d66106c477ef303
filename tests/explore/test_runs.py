"Runs opened for reading."

import json

import pytest
import torch

from dfsbir.core.checkpoint import load_state
from dfsbir.core.types import MODALITIES, Modality
from dfsbir.crossx.build import build_crossx
from dfsbir.explore.runs import Run, find_runs, tiny_run
from dfsbir.explore.samples import sample_pairs


def test_runs_are_found_by_name_and_nothing_is_written(home, run):
    before = sorted(home.rglob("*"))
    assert list(find_runs(home)) == ["one", "one/paper"]
    assert list(find_runs(home / "one" / "paper")) == ["paper"]
    assert run.generators and run.teachers and run.encoders and run.metrics() and run.previews
    assert sorted(home.rglob("*")) == before


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
