"""Pairs of an earlier run for other students: equal to the bit, and refused where they differ."""

import json

import pytest
import torch

from dfsbir.core.privacy import note_opening
from dfsbir.core.run_folder import RunFolder
from dfsbir.core.types import MODALITIES, Normalizer
from dfsbir.crossx.build import build_crossx
from dfsbir.crossx.config import CrossXConfig
from dfsbir.crossx.taken_pairs import take_pairs
from dfsbir.teachers.nets import build_net
from dfsbir.teachers.teacher import Teacher

NAMES = ("cup", "fish", "star")


def teachers(first=0):
    made = []
    for seed, modality in enumerate(MODALITIES, first):
        torch.manual_seed(seed)
        card = {"source": "dfsbir", "name": "tiny"}
        net = build_net("dfsbir", "tiny", 3)
        made.append(Teacher(net, NAMES, Normalizer(16), modality, card=card))
    return made


def config(preset="cold", **changes):
    pairs = {
        "cold": {"pairs.steps": 2, "pairs.batch": 6, "students.net": "dfsbir/tiny"},
        "dfsbir": {"pairs.warmup_steps": 3, "pairs.batch": 6, "pairs.photo.width": 4},
    }[preset]
    common = {
        "device": "cpu",
        "pairs.photo.size": 16,
        "pairs.sketch.size": 16,
        "schedule.new_pairs": 6,
        "schedule.distill_steps": 3,
        "students.batch": 3,
        "buffer.capacity": 6,
    }
    return CrossXConfig.preset(preset, common, pairs, changes)


def fitted(folder, settings):
    crossx = build_crossx(*teachers(), settings)
    with RunFolder(folder, settings.flat()) as run:
        crossx.fit(run, progress=False)
    return crossx


@pytest.mark.parametrize("preset", ["cold", "dfsbir"])
def test_other_students_get_the_same_pairs(tmp_path, preset):
    made = fitted(tmp_path / "made", config(preset))
    other = config(preset, **{"students.lr": 0.01})
    crossx = build_crossx(*teachers(), other)
    take_pairs(crossx, tmp_path / "made")
    assert torch.equal(crossx.buffer.pairs.photo, made.buffer.pairs.photo)
    with RunFolder(tmp_path / "taken", other.flat()) as run:
        crossx.fit(run, progress=False)
    assert crossx.position == len(other.plan())
    log = (tmp_path / "taken" / "metrics.jsonl").read_text()
    assert "estimator/" not in log


def test_a_run_with_taken_pairs_resumes_without_the_other(tmp_path):
    fitted(tmp_path / "made", config())
    other = config(**{"students.lr": 0.01, "logging.save_every": 1})

    class Stop(Exception):
        pass

    def stop(crossx, action, scalars):
        if crossx.position == 5:
            raise Stop

    crossx = build_crossx(*teachers(), other)
    take_pairs(crossx, tmp_path / "made")
    with pytest.raises(Stop), RunFolder(tmp_path / "taken", other.flat()) as run:
        crossx.fit(run, [stop], progress=False)
    (tmp_path / "made").rename(tmp_path / "away")
    again = build_crossx(*teachers(), other)
    with RunFolder(tmp_path / "taken", other.flat()) as run:
        again.fit(run, progress=False)
    assert again.distiller.steps_done == 3


@pytest.mark.parametrize(
    "name, value",
    [("seed", 1), ("pairs.steps", 3), ("schedule.new_pairs", 5), ("pairs.sketch.bias", 1.0)],
)
def test_pairs_of_other_settings_are_refused(tmp_path, name, value):
    fitted(tmp_path, config())
    with pytest.raises(ValueError, match=name):
        take_pairs(build_crossx(*teachers(), config(**{name: value})), tmp_path)


def test_pairs_of_other_teachers_or_classes_are_refused(tmp_path):
    fitted(tmp_path, config())
    with pytest.raises(ValueError, match="weights"):
        take_pairs(build_crossx(*teachers(first=5), config()), tmp_path)
    crossx = build_crossx(*teachers(), config(), {"star": ""})
    with pytest.raises(ValueError, match="classes"):
        take_pairs(crossx, tmp_path)


def test_what_has_no_pairs_to_give(tmp_path):
    with pytest.raises(FileNotFoundError, match="no run"):
        take_pairs(build_crossx(*teachers(), config()), tmp_path)
    with pytest.raises(ValueError, match="rounds 2"):
        take_pairs(build_crossx(*teachers(), config(**{"schedule.rounds": 2})), tmp_path)
    with pytest.raises(ValueError, match="depend on the students"):
        take_pairs(build_crossx(*teachers(), config(**{"pairs.loss.adversarial": 1.0})), tmp_path)


def test_a_run_that_stopped_before_its_pairs_were_ready(tmp_path):
    settings = config(**{"logging.save_every": 1})

    def stop(crossx, action, scalars):
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"), RunFolder(tmp_path, settings.flat()) as run:
        build_crossx(*teachers(), settings).fit(run, [stop], progress=False)
    with pytest.raises(ValueError, match="not finished"):
        take_pairs(build_crossx(*teachers(), settings), tmp_path)


def test_reasons_against_a_guarantee_come_along(tmp_path):
    fitted(tmp_path, config())
    note_opening(tmp_path, "an image was opened")
    crossx = build_crossx(*teachers(), config(**{"students.lr": 0.01}))
    take_pairs(crossx, tmp_path)
    assert "an image was opened" in crossx.openings
    assert json.loads((tmp_path / "config.json").read_text())["crossx"]["classes"] == list(NAMES)
