"""Runs on drawings that evolve: config, order of pairs, resuming, other students on the same."""

import pytest
import torch
from crossx.helpers import assert_resumes

from dfsbir.baselines import meta_data, uni_modal
from dfsbir.core.config import ConfigError
from dfsbir.core.device import make_fabric
from dfsbir.core.run_folder import RunFolder
from dfsbir.core.types import MODALITIES, Modality, Normalizer, PairBatch
from dfsbir.crossx.build import build_crossx
from dfsbir.crossx.config import CrossXConfig
from dfsbir.crossx.pairs import EvolvedPairs
from dfsbir.crossx.taken_pairs import take_pairs
from dfsbir.students.encoder import load_encoders
from dfsbir.teachers.class_map import align_classes
from dfsbir.teachers.nets import build_net
from dfsbir.teachers.teacher import Teacher

NAMES = ("cup", "fish", "star")
SMALL = {
    "device": "cpu",
    "pairs.kind": "evolved",
    "pairs.photo.size": 12,
    "pairs.sketch.size": 16,
    "pairs.batch": 8,
    "pairs.elites": 2,
    "schedule.new_pairs": 20,
    "schedule.distill_steps": 4,
    "students.teach": "sketch",
    "students.batch": 5,
    "students.net": "dfsbir/tiny",
    "students.augment": "none",
    "logging.save_every": 1,
}


def config(**changes):
    return CrossXConfig.preset("cold", {**SMALL, **changes})


@pytest.fixture(params=["tiny", "tiny-gn"], ids=["batch norm", "group norm"])
def teachers(request):
    made = []
    for seed, modality in enumerate(MODALITIES):
        torch.manual_seed(seed)
        net = build_net("dfsbir", request.param, 3)
        card = {"source": "dfsbir", "name": request.param}
        made.append(Teacher(net, NAMES, Normalizer(16, pen=0.05), modality, card=card))
    return made


def pairs_of(teachers, **changes):
    both = dict(zip(MODALITIES, teachers))
    made = config(**changes).pairs
    return EvolvedPairs(made, both, align_classes(NAMES, NAMES), make_fabric("cpu"), 0)


def test_the_plan_runs_as_many_generations_as_the_pairs_need():
    one = ["synthesize"] * 3 + ["fill"] + ["distill"] * 4  # 3 x 8 drawings for 20 pairs
    assert config().plan() == one
    two = config(**{"schedule.rounds": 2}).plan()
    assert two.count("synthesize") == 5, "the four that are left over serve the second round"


def test_pairs_are_given_once_in_the_order_in_which_they_were_made(teachers):
    pairs, same = pairs_of(teachers), pairs_of(teachers)
    for _ in range(3):
        pairs.run_step()
        same.run_step()
    assert pairs.step == 3 and pairs.waiting() == 24
    made = PairBatch.cat(same.finished)
    given = PairBatch.cat([pairs.sample(n) for n in (5, 8, 11)])
    assert pairs.waiting() == 0
    assert torch.equal((given.sketch * 255).round().byte(), made.sketch)
    assert torch.equal((given.photo * 255).round().byte(), made.photo)
    assert given.photo.shape == (24, 3, 12, 12) and given.sketch.shape == (24, 1, 16, 16)
    with pytest.raises(ValueError, match="1 pairs were asked for and 0 are finished"):
        pairs.sample(1)


def test_the_label_is_what_the_sketch_teacher_sees(teachers):
    pairs = pairs_of(teachers)
    pairs.run_step()
    batch = pairs.sample(8)
    said = teachers[1](batch.sketch, bn=False).logits.argmax(1)
    assert pairs.drawn == (Modality.PHOTO,), "photos have no class"
    assert [NAMES[k] for k in said] == [pairs.evolution.class_map.classes[k] for k in batch.label]


def test_the_preview_shows_the_best_and_touches_nothing(teachers):
    pairs = pairs_of(teachers)
    pairs.run_step()
    before = pairs.state_dict()["evolution"]["random"].clone()
    shown = pairs.preview(7)
    assert shown.label.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert torch.equal(shown.photo, pairs.preview(7).photo)
    assert torch.equal(pairs.state_dict()["evolution"]["random"], before)
    best = pairs.evolution.best(torch.arange(3))
    assert torch.equal(shown.sketch[:3], best)
    assert torch.equal(shown.sketch[6], best[0]), "two are kept of each class"


@pytest.mark.parametrize("stop", [1, 3, 4, 6])
def test_a_stopped_run_ends_like_an_uninterrupted_one(teachers, tmp_path, stop):
    settings = config(**{"students.kept_views": 12})
    assert_resumes(teachers, settings, stop, tmp_path)
    assert len(list((tmp_path / "cut" / "samples").glob("estimates_*.png"))) == 1
    encoders = load_encoders(tmp_path / "cut" / "encoders")
    assert encoders["sketch"](torch.rand(2, 1, 16, 16)).shape == (2, 64)


def test_losses_of_each_generation_are_logged(teachers, tmp_path):
    settings = config(**{"logging.log_every": 1})
    with RunFolder(tmp_path / "run", settings.flat()) as run:
        build_crossx(*teachers, settings).fit(run, progress=False)
        lines = run.metrics()
    assert "estimator/class" not in lines[0], "a first generation has no parents"
    assert {"estimator/class", "estimator/elites"} <= set(lines[1])
    assert lines[2]["estimator/elites"] <= lines[0]["estimator/elites"]


def test_other_students_learn_from_the_same_drawings(teachers, tmp_path):
    with RunFolder(tmp_path / "made", config().flat()) as run:
        first = build_crossx(*teachers, config())
        first.fit(run, progress=False)
    other = build_crossx(*teachers, config(**{"students.lr": 0.01}))
    take_pairs(other, tmp_path / "made")
    assert torch.equal(other.buffer.pairs.sketch, first.buffer.pairs.sketch)
    with pytest.raises(ValueError, match="pairs.elites"):
        take_pairs(build_crossx(*teachers, config(**{"pairs.elites": 3})), tmp_path / "made")


@pytest.mark.parametrize(
    "change, named",
    [
        ({"students.teach": "both", "students.proxy_anchor": 1.0}, "pairs.kind 'evolved'"),
        ({"pairs.new": 0.0}, "pairs.new"),
        ({"pairs.elites": 0}, "pairs.elites"),
        ({"pairs.steps": 3}, "pairs.steps"),
    ],
)
def test_settings_without_sense_are_refused(change, named):
    with pytest.raises(ConfigError, match=named):
        config(**change)


@pytest.mark.parametrize("baseline", [uni_modal, meta_data])
def test_baselines_of_estimates_say_that_they_need_some(baseline):
    with pytest.raises(ValueError, match="pairs.kind = 'evolved'"):
        baseline(config())


def test_both_students_may_learn(teachers):
    crossx = build_crossx(*teachers, config(**{"students.teach": "both"}))
    assert set(crossx.fit(progress=False)) == set(MODALITIES)
    assert crossx.distiller.steps_done == 4


# ---- beside photos of a pyramid

PYRAMID = {
    "device": "cpu",
    "pairs.photo.size": 16,
    "pairs.sketch.size": 16,
    "pairs.steps": 3,
    "pairs.batch": 6,
    "pairs.sketch.evolved": 8,
    "schedule.new_pairs": 10,
    "schedule.distill_steps": 4,
    "students.batch": 5,
    "students.net": "dfsbir/tiny",
    "logging.save_every": 1,
}


def beside_photos(**changes):
    return CrossXConfig.preset("cold", {**PYRAMID, **changes})


@pytest.fixture
def mixed():
    "A photo teacher with batch norm, a sketch teacher without."
    made = []
    for seed, (modality, net) in enumerate(zip(MODALITIES, ("tiny", "tiny-gn"))):
        torch.manual_seed(seed)
        normalizer = Normalizer(16, pen=0.05)
        made.append(Teacher(build_net("dfsbir", net, 3), NAMES, normalizer, modality))
    return made


def test_photos_are_optimised_and_sketches_evolve_a_generation_a_step(mixed):
    crossx = build_crossx(*mixed, beside_photos())
    pairs = crossx.pairs
    assert list(pairs.sides) == [Modality.PHOTO] and not pairs.drawn
    crossx.fit(progress=False)
    assert pairs.step == pairs.evolution.step == 6
    batch = crossx.buffer.all()
    assert batch.photo.shape == (10, 3, 16, 16) and batch.sketch.shape == (10, 1, 16, 16)
    assert batch.sketch.mean() > 0.5, "paper is white"
    assert len(batch.sketch.flatten(1).unique(dim=0)) == 10, "each pair has a drawing of its own"


def test_drawings_of_pairs_are_children_of_elites_of_their_class(mixed):
    pairs = build_crossx(*mixed, beside_photos()).pairs
    for _ in range(3):
        pairs.run_step()
    asked = []

    def children(label):
        asked.append(label)
        return torch.ones(len(label), 1, 16, 16)

    pairs.evolution.children = children
    batch = pairs.sample(6)
    assert torch.equal(asked[0], batch.label) and batch.sketch.min() == 1
    shown = pairs.preview(5)
    number = torch.arange(5) // 3
    assert torch.equal(shown.sketch, pairs.evolution.best(shown.label, number))


def test_photos_are_shown_again_beside_further_drawings(mixed):
    changes = {"pairs.sketch.redraws": 2, "schedule.new_pairs": 18}
    crossx = build_crossx(*mixed, beside_photos(**changes))
    assert crossx.config.plan().count("synthesize") == 3
    crossx.fit(progress=False)
    batch = crossx.buffer.all()
    assert len(batch.photo.flatten(1).unique(dim=0)) == 6
    assert len(batch.sketch.flatten(1).unique(dim=0)) == 18


@pytest.mark.parametrize("stop", [2, 5, 8])
def test_a_stopped_run_beside_photos_ends_like_an_uninterrupted_one(mixed, tmp_path, stop):
    assert_resumes(mixed, beside_photos(), stop, tmp_path)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"pairs.photo.evolved": 8}, "photo.evolved = 0"),
        ({"pairs.sketch.strokes": 4}, "strokes=4, evolved=8"),
        ({"pairs.sketch.evolved": 0, "pairs.sketch.redraws": 2}, "redraws=2"),
    ],
)
def test_sketches_evolve_and_nothing_else_does(change, named):
    with pytest.raises(ConfigError, match=named):
        beside_photos(**change)


def test_where_no_photo_is_optimised_the_other_kind_is_named(mixed):
    with pytest.raises(ValueError, match="set pairs.kind to evolved"):
        build_crossx(*mixed, beside_photos(**{"pairs.photo.drawn": True}))


def test_meta_data_knows_no_class(mixed):
    assert not meta_data(beside_photos(**{"pairs.sketch.redraws": 1})).pairs.sketch.evolved
