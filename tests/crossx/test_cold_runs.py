"""Whole runs of cold students on pyramid pairs: config, resuming, the law, baselines."""

import pytest
import torch

from dfsbir.baselines import data_dependent, gaussian_prior, meta_data, uni_modal
from dfsbir.core.config import ConfigError
from dfsbir.core.run_folder import RunFolder
from dfsbir.core.types import MODALITIES, Modality, Normalizer
from dfsbir.crossx.build import build_crossx, config_for_teachers
from dfsbir.crossx.config import CrossXConfig
from dfsbir.data.toy import toy_pairs
from dfsbir.students.encoder import load_encoders
from dfsbir.teachers.nets import build_net
from dfsbir.teachers.teacher import Teacher
from dfsbir.teachers.torchscript import ScriptNet

NAMES = ("cup", "fish", "star")
SMALL = {
    "device": "cpu",
    "pairs.photo.size": 16,
    "pairs.sketch.size": 16,
    "pairs.steps": 3,
    "pairs.batch": 6,
    "schedule.new_pairs": 10,
    "schedule.distill_steps": 4,
    "students.batch": 5,
    "students.net": "dfsbir/tiny",
}


@pytest.fixture
def teachers():
    made = []
    for seed, modality in enumerate(MODALITIES):
        torch.manual_seed(seed)
        made.append(Teacher(build_net("dfsbir", "tiny", 3), NAMES, Normalizer(16), modality))
    return made


def small(**changes):
    return CrossXConfig.preset("cold", **{**SMALL, **changes})


def test_the_plan_optimises_whole_batches_then_fills_then_distils():
    plan = small(**{"schedule.rounds": 2, "pairs.snapshots": [0.5, 1.0]}).plan()
    assert plan == 2 * (["synthesize"] * 3 + ["fill"] + ["distill"] * 4)


def weights(crossx):
    return [v.clone() for v in crossx.distiller.averaged.state_dict().values()]


@pytest.mark.parametrize("stop", [2, 5, 8])
def test_a_stopped_run_ends_like_an_uninterrupted_one(teachers, tmp_path, stop):
    config = small(**{"logging.save_every": 1})
    whole = build_crossx(*teachers, config)
    whole.fit(RunFolder(tmp_path / "whole", config.flat()), progress=False)

    class Stop(Exception):
        pass

    def stop_there(crossx, action, scalars):
        if crossx.position == stop:
            raise Stop

    with pytest.raises(Stop), RunFolder(tmp_path / "cut", config.flat()) as run:
        build_crossx(*teachers, config).fit(run, [stop_there], progress=False)
    again = build_crossx(*teachers, config)
    again.fit(RunFolder(tmp_path / "cut", config.flat()), progress=False)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(again), strict=True))
    encoders = load_encoders(tmp_path / "cut" / "encoders")
    assert encoders["photo"](torch.rand(2, 3, 16, 16)).shape == (2, 64)


def test_adversary_in_a_second_round(teachers):
    config = small(**{"schedule.rounds": 2, "pairs.loss.adversarial": 1.0})
    crossx = build_crossx(*teachers, config)
    crossx.fit(progress=False)
    assert crossx.distiller.steps_done == 8
    assert len(crossx.buffer) == 20


def test_one_encoder_for_both(teachers):
    encoders = build_crossx(*teachers, small(**{"students.shared": True})).fit(progress=False)
    photo, sketch = (encoders[m].net.state_dict() for m in MODALITIES)
    assert all(torch.equal(photo[k], sketch[k]) for k in photo)


def test_each_student_has_an_input_of_its_own(teachers):
    sizes = {"students.input_size": 24, "students.sketch_input_size": 20}
    encoders = build_crossx(*teachers, small(**sizes)).fit(progress=False)
    assert [encoders[m].normalizer.size for m in MODALITIES] == [24, 20]


@pytest.mark.parametrize(
    "change", [{"students.sketch_net": "dfsbir/grey"}, {"students.sketch_input_size": 20}]
)
def test_a_shared_net_has_one_name_and_one_input(change):
    with pytest.raises(ConfigError, match="shared"):
        small(**{"students.shared": True, **change})


def test_baselines_at_the_same_budget(teachers):
    config = small()
    photos, sketches = toy_pairs(30, size=28, classes=NAMES)
    made = [
        build_crossx(*teachers, uni_modal(config)),
        build_crossx(*teachers, meta_data(config)),
        gaussian_prior(*teachers, config),
        data_dependent(*teachers, config, photos, sketches),
    ]
    for crossx in made:
        crossx.fit(progress=False)
        assert crossx.distiller.steps_done == 4
    assert uni_modal(config).pairs.loss.align == 0
    assert meta_data(config).pairs.loss.class_ == 0


@pytest.mark.parametrize(
    "change",
    [
        {"pairs.loss.modality": 1.0},
        {"pairs.guidance.kind": "procedural"},
        {"students.lr": -1.0},
        {"students.loss.consistency": 1.0},
        {"pairs.latent": 64},
        {"pairs.photo.bn": [1.0]},
    ],
)
def test_settings_that_would_do_nothing_are_refused(change):
    with pytest.raises(ConfigError):
        small(**change)


def test_guidance_and_its_term(teachers):
    config = small(**{"pairs.loss.modality": 1.0, "pairs.guidance.kind": "teachers"})
    crossx = build_crossx(*teachers, config)
    scalars = crossx.run_step("synthesize")
    assert "estimator/photo/modality" in scalars
    assert crossx.preview().of(Modality.SKETCH).shape == (6, 1, 16, 16)


def test_teachers_that_are_only_programs_get_cold_students(teachers):
    programs = []
    for teacher in teachers:
        script = torch.jit.trace(teacher.net, torch.rand(1, 3, 16, 16))
        programs.append(Teacher(ScriptNet(script), NAMES, Normalizer(16), teacher.modality))
    config = CrossXConfig.preset("dfsbir", {"pairs.photo.size": 16, "pairs.sketch.size": 16})
    with pytest.warns(UserWarning, match="random weights"):
        crossx = build_crossx(*programs, config)
    assert crossx.config.students.kind == "cold"
    assert crossx.config.pairs.kind == "pyramid"
    crossx.pairs.batch = 4
    crossx.run_step("synthesize")
    assert crossx.preview().of(Modality.PHOTO).shape == (4, 3, 16, 16)


def test_teachers_with_a_name_keep_the_config(teachers):
    config = CrossXConfig.preset("dfsbir")
    named = {t.modality: t for t in teachers}
    for teacher in teachers:
        teacher.card.update(source="dfsbir", name="tiny")
    assert config_for_teachers(config, named) is config
