"""Floor, read-outs, the five data-free baselines and the ceiling: oracles by hand, odd teachers, and that each baseline is the CrossX students on other pairs."""

import pytest
import torch
import torch.nn.functional as F

from dfsbir.baselines import (
    BASELINES,
    AlternativeData,
    AveragingWeights,
    DataDependent,
    GaussianPrior,
    OtherPairs,
    average_weights,
    from_scratch,
    make_baseline,
    meta_data,
    uni_modal,
)
from dfsbir.core.data_guard import DataFreeViolation, data_free
from dfsbir.core.run_folder import RunFolder
from dfsbir.core.types import MODALITIES, Normalizer
from dfsbir.crossx.config import CrossXConfig
from dfsbir.crossx.trainer import CrossX
from dfsbir.data.image_set import ImageSet
from dfsbir.data.toy import toy_pairs
from dfsbir.data.toy_shapes import TOY_CLASSES, TOY_HELD_OUT
from dfsbir.evaluation.report import evaluate_retrieval
from dfsbir.students.encoder import load_encoders
from dfsbir.teachers.class_map import align_classes, to_shared
from dfsbir.teachers.embeddings import TEACHER_EMBEDDINGS, teacher_embeddings
from dfsbir.teachers.nets import SmallNet, build_net, input_of
from dfsbir.teachers.teacher import Teacher

SIZE, PHOTO, SKETCH = 28, *MODALITIES


def teacher(modality, classes, name="tiny", seed=0):
    "An untrained teacher: its answers are as good as any to check arithmetic."
    torch.manual_seed(seed)
    net = build_net("dfsbir", name, len(classes))
    return Teacher(
        net, classes, input_of("dfsbir", SIZE, net), modality, card=dict(source="dfsbir", name=name)
    )


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


def config(**changes):
    return CrossXConfig.preset(
        "dfsbir",
        **{
            "device": "cpu",
            "photo_size": SIZE,
            "sketch_size": SIZE,
            "warmup": 2,
            "student_steps": 3,
            "student_batch": 6,
            "new_pairs": 12,
            "bank": 24,
            "batch": 6,
            "strokes": 3,
            "pages": 2,
            "width": 8,
            **changes,
        },
    )


# ---- labels in the shared numbering


def test_to_shared_against_a_slow_loop(images):
    classes, aliases = ["kettle", TOY_CLASSES[3], TOY_CLASSES[0]], {TOY_CLASSES[1]: "Kettle"}
    got = to_shared(images[PHOTO], classes, aliases)
    wanted = []
    for i, k in enumerate(images[PHOTO].labels.tolist()):
        name = {TOY_CLASSES[1]: "kettle"}.get(TOY_CLASSES[k], TOY_CLASSES[k])
        if name in classes:
            wanted.append((i, classes.index(name)))
    assert got.labels.tolist() == [k for _, k in wanted] and got.classes == classes
    assert torch.equal(got.images(), images[PHOTO].images()[[i for i, _ in wanted]])


def test_to_shared_keeps_paths_instances_and_broken():
    data = ImageSet(
        torch.zeros(3, 1, 8, 8),
        [0, 1, 0],
        ["A_b", "c"],
        SKETCH,
        ["p", "q", "r"],
        [5, 6, 7],
        [("x", "torn")],
    )
    got = to_shared(data, ["a b"])
    assert (got.paths, got.instances.tolist(), got.broken) == (["p", "r"], [5, 7], [("x", "torn")])


# ---- the teachers' read-outs


def test_readouts_against_the_definitions(pair, images):
    class_map = align_classes(*(pair[m].classes for m in MODALITIES))
    found, left_out = teacher_embeddings(pair, class_map, images[PHOTO], images[SKETCH])
    assert tuple(found) == TEACHER_EMBEDDINGS and not left_out
    logits, features = (
        {m: getattr(pair[m](images[m].images()), what) for m in MODALITIES}
        for what in ("logits", "features")
    )
    for i, j in ((0, 0), (3, 17)):

        def score(key):
            return (found[key][SKETCH][j] @ found[key][PHOTO][i]).item()

        z = {
            m: torch.stack([logits[m][n, pair[m].classes.index(c)] for c in class_map.classes])
            for m, n in ((PHOTO, i), (SKETCH, j))
        }
        p = {m: z[m].exp() / z[m].exp().sum() for m in MODALITIES}
        cos = lambda a, b: (a @ b / a.norm() / b.norm()).item()
        assert score(("teacher-features", "")) == pytest.approx(
            cos(features[PHOTO][i], features[SKETCH][j]), abs=1e-4
        )
        assert score(("teacher-logits", "")) == pytest.approx(cos(z[PHOTO], z[SKETCH]), abs=1e-4)
        assert score(("teacher-posteriors", "")) == pytest.approx(
            sum(p[PHOTO][k].item() * p[SKETCH][k].item() for k in range(3)), abs=1e-5
        )
        assert score(("teacher-posteriors", "cosine")) == pytest.approx(
            cos(p[PHOTO], p[SKETCH]), abs=1e-4
        )


def test_the_mirror_readout_is_the_mean_of_two_looks(pair, images):
    class_map = align_classes(*(pair[m].classes for m in MODALITIES))
    found, _ = teacher_embeddings(pair, class_map, images[PHOTO], images[SKETCH])
    for m in MODALITIES:
        looks = [
            class_map.posteriors(pair[m](x).logits, m)
            for x in (images[m].images(), images[m].images().flip(3))
        ]
        assert torch.allclose(
            found["teacher-posteriors", "mirror"][m], (looks[0] + looks[1]) / 2, atol=1e-5
        )


def test_readouts_with_several_members_of_a_class(images):
    "Two own classes that mean one: posteriors add up, in the logits' read-out too."
    teachers = {
        PHOTO: teacher(PHOTO, ["beagle", "poodle", "cat"]),
        SKETCH: teacher(SKETCH, ["cat", "dog"]),
    }
    class_map = align_classes(
        teachers[PHOTO].classes, teachers[SKETCH].classes, {"beagle": "dog", "poodle": "dog"}
    )
    found, _ = teacher_embeddings(teachers, class_map, images[PHOTO], images[SKETCH])
    p = teachers[PHOTO](images[PHOTO].images()).posteriors
    assert class_map.classes == ["cat", "dog"]
    assert torch.allclose(
        found["teacher-posteriors", ""][PHOTO],
        torch.stack([p[:, 2], p[:, 0] + p[:, 1]], 1),
        atol=1e-5,
    )
    z = teachers[PHOTO](images[PHOTO].images()).logits
    assert torch.allclose(
        found["teacher-logits", ""][PHOTO],
        F.normalize(torch.stack([z[:, 2], z[:, :2].logsumexp(1)], 1), dim=1),
        atol=1e-4,
    )


def test_the_inner_product_knows_how_sure_the_gallery_is():
    "Why it is the stronger form: with calibrated answers it orders photos by the probability of being right, where the cosine cannot."
    sure, unsure, other = (
        torch.tensor([0.9, 0.1]),
        torch.tensor([0.6, 0.4]),
        torch.tensor([0.1, 0.9]),
    )
    photos, query = torch.stack([unsure, sure, other]), torch.tensor([[0.6, 0.4]])
    assert (query @ photos.T).argmax() == 1 and (
        F.normalize(query, dim=1) @ F.normalize(photos, dim=1).T
    ).argmax() == 0


def test_features_of_different_width_are_left_out_with_a_reason(pair, images):
    teachers = {PHOTO: pair[PHOTO], SKETCH: teacher(SKETCH, TOY_CLASSES[:4], "small")}
    found, left_out = teacher_embeddings(
        teachers, align_classes(TOY_CLASSES[:4], TOY_CLASSES[:4]), images[PHOTO], images[SKETCH]
    )
    assert (
        list(left_out) == [TEACHER_EMBEDDINGS[0]]
        and "16" in left_out[TEACHER_EMBEDDINGS[0]]
        and "128" in left_out[TEACHER_EMBEDDINGS[0]]
    )
    assert tuple(found) == TEACHER_EMBEDDINGS[1:]


# ---- the ceiling


def test_it_has_the_students_of_crossx(pair, real):
    c = config()
    ours, theirs = (
        DataDependent(pair[PHOTO], pair[SKETCH], c, real[PHOTO], real[SKETCH]),
        CrossX(pair[PHOTO], pair[SKETCH], c),
    )
    for m in MODALITIES:
        a, b = ours.crossx.distiller.encoders()[m], theirs.distiller.encoders()[m]
        assert a.card == b.card and all(
            torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items()
        )
    assert ours.crossx.distiller.terms.weights == theirs.distiller.terms.weights
    assert (
        ours.crossx.distiller.optimizer.param_groups[0]["lr"]
        == theirs.distiller.optimizer.param_groups[0]["lr"]
    )


@pytest.mark.parametrize("preset", ["dfsbir", "paper"])
def test_it_takes_as_many_steps_of_the_same_size(pair, real, preset, monkeypatch):
    changes = dict(
        rounds=2,
        student_steps=2,
        student_batch=5,
        width=8,
        photo_size=SIZE,
        sketch_size=SIZE,
        device="cpu",
    )
    c = CrossXConfig.preset(preset, **changes)
    run = DataDependent(pair[PHOTO], pair[SKETCH], c, real[PHOTO], real[SKETCH])
    sizes, step = [], run.crossx.distiller.step
    monkeypatch.setattr(
        run.crossx.distiller, "step", lambda batch: sizes.append(len(batch)) or step(batch)
    )
    encoders = run.fit(progress=False)
    assert sizes == [5] * 4 == [c.student_batch] * c.plan().count("teach")
    assert encoders[PHOTO].card["head"]["kind"] == c.readout


def test_pairs_are_real_and_of_one_class(pair, real):
    run = DataDependent(pair[PHOTO], pair[SKETCH], config(), real[PHOTO], real[SKETCH])
    pairs = run.sample(40)
    for m in MODALITIES:
        distance = (pairs.of(m)[:, None] - real[m].images()[None]).abs().flatten(2).sum(2)
        at = distance.argmin(1)
        assert distance.min(1)[0].max() == 0
        assert [real[m].classes[k] for k in real[m].labels[at]] == [
            run.classes[k] for k in pairs.label
        ]
    assert len(set(pairs.label.tolist())) == 3


def test_targets_are_what_a_crossx_run_would_teach(pair, real):
    "The teachers' answers to the very images that the students see, blends included; the pairs are real before that."
    run = DataDependent(
        pair[PHOTO],
        pair[SKETCH],
        config(views=1, vary=False, mix=1.0, temperature=2.0),
        real[PHOTO],
        real[SKETCH],
    )
    run.crossx.collect()
    for m in MODALITIES:
        assert torch.allclose(
            run.batch.target_of(m),
            run.crossx.class_map.posteriors(pair[m](run.batch.of(m)).logits, m, 2.0),
            atol=1e-5,
        )
    assert (
        (run.batch.photo[:, None] - real[PHOTO].images()[None]).abs().flatten(2).sum(2).min(1)[0]
        > 0
    ).sum() > 1, "blends, but where an image met itself"


def test_labels_as_targets(pair, real):
    run = DataDependent(
        pair[PHOTO],
        pair[SKETCH],
        config(vary=False, mix=1.0),
        real[PHOTO],
        real[SKETCH],
        labels=True,
    )
    run.crossx.collect()
    for m in MODALITIES:
        assert torch.equal(run.batch.target_of(m), F.one_hot(run.batch.label, 3).float())
        assert (run.batch.of(m)[:, None] - real[m].images()[None]).abs().flatten(2).sum(2).min(1)[
            0
        ].max() == 0, "none is a blend"


def test_same_seed_same_ceiling(pair, real):
    first, again, other = (
        DataDependent(pair[PHOTO], pair[SKETCH], config(seed=s), real[PHOTO], real[SKETCH])
        .fit(progress=False)[PHOTO]
        .state_dict()
        for s in (0, 0, 1)
    )
    assert all(torch.equal(v, again[k]) for k, v in first.items())
    assert any(not torch.equal(v, other[k]) for k, v in first.items())


def test_it_learns(real):
    "Fresh students and true labels: from chance to better than chance."
    classes = TOY_CLASSES[:5]
    c = config(
        warm_start=False,
        batch=10,
        student_steps=60,
        student_batch=24,
        student_lr=3e-3,
        average=0.0,
        vary=False,
    )
    run = DataDependent(
        teacher(PHOTO, classes),
        teacher(SKETCH, classes, seed=1),
        c,
        real[PHOTO],
        real[SKETCH],
        labels=True,
    )
    encoders = run.fit(progress=False)
    with torch.no_grad():
        report = evaluate_retrieval(
            *(encoders[m](real[m].images()) for m in (SKETCH, PHOTO)),
            *(real[m].labels for m in (SKETCH, PHOTO)),
        )
    assert report.metrics["mAP@all"] > report.floor["mAP@all"] + 0.2


def test_the_data_free_law_forbids_it(pair, real):
    with data_free(), pytest.raises(DataFreeViolation, match="ceiling"):
        DataDependent(pair[PHOTO], pair[SKETCH], config(), real[PHOTO], real[SKETCH])


def test_a_shared_class_without_images_is_named(pair, real):
    with pytest.raises(ValueError, match=TOY_CLASSES[2]):
        DataDependent(
            pair[PHOTO],
            pair[SKETCH],
            config(),
            real[PHOTO].take(real[PHOTO].labels != 2),
            real[SKETCH],
        )


# ---- the five data-free baselines: what they have in common


@pytest.fixture(scope="module")
def foreign():
    "Real images of classes that nobody knows; photos and sketches of different instances."
    return {
        m: toy_pairs(10, size=SIZE, classes=TOY_HELD_OUT, seed=i)[i]
        for i, m in enumerate(MODALITIES)
    }


def baseline(method, pair, foreign, c, **changes):
    return make_baseline(
        method, pair[PHOTO], pair[SKETCH], c, foreign[PHOTO], foreign[SKETCH], **changes
    )


@pytest.mark.parametrize("preset", ["dfsbir", "paper"])
@pytest.mark.parametrize("method", BASELINES)
def test_every_baseline_has_the_interface_of_crossx(method, preset, pair, foreign, tmp_path):
    "fit(run) gives encoders in one space, and saves the same ones."
    c = (
        config()
        if preset == "dfsbir"
        else CrossXConfig.preset(
            "paper",
            rounds=2,
            student_batch=5,
            width=8,
            photo_size=SIZE,
            sketch_size=SIZE,
            device="cpu",
            batch=6,
            new_pairs=6,
            bank=6,
        )
    )
    run = RunFolder(tmp_path / "run", {})
    encoders = baseline(method, pair, foreign, c).fit(run, progress=False)
    kept = load_encoders(run.encoders)
    x = {
        m: torch.rand(3, m.channels, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
        for m in MODALITIES
    }
    for m in MODALITIES:
        e = encoders[m](x[m])
        assert e.shape == (3, 64) and torch.allclose(e.norm(dim=1), torch.ones(3), atol=1e-4)
        assert torch.allclose(e, kept[m](x[m]), atol=1e-5)
        assert encoders[m].card["classes"] == list(TOY_CLASSES[1:4])


@pytest.mark.parametrize("method", [b for b in BASELINES if b != "averaging-weights"])
@pytest.mark.parametrize("warm", [True, False])
def test_same_students_and_as_many_steps_of_the_same_size(
    method, warm, pair, foreign, tmp_path, monkeypatch
):
    c = config() if warm else from_scratch(config())
    ours, theirs = baseline(method, pair, foreign, c), CrossX(pair[PHOTO], pair[SKETCH], c)
    ours = getattr(ours, "crossx", ours)
    for m in MODALITIES:
        a, b = ours.distiller.encoders()[m], theirs.distiller.encoders()[m]
        assert a.card == b.card and all(
            torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items()
        )
    sizes, step = [], ours.distiller.step
    monkeypatch.setattr(
        ours.distiller, "step", lambda batch: sizes.append(len(batch)) or step(batch)
    )
    run = baseline(method, pair, foreign, c)
    getattr(run, "crossx", run).distiller.step = ours.distiller.step
    run.fit(RunFolder(tmp_path / "run", {}), progress=False)
    assert sizes == [c.student_batch] * c.plan().count("teach")


def test_the_start_is_the_config_s(pair, foreign):
    "Warm students are the teachers before the first step, cold ones are not; nothing else of the config moves."
    c = config(seed=9)
    cold = from_scratch(c, student_steps=7)
    assert {k for k, v in vars(c).items() if v != getattr(cold, k)} == {
        "warm_start",
        "student_lr",
        "student_steps",
    }
    for method in ("gaussian-prior", "alternative-data"):
        for k, same in ((c, True), (cold, False)):
            net = (
                baseline(method, pair, foreign, k)
                .crossx.distiller.encoders()[PHOTO]
                .net.state_dict()
            )
            assert torch.equal(net["fc.weight"], pair[PHOTO].net.state_dict()["fc.weight"]) is same


def test_callbacks_hear_every_step(pair, foreign):
    heard = []
    baseline("gaussian-prior", pair, foreign, config()).fit(
        callbacks=[lambda crossx, action, scalars: heard.append((action, set(scalars)))],
        progress=False,
    )
    assert heard == [("teach", {"consistency", "total"})] * 3


def test_same_seed_same_baseline(pair, foreign):
    for method in ("gaussian-prior", "alternative-data"):
        first, again, other = (
            baseline(method, pair, foreign, config(seed=s)).fit(progress=False)[SKETCH].state_dict()
            for s in (0, 0, 1)
        )
        assert all(torch.equal(v, again[k]) for k, v in first.items())
        assert any(not torch.equal(v, other[k]) for k, v in first.items())


def test_pairs_nobody_named_take_the_class_both_teachers_agree_on(pair, foreign):
    batch = baseline("gaussian-prior", pair, foreign, config()).sample(12)
    class_map = align_classes(*(pair[m].classes for m in MODALITIES))
    p = [class_map.posteriors(pair[m](batch.of(m)).logits, m) for m in MODALITIES]
    assert batch.label.tolist() == [
        max(range(3), key=lambda k: (p[0][i, k] * p[1][i, k]).item()) for i in range(12)
    ]


def test_an_unknown_baseline_and_a_frame_without_pairs(pair):
    with pytest.raises(ValueError, match="meta-data"):
        make_baseline("metadata", pair[PHOTO], pair[SKETCH], config())
    with pytest.raises(NotImplementedError, match="OtherPairs"):
        OtherPairs(pair[PHOTO], pair[SKETCH], config()).sample(2)


# ---- each by itself


def test_noise_is_standard_normal_to_each_net():
    "Whatever its size, mean, deviation and polarity; only what no image can hold is clipped."

    def odd(modality, **own):
        torch.manual_seed(0)
        return Teacher(
            build_net("dfsbir", "tiny", 3),
            TOY_CLASSES[:3],
            Normalizer(**own),
            modality,
            card=dict(source="dfsbir", name="tiny"),
        )

    teachers = (
        odd(PHOTO, size=20, mean=(0.2, 0.5, 0.7), std=(0.05, 0.1, 0.2)),
        odd(SKETCH, size=24, mean=(0.6, 0.6, 0.6), std=(0.1, 0.1, 0.1), dark_on_light=False),
    )
    batch = GaussianPrior(*teachers, config()).sample(200)
    assert batch.photo.shape == (200, 3, 20, 20) and batch.sketch.shape == (200, 1, 24, 24)
    for t, x in zip(teachers, (batch.photo, batch.sketch)):
        seen = t.normalizer(x)
        assert x.min() >= 0 and x.max() <= 1
        assert torch.allclose(seen.mean((0, 2, 3)), torch.zeros(3), atol=0.05) and torch.allclose(
            seen.std((0, 2, 3)), torch.ones(3), atol=0.08
        )


def test_noise_for_a_grey_photo_net():
    grey = teacher(PHOTO, TOY_CLASSES[:3], "grey")
    grey.normalizer.std.fill_(0.1)  # nothing is clipped
    x = GaussianPrior(grey, teacher(SKETCH, TOY_CLASSES[:3]), config()).sample(100).photo
    assert x.shape == (100, 3, SIZE, SIZE) and abs(grey.normalizer(x).std() - 1) < 0.02, (
        "three independent channels would add up to .7"
    )


def test_noise_is_neither_turned_nor_blended(pair, foreign):
    run = baseline("gaussian-prior", pair, foreign, config(vary=True, mix=1.0))
    run.crossx.collect()
    again = baseline("gaussian-prior", pair, foreign, config()).sample(6)
    assert torch.equal(run.batch.photo, again.photo)


def test_alternative_data_are_real_and_of_no_known_class(pair, foreign):
    names = (
        *TOY_HELD_OUT[:2],
        *TOY_CLASSES[:2],
        TOY_CLASSES[4],
    )  # the last three: known to the photo teacher, to both, to the sketch teacher
    mixed = {
        m: toy_pairs(20, size=SIZE, classes=names, seed=i)[i] for i, m in enumerate(MODALITIES)
    }
    run = AlternativeData(pair[PHOTO], pair[SKETCH], config(), mixed[PHOTO], mixed[SKETCH])
    batch = run.sample(30)
    kinds = []
    for m in MODALITIES:
        far = (batch.of(m)[:, None] - mixed[m].images()[None]).abs().flatten(2).sum(2)
        assert far.min(1)[0].max() == 0
        kinds.append([names[k] for k in mixed[m].labels[far.argmin(1)]])
    assert kinds[0] == kinds[1] and set(kinds[0]) == set(TOY_HELD_OUT[:2])


def test_alternative_data_without_a_class_in_common_are_paired_at_random(pair):
    photos, sketches = (
        toy_pairs(12, size=SIZE, classes=TOY_HELD_OUT[:2])[0],
        toy_pairs(12, size=SIZE, classes=TOY_HELD_OUT[2:4])[1],
    )
    run = AlternativeData(pair[PHOTO], pair[SKETCH], config(), photos, sketches)
    assert all(len(run.members[m]) == 1 and len(run.members[m][0]) == 12 for m in MODALITIES)
    run.fit(progress=False)


def test_alternative_data_all_known_or_forbidden(pair, real, foreign):
    with pytest.raises(ValueError, match="known to a teacher"):
        AlternativeData(pair[PHOTO], pair[SKETCH], config(), real[PHOTO], foreign[SKETCH])
    with pytest.raises(ValueError, match="known to a teacher"):  # by another name
        AlternativeData(
            pair[PHOTO],
            pair[SKETCH],
            config(),
            foreign[PHOTO],
            foreign[SKETCH],
            dict.fromkeys(TOY_HELD_OUT, TOY_CLASSES[1]),
        )
    with pytest.raises(ValueError, match="photos and sketches"):
        make_baseline("alternative-data", pair[PHOTO], pair[SKETCH], config())
    with data_free(), pytest.raises(DataFreeViolation, match="alternative"):
        AlternativeData(pair[PHOTO], pair[SKETCH], config(), foreign[PHOTO], foreign[SKETCH])


@pytest.mark.parametrize("preset", ["dfsbir", "paper"])
def test_uni_modal_students_do_not_know_of_each_other(preset, pair):
    "Another sketch teacher of the same classes changes nothing in the photo student."
    c = uni_modal(
        config()
        if preset == "dfsbir"
        else CrossXConfig.preset(
            "paper",
            photo_size=SIZE,
            sketch_size=SIZE,
            device="cpu",
            width=8,
            student_batch=6,
            batch=6,
            new_pairs=6,
            bank=6,
        )
    )
    kept = []
    for seed in (1, 5):
        run = CrossX(pair[PHOTO], teacher(SKETCH, TOY_CLASSES[1:5], seed=seed), c)
        torch.manual_seed(0)
        for action in ("synthesize", "synthesize", "collect", "teach", "teach"):
            run.act(action)
        kept.append(run.distiller.encoders()[PHOTO].state_dict())
    assert all(torch.equal(v, kept[1][k]) for k, v in kept[0].items())


def test_meta_data_asks_for_statistics_alone():
    c = meta_data(config())
    assert {k for k, v in vars(c).items() if k.startswith("w_") and v} == {
        "w_bn",
        "w_total_variation",
        "w_consistency",
    } and not c.conditioned
    assert meta_data(CrossXConfig.preset("paper")).w_bn == 1.0


@pytest.mark.parametrize("make", [uni_modal, meta_data])
def test_distillations_want_estimates(make):
    "On nameless objects they would be another method under their name."
    for c in (CrossXConfig.preset("open"), config(pairs="objects", warmup=0)):
        with pytest.raises(
            ValueError, match="learns from estimates.*pairs='objects'.*gaussian-prior"
        ):
            make(c)


def test_uni_modal_leaves_out_what_other_readouts_want():
    c = uni_modal(config(readout="joint", w_instance=1.0, head_lr=1e-3))
    assert (c.readout, c.w_instance, c.head_lr) == ("posterior", 0.0, 0.0)


def test_the_readout_of_layers_is_no_baseline_s(pair, images):
    c = config(pairs="objects", warmup=0, readout="layers", layers="blocks.0.bn1", w_instance=0.0)
    for make in (
        lambda: GaussianPrior(*pair.values(), c),
        lambda: AveragingWeights(*pair.values(), c),
        lambda: DataDependent(*pair.values(), c, *images.values()),
    ):
        with pytest.raises(ValueError, match="no baseline sees.*another readout"):
            make()


def test_fresh_students_are_kept_as_they_end():
    assert (
        CrossXConfig.preset("open").interpolate
        < 1
        == from_scratch(CrossXConfig.preset("open")).interpolate
    )


def test_meta_data_come_near_the_teachers_statistics(images):
    "Teachers that have seen images once, without learning: their batch norms remember them."
    teachers = [teacher(m, TOY_CLASSES[:4]) for m in MODALITIES]
    for t in teachers:
        for norm in (m for m in t.net.modules() if isinstance(m, torch.nn.BatchNorm2d)):
            norm.momentum = None
        t.net.train()(t.normalizer(images[t.modality].images()))
        t.net.eval()
    run = CrossX(
        *teachers, meta_data(config(warmup=60, batch=12, width=16, photo_lr=0.02, sketch_lr=0.02))
    )
    off = []
    for _ in range(60):
        run.act("synthesize")
        off.append(run.estimator.terms.last["bn"])
    assert sum(off[-5:]) < 0.7 * sum(off[:5])


def test_meta_data_wants_batch_norms(pair):
    bare = Teacher(
        torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3),
            torch.nn.ReLU(),
            torch.nn.AdaptiveAvgPool2d(1),
            torch.nn.Flatten(),
            torch.nn.Linear(4, 4),
        ),
        TOY_CLASSES[:4],
        Normalizer(SIZE),
        PHOTO,
    )
    with pytest.raises(ValueError, match="photo teacher has no batch norm"):
        make_baseline(
            "meta-data", bare, pair[SKETCH], config(student_net="dfsbir/tiny", warm_start=False)
        )


# ---- averaged weights


def test_the_mean_against_a_slow_loop(pair):
    class_map = align_classes(*(pair[m].classes for m in MODALITIES))
    mean, states = average_weights(pair, class_map), [pair[m].net.state_dict() for m in MODALITIES]
    for k, v in mean.items():
        if k.startswith("fc"):
            for row, c in enumerate(class_map.classes):
                assert torch.allclose(
                    v[row],
                    sum(s[k][pair[m].classes.index(c)] for s, m in zip(states, MODALITIES)) / 2,
                    atol=1e-6,
                )
        elif v.is_floating_point():
            assert torch.allclose(v, (states[0][k] + states[1][k]) / 2)


def test_the_mean_of_a_net_with_itself_is_that_net(images):
    one = {m: teacher(m, TOY_CLASSES[:3], seed=3) for m in MODALITIES}
    encoders = AveragingWeights(
        one[PHOTO], one[SKETCH], config(mirror=False, temperature=1.0)
    ).fit()
    for m in MODALITIES:
        p = (
            encoders[m]
            .head.log_posteriors(encoders[m].net(encoders[m].normalizer(images[m].images())))
            .exp()
        )
        assert torch.allclose(p, one[m](images[m].images()).posteriors, atol=1e-5)


def test_members_of_a_class_are_averaged_first():
    teachers = {
        PHOTO: teacher(PHOTO, ["beagle", "cat", "poodle"]),
        SKETCH: teacher(SKETCH, ["cat", "dog"], seed=1),
    }
    class_map = align_classes(
        teachers[PHOTO].classes, teachers[SKETCH].classes, {"beagle": "dog", "poodle": "dog"}
    )
    got, p, s = (
        average_weights(teachers, class_map)["fc.weight"],
        teachers[PHOTO].proxies,
        teachers[SKETCH].proxies,
    )
    assert torch.allclose(
        got[class_map.classes.index("dog")], ((p[0] + p[2]) / 2 + s[1]) / 2, atol=1e-6
    )


def test_a_grey_net_becomes_the_same_function_of_three_channels():
    "Averaged with its own three-channel form it is unchanged, on grey and on coloured images."
    torch.manual_seed(0)
    grey = SmallNet(3, (8, 16), channels=1).eval()
    state = grey.state_dict()
    spread = SmallNet(3, (8, 16)).eval()
    spread.load_state_dict(
        {
            **state,
            "stem.0.weight": state["stem.0.weight"]
            * torch.tensor(Normalizer.LUMA).view(1, 3, 1, 1),
        }
    )
    teachers = {
        PHOTO: Teacher(
            spread,
            TOY_CLASSES[:3],
            Normalizer(SIZE),
            PHOTO,
            card=dict(source="dfsbir", name="tiny"),
        ),
        SKETCH: Teacher(grey, TOY_CLASSES[:3], Normalizer(SIZE, 1, 0.5, 0.5), SKETCH),
    }
    encoders = AveragingWeights(teachers[PHOTO], teachers[SKETCH], config(mirror=False)).fit()
    for x in (torch.rand(4, 1, SIZE, SIZE), torch.rand(4, 3, SIZE, SIZE)):
        for m in MODALITIES:
            assert torch.allclose(
                encoders[m].net(encoders[m].normalizer(x)), teachers[SKETCH](x).logits, atol=1e-4
            )


@pytest.mark.parametrize("names", [("grey", "grey"), ("grey", "small"), ("small", "grey")])
def test_the_mean_with_grey_nets_embeds_both_modalities(names, tmp_path):
    teachers = [
        teacher(m, TOY_CLASSES[:3], name, seed=k)
        for k, (m, name) in enumerate(zip(MODALITIES, names))
    ]
    run = RunFolder(tmp_path / "run", {})
    AveragingWeights(*teachers, config()).fit(run)
    for m, e in load_encoders(run.encoders).items():
        assert e(
            torch.rand(2, m.channels, SIZE, SIZE)
        ).isfinite().all() and e.normalizer.channels == (1 if names == ("grey", "grey") else 3)


def test_other_architectures_have_no_mean(pair):
    class_map = align_classes(TOY_CLASSES[:4], TOY_CLASSES[:4])
    with pytest.raises(ValueError, match="equal architectures"):
        average_weights(
            {PHOTO: pair[PHOTO], SKETCH: teacher(SKETCH, TOY_CLASSES[:4], "small")}, class_map
        )
    wide = Teacher(SmallNet(4, (8, 24)), TOY_CLASSES[:4], Normalizer(SIZE), SKETCH)
    with pytest.raises(
        ValueError, match=r"blocks.0.one.weight is \(16, 8, 3, 3\) and \(24, 8, 3, 3\)"
    ):
        average_weights({PHOTO: pair[PHOTO], SKETCH: wide}, class_map)


def test_a_net_that_nobody_can_rebuild_has_no_average():
    alike = [
        Teacher(SmallNet(3, (8, 16)), TOY_CLASSES[:3], Normalizer(SIZE), m) for m in MODALITIES
    ]
    with pytest.raises(ValueError, match="rebuilt"):
        AveragingWeights(*alike, config())
