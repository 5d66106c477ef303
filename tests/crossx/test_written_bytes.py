"""What a run writes: each pair once, and checkpoints that do not grow with the buffer."""

import json
import os
from collections import Counter

import pytest
import yaml
from conftest import ROOT
from crossx.helpers import CONFIGS, SIDE, begin

import dfsbir.core.checkpoint
from dfsbir.crossx.config import CrossXConfig

PAIRS = 64
PIXELS = 4 * SIDE**2  # bytes of a photo and a sketch
TARGETS = 2 * 4 * 4  # four classes in float32, of both teachers


@pytest.fixture
def written(monkeypatch):
    "Bytes and files that were put into place, by kind."
    total, count = Counter(), Counter()
    replace = os.replace

    def counted(temporary, path):
        kind = "pairs" if path.parent.name.endswith("-pairs") else path.stem
        total[kind] += os.path.getsize(temporary)
        count[kind] += 1
        replace(temporary, path)

    monkeypatch.setattr(dfsbir.core.checkpoint.os, "replace", counted)
    return total, count


def run_of(teachers, folder, rounds, distill_steps=4):
    "A run that saves after every action."
    changes = {
        "schedule.rounds": rounds,
        "schedule.new_pairs": PAIRS,
        "schedule.distill_steps": distill_steps,
        "buffer.capacity": 2 * PAIRS,
        "logging.save_every": 1,
    }
    crossx, run = begin(teachers, CONFIGS["dfsbir"].changed(changes), folder)
    crossx.fit(run, progress=False)
    return crossx.config.plan()


@pytest.mark.parametrize("rounds", [1, 2, 4])
def test_pairs_are_written_once_a_round_however_often_a_run_saves(
    teachers, tmp_path, written, rounds
):
    total, count = written
    plan = run_of(teachers, tmp_path / "run", rounds)
    assert count["pairs"] == rounds, "one file for each time that pairs came"
    assert count["last"] == len(plan) + 1, "and a checkpoint after every action, and at the end"
    once = rounds * PAIRS * (PIXELS + TARGETS)
    assert once < total["pairs"] < 1.1 * once + 5_000 * rounds
    kept = sum(f.stat().st_size for f in (tmp_path / "run" / "checkpoints").rglob("pairs-*"))
    assert kept < 3.5 * PAIRS * (PIXELS + TARGETS), "files whose pairs have left are gone"


def test_a_checkpoint_does_not_grow_with_the_pairs(teachers, tmp_path):
    sizes = []
    for pairs in (8, 512):
        changes = {"schedule.rounds": 1, "schedule.new_pairs": pairs, "buffer.capacity": pairs}
        folder = tmp_path / f"{pairs}"
        crossx, run = begin(teachers, CONFIGS["dfsbir"].changed(changes), folder)
        crossx.fit(run, progress=False)
        sizes.append((run.checkpoints / "last.safetensors").stat().st_size)
    assert sizes[1] == pytest.approx(sizes[0], rel=0.01)


@pytest.mark.parametrize("preset", ["dfsbir", "paper"])
def test_the_recipe_at_full_size_writes_gigabytes(preset):
    "ResNet-50 at 224 px: students, their average and Adam's two moments in each checkpoint."
    recipe = yaml.safe_load((ROOT / "nbs" / "experiments" / "full_size.yaml").read_text())
    changes = json.loads(recipe["changes"])
    own = changes.pop(preset)
    changes.pop({"dfsbir": "paper", "paper": "dfsbir"}[preset])
    config = CrossXConfig.preset(preset, changes, own)
    plan = config.plan()
    saves = len(plan) // config.logging.save_every + 1
    checkpoint = 2 * 4 * 4 * 26_000_000  # two nets, four of each weight, float32
    pairs = min(plan.count("fill"), saves) * config.schedule.new_pairs * 4 * 224**2
    assert saves * checkpoint + pairs < 50e9
