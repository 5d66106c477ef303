"""Presets, ranges, and the combinations of settings that would have no effect."""

import json

import pytest
from crossx.helpers import CONFIGS, PLAN

from dfsbir.core.config import ConfigError
from dfsbir.crossx.config import CrossXConfig
from dfsbir.inversion.objective import EstimatorLoss
from dfsbir.students.distillation import Distiller

PRESETS = list(CrossXConfig.PRESETS)
INTERMEDIATE = {
    "students.head.kind": "intermediate",
    "students.head.layers": "blocks.0.bn1, blocks.0.bn2",
    "students.loss.infonce": 0.0,
}


def test_the_plan_has_every_phase():
    assert PLAN == ["synthesize"] * 2 + ["synthesize", "fill", "distill", "distill"] * 2
    assert CONFIGS["paper"].plan() == PLAN
    assert CrossXConfig.preset("open").plan() == ["fill"] + ["distill"] * 1000


def test_pairs_that_a_batch_leaves_over_serve_the_next_round():
    changes = {"pairs.steps": 3, "pairs.batch": 8, "schedule.new_pairs": 10, "schedule.rounds": 4}
    plan = CrossXConfig.preset("cold", {**changes, "schedule.distill_steps": 1}).plan()
    rounds = " ".join(plan).split("distill")[:-1]
    assert [r.split().count("synthesize") for r in rounds] == [6, 3, 3, 3]  # 16, 24, 32, 40 pairs


@pytest.mark.parametrize(
    "name, value",
    [
        ("seed", -1),
        ("seed", 2**32),
        ("precision", "fp8"),
        ("device", "gpu"),
        ("pairs.kind", "things"),
        ("pairs.photo.size", 3),
        ("pairs.photo.size", 15),
        ("pairs.photo.width", 0),
        ("pairs.photo.lr", 0),
        ("pairs.sketch.kind", "strokes"),
        ("pairs.sketch.strokes", 0),
        ("pairs.sketch.templates_per_class", 0),
        ("pairs.conditioned", 1),
        ("pairs.latent", 7),
        ("pairs.batch", 1),
        ("pairs.batch", 40.0),
        ("pairs.warmup_steps", -1),
        ("pairs.warmup_steps", "200"),
        ("pairs.synthesis_steps", -1),
        ("pairs.loss.align", -1),
        ("pairs.loss.bn", "0.5"),
        ("pairs.loss.bn", float("nan")),
        ("pairs.optimizer.kind", "sdg"),
        ("buffer.capacity", 0),
        ("buffer.mixup", 2.0),
        ("buffer.mixup", -0.1),
        ("schedule.rounds", -1),
        ("schedule.new_pairs", 0),
        ("schedule.distill_steps", -1),
        ("students.start.kind", "lukewarm"),
        ("students.start.wise_ft_alpha", 1.1),
        ("students.start.wise_ft_alpha", -0.1),
        ("students.head.kind", "features"),
        ("students.head.temperature", 0.0),
        ("students.head.temperature", -1.0),
        ("students.dim", 1),
        ("students.input_size", -1),
        ("students.lr", None),
        ("students.lr", float("inf")),
        ("students.batch", 1),
        ("students.views", 0),
        ("students.ema_decay", 1.5),
        ("students.ema_decay", 1.0),
        ("logging.log_every", 0),
    ],
    ids=lambda v: str(v),
)
def test_a_value_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(ConfigError) as e:
        CrossXConfig.preset("dfsbir", {name: value})
    assert str(e.value).startswith(name) and repr(value) in str(e.value)


@pytest.mark.parametrize(
    "given, meant",
    [
        ("students.rl", "students.lr"),
        ("student_lr", "students.lr"),
        ("warmup", "pairs.warmup_steps"),
        ("pairs.loss.class", "pairs.loss.class_"),
        ("new_pairs", "schedule.new_pairs"),
        ("ema", "students.ema_decay"),
    ],
)
def test_a_misspelt_name_suggests_the_nearest(given, meant):
    with pytest.raises(ConfigError, match=f"{given}.*{meant}"):
        CrossXConfig.preset("dfsbir", {given: 1})


def test_a_preset_that_does_not_exist():
    with pytest.raises(ValueError, match="paper"):
        CrossXConfig.preset("papers")


@pytest.mark.parametrize(
    "preset, change, named",
    [
        ("dfsbir", {"pairs.warmup_steps": 0}, "warmup_steps"),
        ("dfsbir", {"pairs.loss.class_": 0.0}, "class_"),
        ("dfsbir", {"pairs.conditioned": False}, "conditioned"),
        ("dfsbir", {"pairs.guidance.kind": "teachers"}, "loss.modality"),
        (
            "dfsbir",
            {
                "pairs.guidance.kind": "folders",
                "pairs.guidance.photos": "p",
                "pairs.guidance.sketches": "s",
            },
            "loss.modality",
        ),
        ("dfsbir", {"pairs.loss.modality": 1.0}, "guidance"),
        ("paper", {"pairs.guidance": None}, "guidance"),
        ("paper", {"pairs.loss.modality": 0.0}, "guidance"),
        ("paper", {"pairs.guidance.kind": "folders"}, "pairs.guidance.photos"),
        ("dfsbir", {"students.loss.infonce": 1.0}, "infonce"),
        ("cold", {"pairs.steps": 2, "pairs.snapshots": (0.9, 1.0)}, "numbers \\[2, 2\\]"),
        ("dfsbir", {"students.loss.consistency": 0.0}, "students.loss"),
        ("open", {"students.loss.proxy_anchor": 1.0}, "proxy_anchor"),
        ("dfsbir", {**INTERMEDIATE}, "pairs.kind"),
        ("open", {**INTERMEDIATE, "schedule.rounds": 0}, "schedule.rounds"),
        ("open", {**INTERMEDIATE, "students.start.kind": "cold"}, "start.kind"),
        ("open", {"students.head.kind": "intermediate"}, "students.head.layers"),
        ("open", {**INTERMEDIATE, "students.head.layers": ""}, "students.head.layers"),
        ("open", {**INTERMEDIATE, "students.head.bn_center_weight": 1.5}, "bn_center_weight"),
    ],
    ids=str,
)
def test_settings_without_effect_or_sense_are_refused(preset, change, named):
    with pytest.raises(ConfigError, match=named):
        CrossXConfig.preset(preset, change)


@pytest.mark.parametrize(
    "preset, name, value",
    [
        ("open", "pairs.warmup_steps", 5),
        ("open", "pairs.synthesis_steps", 2),
        ("open", "pairs.loss.align", 1.0),
        ("open", "pairs.guidance.kind", "teachers"),
        ("open", "pairs.photo.width", 8),
        ("paper", "pairs.sketch.strokes", 8),
        ("dfsbir", "pairs.sketch.width", 8),
        ("dfsbir", "students.head.lr", 1e-3),
        ("dfsbir", "students.head.layers", "fc"),
        ("dfsbir", "students.start.net", "dfsbir/tiny"),
        ("paper", "students.start.wise_ft_alpha", 0.5),
    ],
)
def test_a_setting_of_a_part_that_was_not_chosen_is_refused(preset, name, value):
    with pytest.raises(ConfigError, match=f"{name}.*which was not chosen"):
        CrossXConfig.preset(preset, {name: value})


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_change_something_with_every_setting(preset):
    "A preset has no setting that is the default anyway, and none that its kinds do not have."
    changes = CrossXConfig.PRESETS[preset]
    for name in changes:
        rest = {k: v for k, v in changes.items() if k != name}
        try:
            without = CrossXConfig().changed(rest)
        except ConfigError:
            continue  # it is needed
        assert without != CrossXConfig.preset(preset), name


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_the_same_from_json(preset):
    config = CrossXConfig.preset(preset)
    assert CrossXConfig.from_flat(json.loads(json.dumps(config.flat()))) == config


def test_names_of_layers_are_a_list_or_a_text():
    text = CrossXConfig.preset("open", INTERMEDIATE)
    given = CrossXConfig.preset(
        "open", {**INTERMEDIATE, "students.head.layers": ["blocks.0.bn1", "blocks.0.bn2"]}
    )
    assert text == given and text.students.head.layers == ("blocks.0.bn1", "blocks.0.bn2")


def test_every_weight_is_a_term():
    config = CrossXConfig()
    assert set(config.pairs.loss.weights()) == set(EstimatorLoss.TERMS)
    assert set(config.students.loss.weights()) == set(Distiller.TERMS)


def test_every_setting_says_what_it_means():
    for setting in CrossXConfig.settings():
        assert setting.description, setting.name
        assert setting.wanted, setting.name
