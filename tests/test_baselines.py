"""The five data-free baselines and the ceiling: CrossX runs on other pairs, oracles by hand."""

import pytest
import torch
import torch.nn.functional as F

from dfsbir.baselines import (
    BASELINES,
    AveragingWeights,
    LatestBatch,
    SampledPairs,
    alternative_data,
    average_weights,
    data_dependent,
    from_scratch,
    gaussian_prior,
    make_baseline,
    meta_data,
    uni_modal,
)
from dfsbir.core.data_guard import DataFreeViolation, data_free
from dfsbir.core.device import make_fabric
from dfsbir.core.run_folder import RunFolder
from dfsbir.core.types import MODALITIES, Normalizer, PairBatch
from dfsbir.crossx.build import build_crossx
from dfsbir.crossx.config import CrossXConfig
from dfsbir.data.toy import toy_pairs
from dfsbir.data.toy_shapes import TOY_CLASSES, TOY_HELD_OUT
from dfsbir.evaluation.report import evaluate_retrieval
from dfsbir.students.encoder import load_encoders
from dfsbir.teachers.class_map import align_classes
from dfsbir.teachers.nets import SmallNet, build_net, input_of
from dfsbir.teachers.teacher import Teacher

SIZE, PHOTO, SKETCH = 28, *MODALITIES
SIDES = {"device": "cpu", "pairs.photo.size": SIZE, "pairs.sketch.size": SIZE}


def teacher(modality, classes, name="tiny", seed=0):
    "An untrained teacher: its posteriors are as good as any to check arithmetic."
    torch.manual_seed(seed)
    net = build_net("dfsbir", name, len(classes))
    card = {"source": "dfsbir", "name": name}
    return Teacher(net, classes, input_of("dfsbir", SIZE, net), modality, card=card)


@pytest.fixture(scope="module")
def pair():
    "Teachers of (a, b, c, d) and (b, c, d, e) with the toy classes' names."
    return {
        PHOTO: teacher(PHOTO, TOY_CLASSES[:4]),
        SKETCH: teacher(SKETCH, TOY_CLASSES[1:5], seed=1),
    }


@pytest.fixture(scope="module")
def images():
    return dict(zip(MODALITIES, toy_pairs(40, size=SIZE, classes=TOY_CLASSES[:5], split="test")))


@pytest.fixture(scope="module")
def real():
    "Training images of each modality, of different instances."
    return {
        m: toy_pairs(30, size=SIZE, classes=TOY_CLASSES[:5], seed=i)[i]
        for i, m in enumerate(MODALITIES)
    }


@pytest.fixture(scope="module")
def foreign():
    "Real images of classes that neither teacher knows; photos and sketches of other instances."
    return {
        m: toy_pairs(10, size=SIZE, classes=TOY_HELD_OUT, seed=i)[i]
        for i, m in enumerate(MODALITIES)
    }


def config(*layers, **changes):
    return CrossXConfig.preset(
        "dfsbir",
        SIDES,
        {
            "pairs.photo.width": 8,
            "pairs.sketch.strokes": 3,
            "pairs.sketch.templates_per_class": 2,
            "pairs.batch": 6,
            "pairs.warmup_steps": 2,
            "buffer.capacity": 24,
            "schedule.new_pairs": 12,
            "schedule.distill_steps": 3,
            "students.batch": 6,
        },
        *layers,
        **changes,
    )


def paper_config():
    return CrossXConfig.preset(
        "paper",
        SIDES,
        {
            "pairs.photo.width": 8,
            "pairs.sketch.width": 8,
            "pairs.batch": 6,
            "buffer.capacity": 6,
            "schedule.rounds": 2,
            "schedule.new_pairs": 6,
            "students.batch": 5,
        },
    )


def baseline(method, pair, foreign, c):
    return make_baseline(method, *pair.values(), c, *foreign.values())


def distances(images, data):
    "Of each image to each of a set, (N,M)."
    return (images[:, None] - data.images()[None]).abs().flatten(2).sum(2)


def same_students(a, b):
    for m in MODALITIES:
        one, two = a.distiller.encoders()[m], b.distiller.encoders()[m]
        assert one.card == two.card
        for k, v in one.state_dict().items():
            assert torch.equal(v, two.state_dict()[k])


def count_steps(trainer, monkeypatch):
    "A list that gets the length of every batch that the students see."
    sizes, step = [], trainer.distiller.step
    monkeypatch.setattr(
        trainer.distiller, "step", lambda batch: sizes.append(len(batch)) or step(batch)
    )
    return sizes


# ---- what is passed to the trainer


def test_the_latest_batch_is_the_buffer():
    buffer, again = LatestBatch(), LatestBatch()
    again.load_state_dict(buffer.state_dict())
    assert len(buffer) == len(again) == 0
    first, second = (
        PairBatch(torch.rand(n, 3, 4, 4), torch.rand(n, 1, 4, 4), torch.arange(n)) for n in (3, 2)
    )
    buffer.add(first)
    buffer.add(second)
    assert buffer.sample(2) is second
    again.load_state_dict(buffer.state_dict())
    assert torch.equal(again.sample(2).photo, second.photo)


def test_a_source_without_pairs_is_named():
    with pytest.raises(NotImplementedError, match="draw"):
        SampledPairs(make_fabric("cpu"), seed=0).sample(2)


# ---- the ceiling


def test_the_ceiling_has_the_students_of_crossx(pair, real):
    c = config()
    ours, theirs = (
        data_dependent(*pair.values(), c, *real.values()),
        build_crossx(*pair.values(), c),
    )
    same_students(ours, theirs)
    assert ours.distiller.terms.weights == theirs.distiller.terms.weights
    rates = [t.distiller.optimizer.param_groups[0]["lr"] for t in (ours, theirs)]
    assert rates[0] == rates[1]
    assert torch.equal(ours.random_state["cpu"], theirs.random_state["cpu"])


@pytest.mark.parametrize("preset", ["dfsbir", "paper"])
def test_the_ceiling_takes_as_many_steps_of_the_same_size(pair, real, preset, monkeypatch):
    c = config() if preset == "dfsbir" else paper_config()
    c = c.changed({"schedule.rounds": 2, "schedule.distill_steps": 2, "students.batch": 5})
    trainer = data_dependent(*pair.values(), c, *real.values())
    sizes = count_steps(trainer, monkeypatch)
    encoders = trainer.fit(progress=False)
    assert sizes == [5] * 4 == [c.students.batch] * c.plan().count("distill")
    assert encoders[PHOTO].card["head"]["kind"] == c.students.head.kind


def test_pairs_are_real_and_of_one_class(pair, real):
    trainer = data_dependent(*pair.values(), config(), *real.values())
    pairs = trainer.pairs.sample(40)
    for m in MODALITIES:
        distance = distances(pairs.of(m), real[m])
        assert distance.min(1)[0].max() == 0
        names = [real[m].classes[k] for k in real[m].labels[distance.argmin(1)]]
        assert names == [trainer.class_map.classes[k] for k in pairs.label]
    assert len(set(pairs.label.tolist())) == 3


def test_targets_are_what_a_crossx_run_would_teach(pair, real):
    "The teachers' posteriors of the very images that the students see, blends included."
    c = config(
        {
            "buffer.augment": False,
            "buffer.mixup": 1.0,
            "students.views": 1,
            "students.head.temperature": 2.0,
        }
    )
    trainer = data_dependent(*pair.values(), c, *real.values())
    trainer.fill_buffer()
    batch = trainer.buffer.sample(6)
    for m in MODALITIES:
        logits = pair[m](batch.of(m)).logits
        wanted = trainer.class_map.posteriors(logits, m, 2.0)
        assert torch.allclose(batch.target_of(m), wanted, atol=1e-5)
    blends = distances(batch.photo, real[PHOTO]).min(1)[0] > 0
    assert blends.sum() > 1, "all but where an image met itself"


def test_labels_as_targets(pair, real):
    c = config({"buffer.augment": False, "buffer.mixup": 1.0})
    trainer = data_dependent(*pair.values(), c, *real.values(), labels=True)
    trainer.fill_buffer()
    batch = trainer.buffer.sample(6)
    for m in MODALITIES:
        assert torch.equal(batch.target_of(m), F.one_hot(batch.label, 3).float())
        assert distances(batch.of(m), real[m]).min(1)[0].max() == 0, "none is a blend"


def test_cold_students_learn_from_no_label(pair, real):
    c = config({"students.kind": "cold"})
    with pytest.raises(ValueError, match="labels=True"):
        data_dependent(*pair.values(), c, *real.values(), labels=True)


def test_same_seed_same_ceiling(pair, real):
    first, again, other = (
        data_dependent(*pair.values(), config(seed=s), *real.values())
        .fit(progress=False)[PHOTO]
        .state_dict()
        for s in (0, 0, 1)
    )
    assert all(torch.equal(v, again[k]) for k, v in first.items())
    assert any(not torch.equal(v, other[k]) for k, v in first.items())


def test_the_ceiling_learns(real):
    "Students from random weights and true labels: from chance to better than chance."
    classes = TOY_CLASSES[:5]
    c = config(
        {
            "buffer.augment": False,
            "schedule.distill_steps": 60,
            "students.start.kind": "cold",
            "students.batch": 24,
            "students.lr": 3e-3,
            "students.ema_decay": 0.0,
        }
    )
    both = teacher(PHOTO, classes), teacher(SKETCH, classes, seed=1)
    encoders = data_dependent(*both, c, *real.values(), labels=True).fit(progress=False)
    with torch.no_grad():
        space = [encoders[m](real[m].images()) for m in (SKETCH, PHOTO)]
    report = evaluate_retrieval(*space, *(real[m].labels for m in (SKETCH, PHOTO)))
    assert report.metrics["mAP@all"] > report.floor["mAP@all"] + 0.2


def test_the_data_free_law_forbids_the_ceiling(pair, real):
    with data_free(), pytest.raises(DataFreeViolation, match="ceiling"):
        data_dependent(*pair.values(), config(), *real.values())


def test_a_shared_class_without_images_is_named(pair, real):
    without = real[PHOTO].take(real[PHOTO].labels != 2)
    with pytest.raises(ValueError, match=TOY_CLASSES[2]):
        data_dependent(*pair.values(), config(), without, real[SKETCH])


def test_a_stopped_ceiling_goes_on_with_the_same_numbers(pair, real, tmp_path):
    "A baseline is a CrossX run, so it is resumed as one."

    def begin(folder):
        trainer = data_dependent(*pair.values(), config(), *real.values())
        return trainer, RunFolder(folder, trainer.config.flat())

    trainer, run = begin(tmp_path / "whole")
    whole = trainer.fit(run, progress=False)[PHOTO].state_dict()

    def stop(crossx, action, scalars):
        if crossx.position == 3:
            raise KeyboardInterrupt

    trainer, run = begin(tmp_path / "part")
    trainer.config = trainer.config.changed({"logging.save_every": 1})
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(RunFolder(tmp_path / "part", {}), [stop], progress=False)
    again, _ = begin(tmp_path / "whole")
    again.config = trainer.config
    found = again.fit(RunFolder(tmp_path / "part", {}), progress=False)[PHOTO].state_dict()
    assert all(torch.equal(v, found[k]) for k, v in whole.items())


# ---- the five data-free baselines: what they have in common


@pytest.mark.parametrize("preset", ["dfsbir", "paper"])
@pytest.mark.parametrize("method", BASELINES)
def test_every_baseline_has_the_interface_of_crossx(method, preset, pair, foreign, tmp_path):
    "fit(run) gives encoders in one space, and saves the same ones."
    c = config() if preset == "dfsbir" else paper_config()
    run = RunFolder(tmp_path / "run", {})
    encoders = baseline(method, pair, foreign, c).fit(run, progress=False)
    kept = load_encoders(run.encoders)
    random = torch.Generator().manual_seed(0)
    for m in MODALITIES:
        x = torch.rand(3, m.channels, SIZE, SIZE, generator=random)
        e = encoders[m](x)
        assert e.shape == (3, 64) and torch.allclose(e.norm(dim=1), torch.ones(3), atol=1e-4)
        assert torch.allclose(e, kept[m](x), atol=1e-5)
        assert encoders[m].card["classes"] == list(TOY_CLASSES[1:4])


@pytest.mark.parametrize("method", [b for b in BASELINES if b != "averaging-weights"])
@pytest.mark.parametrize("warm", [True, False])
def test_same_students_and_as_many_steps_of_the_same_size(
    method, warm, pair, foreign, tmp_path, monkeypatch
):
    c = config() if warm else from_scratch(config())
    trainer = baseline(method, pair, foreign, c)
    same_students(trainer, build_crossx(*pair.values(), c))
    sizes = count_steps(trainer, monkeypatch)
    trainer.fit(RunFolder(tmp_path / "run", {}), progress=False)
    assert sizes == [c.students.batch] * c.plan().count("distill")


def test_the_start_is_the_config_s(pair, foreign):
    "Warm students are the teachers before the first step, cold ones are not."
    c = config(seed=9)
    cold = from_scratch(c, **{"schedule.distill_steps": 7})
    one, two = c.flat(), cold.flat()
    assert {k for k in one | two if one.get(k) != two.get(k)} == {
        "students.start.kind",
        "students.start.net",
        "students.start.wise_ft_alpha",
        "students.lr",
        "schedule.distill_steps",
    }
    own = pair[PHOTO].net.state_dict()["fc.weight"]
    for method in ("gaussian-prior", "alternative-data"):
        for start, same in ((c, True), (cold, False)):
            encoders = baseline(method, pair, foreign, start).distiller.encoders()
            assert torch.equal(encoders[PHOTO].net.state_dict()["fc.weight"], own) is same


def test_callbacks_are_called_after_every_action(pair, foreign):
    seen = []
    baseline("gaussian-prior", pair, foreign, config()).fit(
        callbacks=[lambda crossx, action, scalars: seen.append((action, set(scalars)))],
        progress=False,
    )
    assert [action for action, _ in seen] == ["fill", "distill"] * 3
    assert {"student/consistency", "student/total"} <= seen[1][1]


def test_same_seed_same_baseline(pair, foreign):
    for method in ("gaussian-prior", "alternative-data"):
        first, again, other = (
            baseline(method, pair, foreign, config(seed=s)).fit(progress=False)[SKETCH].state_dict()
            for s in (0, 0, 1)
        )
        assert all(torch.equal(v, again[k]) for k, v in first.items())
        assert any(not torch.equal(v, other[k]) for k, v in first.items())


def test_pairs_without_a_class_take_the_one_both_teachers_agree_on(pair, foreign):
    class_map = align_classes(*(pair[m].classes for m in MODALITIES))
    for method in ("gaussian-prior", "alternative-data"):
        batch = baseline(method, pair, foreign, config()).pairs.sample(12)
        p = [class_map.posteriors(pair[m](batch.of(m)).logits, m) for m in MODALITIES]
        wanted = [max(range(3), key=lambda k: (p[0][i, k] * p[1][i, k]).item()) for i in range(12)]
        assert batch.label.tolist() == wanted


def test_an_unknown_baseline_is_named(pair):
    with pytest.raises(ValueError, match="meta-data"):
        make_baseline("metadata", *pair.values(), config())


def test_the_intermediate_head_is_no_baseline_s(pair, images):
    c = CrossXConfig.preset(
        "open",
        SIDES,
        {
            "students.head.kind": "intermediate",
            "students.head.layers": "blocks.0.bn1",
            "students.loss.infonce": 0.0,
        },
    )
    for make in (
        lambda: gaussian_prior(*pair.values(), c),
        lambda: AveragingWeights(*pair.values(), c),
        lambda: data_dependent(*pair.values(), c, *images.values()),
    ):
        with pytest.raises(ValueError, match="students.head.kind"):
            make()


def test_fresh_students_are_kept_as_they_end():
    assert not hasattr(from_scratch(CrossXConfig.preset("open")).students.start, "wise_ft_alpha")


# ---- each by itself


def test_noise_is_standard_normal_to_each_net():
    "Whatever its size, mean, deviation and polarity; only what no image can hold is clipped."

    def odd(modality, **own):
        torch.manual_seed(0)
        net = build_net("dfsbir", "tiny", 3)
        card = {"source": "dfsbir", "name": "tiny"}
        return Teacher(net, TOY_CLASSES[:3], Normalizer(**own), modality, card=card)

    teachers = (
        odd(PHOTO, size=20, mean=(0.2, 0.5, 0.7), std=(0.05, 0.1, 0.2)),
        odd(SKETCH, size=24, mean=(0.6, 0.6, 0.6), std=(0.1, 0.1, 0.1), dark_on_light=False),
    )
    batch = gaussian_prior(*teachers, config()).pairs.sample(200)
    assert batch.photo.shape == (200, 3, 20, 20) and batch.sketch.shape == (200, 1, 24, 24)
    for t, x in zip(teachers, (batch.photo, batch.sketch)):
        inside = t.normalizer(x)
        assert x.min() >= 0 and x.max() <= 1
        assert torch.allclose(inside.mean((0, 2, 3)), torch.zeros(3), atol=0.05)
        assert torch.allclose(inside.std((0, 2, 3)), torch.ones(3), atol=0.08)


def test_noise_for_a_grey_photo_net():
    grey = teacher(PHOTO, TOY_CLASSES[:3], "grey")
    grey.normalizer.std.fill_(0.1)  # nothing is clipped
    x = gaussian_prior(grey, teacher(SKETCH, TOY_CLASSES[:3]), config()).pairs.sample(100).photo
    assert x.shape == (100, 3, SIZE, SIZE)
    assert abs(grey.normalizer(x).std() - 1) < 0.02, "three independent channels would give .7"


def test_noise_is_neither_augmented_nor_blended(pair, foreign):
    c = config({"buffer.augment": True, "buffer.mixup": 1.0})
    trainer = baseline("gaussian-prior", pair, foreign, c)
    trainer.fill_buffer()
    again = baseline("gaussian-prior", pair, foreign, config()).pairs.sample(6)
    assert torch.equal(trainer.buffer.sample(6).photo, again.photo)


def test_alternative_data_are_real_and_of_no_known_class(pair):
    # the last three: known to the photo teacher, to both, to the sketch teacher
    names = (*TOY_HELD_OUT[:2], *TOY_CLASSES[:2], TOY_CLASSES[4])
    mixed = {
        m: toy_pairs(20, size=SIZE, classes=names, seed=i)[i] for i, m in enumerate(MODALITIES)
    }
    batch = alternative_data(*pair.values(), config(), *mixed.values()).pairs.sample(30)
    kinds = []
    for m in MODALITIES:
        far = distances(batch.of(m), mixed[m])
        assert far.min(1)[0].max() == 0
        kinds.append([names[k] for k in mixed[m].labels[far.argmin(1)]])
    assert kinds[0] == kinds[1] and set(kinds[0]) == set(TOY_HELD_OUT[:2])


def test_alternative_data_without_a_class_in_common_are_paired_at_random(pair):
    photos = toy_pairs(12, size=SIZE, classes=TOY_HELD_OUT[:2])[0]
    sketches = toy_pairs(12, size=SIZE, classes=TOY_HELD_OUT[2:4])[1]
    trainer = alternative_data(*pair.values(), config(), photos, sketches)
    batch = trainer.pairs.sample(60)
    for m, data in zip(MODALITIES, (photos, sketches)):
        assert len(set(distances(batch.of(m), data).argmin(1).tolist())) == 12
    trainer.fit(progress=False)


def test_alternative_data_all_known_or_forbidden(pair, real, foreign):
    both = tuple(pair.values())
    with pytest.raises(ValueError, match="known to a teacher"):
        alternative_data(*both, config(), real[PHOTO], foreign[SKETCH])
    by_another_name = dict.fromkeys(TOY_HELD_OUT, TOY_CLASSES[1])
    with pytest.raises(ValueError, match="known to a teacher"):
        alternative_data(*both, config(), *foreign.values(), by_another_name)
    with pytest.raises(ValueError, match="photos and sketches"):
        make_baseline("alternative-data", *both, config())
    with data_free(), pytest.raises(DataFreeViolation, match="alternative"):
        alternative_data(*both, config(), *foreign.values())


@pytest.mark.parametrize("preset", ["dfsbir", "paper"])
def test_uni_modal_students_are_independent(preset, pair):
    "Another sketch teacher of the same classes changes nothing in the photo student."
    c = uni_modal(config() if preset == "dfsbir" else paper_config())
    kept = []
    for seed in (1, 5):
        trainer = build_crossx(pair[PHOTO], teacher(SKETCH, TOY_CLASSES[1:5], seed=seed), c)
        torch.manual_seed(0)
        for action in ("synthesize", "synthesize", "fill", "distill", "distill"):
            trainer.run_step(action)
        kept.append(trainer.distiller.encoders()[PHOTO].state_dict())
    assert all(torch.equal(v, kept[1][k]) for k, v in kept[0].items())


def test_meta_data_has_statistics_alone():
    c = meta_data(config())
    assert {k for k, v in c.pairs.loss.weights().items() if v} == {"bn", "total_variation"}
    assert not c.pairs.conditioned and c.students == config().students
    assert meta_data(CrossXConfig.preset("paper")).pairs.loss.bn == 1.0


@pytest.mark.parametrize("make", [uni_modal, meta_data])
@pytest.mark.parametrize("pairs, students", [("estimates", "cold"), ("pyramid", "targets")])
def test_distillations_of_other_students_than_the_presets(make, pairs, students):
    preset = "dfsbir" if pairs == "estimates" else "cold"
    c = make(CrossXConfig.preset(preset, {"students.kind": students}))
    assert (c.pairs.kind, c.students.kind) == (pairs, students)
    assert not (c.pairs.loss.align or c.pairs.loss.adversarial)


def test_labels_that_no_class_term_ties_to_pictures_teach_nothing():
    c = meta_data(CrossXConfig.preset("cold", {"students.proxy_anchor": 1.0}))
    assert (c.pairs.loss.class_, c.students.proxy_anchor) == (0.0, 0.0)


@pytest.mark.parametrize("make", [uni_modal, meta_data])
def test_distillations_need_estimates(make):
    "On procedural objects they would be another method under their name."
    for c in (
        CrossXConfig.preset("open"),
        CrossXConfig.preset("dfsbir", {"pairs.kind": "objects"}),
    ):
        with pytest.raises(ValueError, match="pairs.kind"):
            make(c)


def test_uni_modal_leaves_out_what_other_heads_need():
    c = uni_modal(config({"students.head.kind": "joint", "students.loss.infonce": 1.0}))
    assert (c.students.head.kind, c.students.loss.infonce) == ("posterior", 0.0)


def test_meta_data_come_near_the_teachers_statistics(images):
    "Teachers that have seen images once, without learning: their batch norms keep them."
    teachers = [teacher(m, TOY_CLASSES[:4]) for m in MODALITIES]
    for t in teachers:
        for norm in (m for m in t.net.modules() if isinstance(m, torch.nn.BatchNorm2d)):
            norm.momentum = None
        t.net.train()(t.normalizer(images[t.modality].images()))
        t.net.eval()
    c = config(
        {
            "pairs.warmup_steps": 60,
            "pairs.batch": 12,
            "pairs.photo.width": 16,
            "pairs.photo.lr": 0.02,
            "pairs.sketch.lr": 0.02,
        }
    )
    trainer, off = build_crossx(*teachers, meta_data(c)), []
    for _ in range(60):
        off.append(trainer.run_step("synthesize")["estimator/bn"])
    assert sum(off[-5:]) < 0.7 * sum(off[:5])


def test_meta_data_needs_batch_norms(pair):
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(4, 4),
    )
    bare = Teacher(net, TOY_CLASSES[:4], Normalizer(SIZE), PHOTO)
    c = config({"students.start.kind": "cold", "students.start.net": "dfsbir/tiny"})
    with pytest.raises(ValueError, match="photo teacher"):
        make_baseline("meta-data", bare, pair[SKETCH], c)


# ---- averaged weights


def test_the_mean_against_a_slow_loop(pair):
    class_map = align_classes(*(pair[m].classes for m in MODALITIES))
    states = [pair[m].net.state_dict() for m in MODALITIES]
    for k, v in average_weights(pair, class_map).items():
        if k.startswith("fc"):
            for row, c in enumerate(class_map.classes):
                rows = [s[k][pair[m].classes.index(c)] for s, m in zip(states, MODALITIES)]
                assert torch.allclose(v[row], sum(rows) / 2, atol=1e-6)
        elif v.is_floating_point():
            assert torch.allclose(v, (states[0][k] + states[1][k]) / 2)


def test_the_mean_of_a_net_with_itself_is_that_net(images):
    one = {m: teacher(m, TOY_CLASSES[:3], seed=3) for m in MODALITIES}
    c = config({"students.flip_tta": False, "students.head.temperature": 1.0})
    encoders = AveragingWeights(*one.values(), c).fit()
    for m in MODALITIES:
        x = images[m].images()
        p = encoders[m].predict_log_probs(x)[1].exp()
        assert torch.allclose(p, one[m](x).posteriors, atol=1e-5)


def test_rows_of_one_shared_class_are_averaged_first():
    teachers = {
        PHOTO: teacher(PHOTO, ["beagle", "cat", "poodle"]),
        SKETCH: teacher(SKETCH, ["cat", "dog"], seed=1),
    }
    aliases = {"beagle": "dog", "poodle": "dog"}
    class_map = align_classes(teachers[PHOTO].classes, teachers[SKETCH].classes, aliases)
    found = average_weights(teachers, class_map)["fc.weight"]
    p, s = teachers[PHOTO].proxies, teachers[SKETCH].proxies
    wanted = ((p[0] + p[2]) / 2 + s[1]) / 2
    assert torch.allclose(found[class_map.classes.index("dog")], wanted, atol=1e-6)


def test_a_grey_net_becomes_the_same_function_of_three_channels():
    "Averaged with its own three-channel form it is unchanged, on grey and on coloured images."
    torch.manual_seed(0)
    grey, spread = SmallNet(3, (8, 16), channels=1).eval(), SmallNet(3, (8, 16)).eval()
    state = grey.state_dict()
    luma = torch.tensor(Normalizer.LUMA).view(1, 3, 1, 1)
    spread.load_state_dict({**state, "stem.0.weight": state["stem.0.weight"] * luma})
    classes, card = TOY_CLASSES[:3], {"source": "dfsbir", "name": "tiny"}
    teachers = (
        Teacher(spread, classes, Normalizer(SIZE), PHOTO, card=card),
        Teacher(grey, classes, Normalizer(SIZE, 1, 0.5, 0.5), SKETCH),
    )
    encoders = AveragingWeights(*teachers, config({"students.flip_tta": False})).fit()
    for x in (torch.rand(4, 1, SIZE, SIZE), torch.rand(4, 3, SIZE, SIZE)):
        for m in MODALITIES:
            logits = encoders[m].net(encoders[m].normalizer(x))
            assert torch.allclose(logits, teachers[1](x).logits, atol=1e-4)


@pytest.mark.parametrize("names", [("grey", "grey"), ("grey", "small"), ("small", "grey")])
def test_the_mean_with_grey_nets_embeds_both_modalities(names, tmp_path):
    teachers = [
        teacher(m, TOY_CLASSES[:3], name, seed=k)
        for k, (m, name) in enumerate(zip(MODALITIES, names))
    ]
    run = RunFolder(tmp_path / "run", {})
    AveragingWeights(*teachers, config()).fit(run)
    for m, e in load_encoders(run.encoders).items():
        assert e(torch.rand(2, m.channels, SIZE, SIZE)).isfinite().all()
        assert e.normalizer.channels == (1 if names == ("grey", "grey") else 3)


def test_other_architectures_have_no_mean(pair):
    class_map = align_classes(TOY_CLASSES[:4], TOY_CLASSES[:4])
    small = teacher(SKETCH, TOY_CLASSES[:4], "small")
    with pytest.raises(ValueError, match="equal architectures"):
        average_weights({PHOTO: pair[PHOTO], SKETCH: small}, class_map)
    wide = Teacher(SmallNet(4, (8, 24)), TOY_CLASSES[:4], Normalizer(SIZE), SKETCH)
    with pytest.raises(ValueError, match=r"blocks.0.one.weight.*\(16, 8, 3, 3\).*\(24, 8, 3, 3\)"):
        average_weights({PHOTO: pair[PHOTO], SKETCH: wide}, class_map)


def test_a_net_that_cannot_be_rebuilt_has_no_average():
    alike = [
        Teacher(SmallNet(3, (8, 16)), TOY_CLASSES[:3], Normalizer(SIZE), m) for m in MODALITIES
    ]
    with pytest.raises(ValueError, match="rebuilt"):
        AveragingWeights(*alike, config())
