"""The config: methods as presets, and what it refuses."""

import pytest

from dfsbir.core.config import ConfigError
from dfsbir.finegrained.config import METHODS, FineGrainedConfig, pretext_of

NAMES = list(FineGrainedConfig.PRESETS)


@pytest.mark.parametrize(
    "preset, changes, says",
    [
        ("triplet", {"pairs.miner": "soft"}, "pairs.miner"),
        ("triplet", {"training.ema_decay": 1.0}, "training.ema_decay"),
        ("triplet", {"training.ema_decay": 1.5}, "training.ema_decay"),
        ("triplet", {"pairs.batch": 1}, "pairs.batch"),
        ("triplet", {"pairs.batch": "32"}, "pairs.batch"),
        ("triplet", {"pairs.cross": None}, "pairs"),
        ("triplet", {"pairs": None}, "null"),
        ("triplet", {"pairs.cross.weight": -1.0}, "pairs.cross.weight"),
        ("triplet", {"unlabelled.batch": 8}, "unlabelled"),
        ("triplet", {"precision": "fp8"}, "precision"),
        ("full", {"distillation.k": 40}, "distillation.k"),
        ("full", {"unlabelled": None}, "kd_unlabelled"),
        ("full", {"distillation.kind": "other"}, "distillation.kind"),
        ("rkd", {"distillation.tau": 0.1}, "neighbours"),
        ("holef", {"encoder.head": "both"}, "encoder.head"),
        ("triplet", {"encoder.distance.penalty": 1.0}, "higher-order"),
        (
            "jigsaw-pretext",
            {
                "unlabelled.edge.weight": 1.0,
                "distillation": {"kind": "neighbours", "photo": 0.0, "sketch": 0.0},
            },
            "edge.*kd_unlabelled",
        ),
        ("triplet", {"unlabeled.batch": 8}, "unlabelled.batch"),
    ],
)
def test_what_makes_no_sense_is_refused(preset, changes, says):
    with pytest.raises(ConfigError, match=says):
        FineGrainedConfig.preset(preset, changes)


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValueError, match="'best'"):
        FineGrainedConfig.preset("best")


def test_the_four_methods_add_one_thing_each():
    flat = {name: FineGrainedConfig.preset(name).flat() for name in NAMES}

    def parts(a, b):
        "Which parts differ between two presets."
        names = flat[a].keys() | flat[b].keys()
        differ = {n for n in names if flat[a].get(n, "absent") != flat[b].get(n, "absent")}
        return {".".join(n.split(".")[:2]) for n in differ}

    assert parts("triplet", "triplet-intra") == {"pairs.photo", "pairs.sketch"}
    assert parts("triplet-intra", "strong") == {"training.ema_decay"}
    assert {p.split(".")[0] for p in parts("strong", "full")} == {"distillation", "unlabelled"}


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_survives_its_flat_form(name):
    config = FineGrainedConfig.preset(name)
    assert FineGrainedConfig.from_flat(config.flat()) == config


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_learns_something(name):
    assert any(FineGrainedConfig.preset(name).weights.values())


def test_every_setting_says_what_it_is():
    settings = FineGrainedConfig.settings()
    assert len(settings) > 40
    assert not [setting.name for setting in settings if not setting.description]


def test_what_a_method_starts_from():
    found = {name: pretext_of(name) for name in METHODS if pretext_of(name)}
    assert found == {
        "jigsaw": "jigsaw-pretext",
        "jigsaw-intra": "jigsaw-pretext",
        "edge-pretrain": "edge-pretext",
    }
    assert set(found.values()) <= set(NAMES) and not set(found.values()) & set(METHODS)
