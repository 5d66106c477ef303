"""Whole runs of cold students on pyramid pairs: config, resuming, the law, baselines."""

import pytest
import torch
from crossx.helpers import assert_resumes

from dfsbir.baselines import data_dependent, gaussian_prior, meta_data, uni_modal
from dfsbir.core.config import ConfigError
from dfsbir.core.device import make_fabric
from dfsbir.core.types import MODALITIES, Modality, Normalizer
from dfsbir.crossx.build import build_crossx, config_for_teachers
from dfsbir.crossx.config import CrossXConfig
from dfsbir.crossx.pairs import ProceduralPairs, PyramidPairs
from dfsbir.data.toy import toy_pairs
from dfsbir.students.encoder import load_encoders
from dfsbir.teachers.class_map import align_classes
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


def test_pages_that_are_drawn_again_need_fewer_batches():
    strokes = {"pairs.sketch.strokes": 3, "pairs.sketch.redraws": 2, "schedule.new_pairs": 36}
    assert small(**strokes).plan().count("synthesize") == 2 * 3  # 6 pairs, three times


@pytest.mark.parametrize("stop", [2, 5, 8])
def test_a_stopped_run_ends_like_an_uninterrupted_one(teachers, tmp_path, stop):
    assert_resumes(teachers, small(**{"logging.save_every": 1}), stop, tmp_path)
    encoders = load_encoders(tmp_path / "cut" / "encoders")
    assert encoders["photo"](torch.rand(2, 3, 16, 16)).shape == (2, 64)


def test_a_stopped_run_goes_on_with_a_fused_optimiser(teachers, tmp_path, monkeypatch):
    "As graphics cards get one: it wants momenta that lie in memory as the weights do."
    sgd = torch.optim.SGD
    fused = lambda *args, **options: sgd(*args, **{**options, "fused": True})  # noqa: E731
    monkeypatch.setattr(torch.optim, "SGD", fused)
    assert_resumes(teachers, small(**{"logging.save_every": 1}), 7, tmp_path)


@pytest.mark.parametrize("stop", [6, 13])
def test_a_stopped_run_makes_the_same_views_again(teachers, tmp_path, stop):
    "In the first round and in the second, whose buffer holds more pairs."
    changes = {"students.kept_views": 12, "schedule.rounds": 2, "logging.save_every": 1}
    assert_resumes(teachers, small(**changes), stop, tmp_path)


@pytest.mark.parametrize("kept_views", [0, 12])
def test_a_stopped_run_draws_the_same_objects_again(teachers, tmp_path, kept_views):
    changes = {"students.objects": 0.5, "students.kept_views": kept_views, "logging.save_every": 1}
    assert_resumes(teachers, small(**changes), 6, tmp_path)


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


@pytest.mark.parametrize("stop", [2, 5])
def test_a_sketch_student_on_strokes_beside_the_photo_teacher(tmp_path, stop):
    "No photo is optimised for it, and a stopped run ends like an uninterrupted one."
    card = {"source": "dfsbir", "name": "tiny"}
    named = [
        Teacher(build_net("dfsbir", "tiny", 3), NAMES, Normalizer(16), m, card=card)
        for m in MODALITIES
    ]
    config = small(
        **{
            "students.teach": "sketch",
            "students.proxy_anchor": 0.1,
            "pairs.sketch.strokes": 3,
            "pairs.sketch.redraws": 1,
            "students.augment": "photo",
            "logging.save_every": 1,
        }
    )
    crossx = build_crossx(*named, config)
    assert list(crossx.pairs.sides) == [Modality.SKETCH]
    assert_resumes(named, config, stop, tmp_path)
    photo = load_encoders(tmp_path / "cut" / "encoders")[Modality.PHOTO]
    assert all(
        torch.equal(v, photo.net.state_dict()[k]) for k, v in named[0].net.state_dict().items()
    )


def test_pictures_of_what_is_not_taught_can_be_asked_for(teachers):
    config = small(**{"students.teach": "sketch", "pairs.photo.drawn": False})
    found = config_for_teachers(config, dict(zip(MODALITIES, teachers)))
    assert found.pairs.photo.drawn is False


def test_a_class_is_wanted_of_what_is_taught_alone(teachers):
    drawn = {"students.proxy_anchor": 0.1, "students.teach": "sketch", "pairs.sketch.drawn": True}
    with pytest.raises(ValueError, match="or pairs.sketch.drawn to false"):
        config_for_teachers(small(**drawn), dict(zip(MODALITIES, teachers)))


@pytest.mark.parametrize(
    "change", [{"students.sketch_net": "dfsbir/grey"}, {"students.sketch_input_size": 20}]
)
def test_a_shared_net_has_one_name_and_one_input(change):
    with pytest.raises(ConfigError, match="shared"):
        small(**{"students.shared": True, **change})


@pytest.mark.parametrize("kept_views", [0, 12])
def test_baselines_at_the_same_budget(teachers, kept_views):
    config = small(**{"students.kept_views": kept_views})
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
        {"pairs.photo.strokes": 3},
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


@pytest.fixture
def without_norms():
    "A photo and a sketch teacher without batch norm."
    made = []
    for seed, modality in enumerate(MODALITIES):
        torch.manual_seed(seed)
        net = build_net("dfsbir", "tiny-gn", 3)
        made.append(Teacher(net, NAMES, Normalizer(16), modality))
    return made


@pytest.mark.filterwarnings("ignore:the photo and the sketch teacher's")
def test_the_preset_cold_keeps_what_was_said_of_privacy_and_logging(teachers):
    for teacher in teachers:
        teacher.card.pop("source", None)
    config = CrossXConfig().changed({"privacy.disjoint": False, "logging.save_every": 7})
    cold = config_for_teachers(config, dict(zip(MODALITIES, teachers, strict=True)))
    assert cold.students.kind == "cold" and not cold.privacy.disjoint
    assert cold.logging == CrossXConfig.preset("cold").logging.changed({"save_every": 7})


def test_strokes_of_a_teacher_whose_sketches_are_drawn_by_a_program(teachers, without_norms):
    config = small(**{"pairs.sketch.strokes": 3})
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="no strokes are optimised"):
        build_crossx(teachers[0], without_norms[1], config)


def test_objects_stand_for_the_pictures_of_a_teacher_without_batch_norm(teachers, without_norms):
    pair = teachers[0], without_norms[1]
    with pytest.warns(UserWarning, match="the sketch teacher has no batch norm"):
        crossx = build_crossx(*pair, small())
    photos_alone = build_crossx(*pair, small(**{"pairs.sketch.drawn": True}))
    scalars = crossx.run_step("synthesize")
    assert not [name for name in scalars if "sketch" in name or "align" in name]
    for other in (crossx, photos_alone):
        while not other.pairs.waiting():
            other.run_step("synthesize")
    shown = crossx.preview()
    objects = ProceduralPairs(crossx.config.sizes, crossx.fabric, crossx.config.seed)
    assert torch.equal(shown.sketch, objects.preview(len(shown)).sketch)
    pairs, same = crossx.pairs.sample(6), photos_alone.pairs.sample(6)
    assert torch.equal(pairs.sketch, objects.sample(6).sketch)
    assert torch.equal(pairs.photo, same.photo) and torch.equal(pairs.sketch, same.sketch)
    assert pairs.label.max() < len(NAMES)


def test_a_run_with_drawn_sketches_resumes(teachers, without_norms, tmp_path):
    changes = {"logging.save_every": 1, "pairs.sketch.drawn": True, "schedule.rounds": 2}
    assert_resumes((teachers[0], without_norms[1]), small(**changes), 10, tmp_path)


def test_two_teachers_without_batch_norm_get_objects_alone(without_norms):
    with pytest.warns(UserWarning, match="no batch norm") as said:
        crossx = build_crossx(*without_norms, small())
    assert len(said) == 2
    assert crossx.config.pairs.kind == "objects"
    assert crossx.config.sizes == dict.fromkeys(MODALITIES, 16)
    crossx.fit(progress=False)


def test_pictures_without_batch_norm_can_be_asked_for(without_norms):
    asked = {f"pairs.{m}.drawn": False for m in MODALITIES}
    crossx = build_crossx(*without_norms, small(**asked))
    assert crossx.config.pairs.kind == "pyramid" and not crossx.pairs.drawn
    assert "estimator/sketch/class" in crossx.run_step("synthesize")


def test_a_loss_that_needs_classes_refuses_drawn_pictures(teachers, without_norms):
    config = small(**{"students.proxy_anchor": 0.1})
    with (
        pytest.warns(UserWarning, match="no batch norm"),
        pytest.raises(ValueError, match="pairs.sketch.drawn to false"),
    ):
        build_crossx(teachers[0], without_norms[1], config)


def test_pyramid_pairs_that_optimise_nothing_are_refused(teachers):
    config = small(**{f"pairs.{m}.drawn": True for m in MODALITIES})
    both = {t.modality: t for t in teachers}
    with pytest.raises(ValueError, match="nothing is optimised"):
        PyramidPairs(config.pairs, both, align_classes(NAMES, NAMES), make_fabric("cpu"), 0)


def test_teachers_with_a_name_keep_the_config(teachers):
    config = CrossXConfig.preset("dfsbir")
    named = {t.modality: t for t in teachers}
    for teacher in teachers:
        teacher.card.update(source="dfsbir", name="tiny")
    assert config_for_teachers(config, named) is config
