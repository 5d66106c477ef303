"""Floor, read-outs and ceiling: oracles by hand, odd teachers, and that the ceiling is the CrossX students on real images."""
import pytest
import torch
import torch.nn.functional as F

from dfsbir.baselines import READOUTS, DataDependent, teacher_readouts, to_shared
from dfsbir.core import MODALITIES, DataFreeViolation, Modality, Normalizer, data_free
from dfsbir.crossx import CrossX, CrossXConfig
from dfsbir.data import TOY_CLASSES, ImageSet, toy_pairs
from dfsbir.evaluation import evaluate_retrieval
from dfsbir.teachers import Teacher, align_classes, build_net

SIZE, PHOTO, SKETCH = 28, *MODALITIES


def teacher(modality, classes, name="tiny", seed=0):
    "An untrained teacher: its answers are as good as any to check arithmetic."
    torch.manual_seed(seed)
    return Teacher(build_net("dfsbir", name, len(classes)), classes, Normalizer(SIZE), modality, card=dict(source="dfsbir", name=name))


@pytest.fixture(scope="module")
def pair():
    "Teachers of (a, b, c, d) and (b, c, d, e) with the toy classes' names."
    return {PHOTO: teacher(PHOTO, TOY_CLASSES[:4]), SKETCH: teacher(SKETCH, TOY_CLASSES[1:5], seed=1)}


@pytest.fixture(scope="module")
def images():
    return dict(zip(MODALITIES, toy_pairs(40, size=SIZE, classes=TOY_CLASSES[:5], split="test")))


@pytest.fixture(scope="module")
def real():
    "Training images of each modality, of different instances."
    return {m: toy_pairs(30, size=SIZE, classes=TOY_CLASSES[:5], seed=i)[i] for i, m in enumerate(MODALITIES)}


def config(**changes):
    return CrossXConfig.preset("dfsbir", **{"device": "cpu", "photo_size": SIZE, "sketch_size": SIZE, "warmup": 2, "student_steps": 3, "student_batch": 6, "new_pairs": 12, "bank": 24, "batch": 6, "strokes": 3, "pages": 2, "width": 8, **changes})


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
    data = ImageSet(torch.zeros(3, 1, 8, 8), [0, 1, 0], ["A_b", "c"], SKETCH, ["p", "q", "r"], [5, 6, 7], [("x", "torn")])
    got = to_shared(data, ["a b"])
    assert (got.paths, got.instances.tolist(), got.broken) == (["p", "r"], [5, 7], [("x", "torn")])


# ---- the teachers' read-outs

def test_readouts_against_the_definitions(pair, images):
    class_map = align_classes(*(pair[m].classes for m in MODALITIES))
    found, left_out = teacher_readouts(pair, class_map, images[PHOTO], images[SKETCH])
    assert tuple(found) == READOUTS and not left_out
    logits, features = ({m: getattr(pair[m](images[m].images()), what) for m in MODALITIES} for what in ("logits", "features"))
    for i, j in ((0, 0), (3, 17)):
        def score(key):
            return (found[key][SKETCH][j] @ found[key][PHOTO][i]).item()
        z = {m: torch.stack([logits[m][n, pair[m].classes.index(c)] for c in class_map.classes]) for m, n in ((PHOTO, i), (SKETCH, j))}
        p = {m: z[m].exp() / z[m].exp().sum() for m in MODALITIES}
        cos = lambda a, b: (a @ b / a.norm() / b.norm()).item()
        assert score(("teacher-features", "")) == pytest.approx(cos(features[PHOTO][i], features[SKETCH][j]), abs=1e-4)
        assert score(("teacher-logits", "")) == pytest.approx(cos(z[PHOTO], z[SKETCH]), abs=1e-4)
        assert score(("teacher-posteriors", "")) == pytest.approx(sum(p[PHOTO][k].item() * p[SKETCH][k].item() for k in range(3)), abs=1e-5)
        assert score(("teacher-posteriors", "cosine")) == pytest.approx(cos(p[PHOTO], p[SKETCH]), abs=1e-4)


def test_the_mirror_readout_is_the_mean_of_two_looks(pair, images):
    class_map = align_classes(*(pair[m].classes for m in MODALITIES))
    found, _ = teacher_readouts(pair, class_map, images[PHOTO], images[SKETCH])
    for m in MODALITIES:
        looks = [class_map.posteriors(pair[m](x).logits, m) for x in (images[m].images(), images[m].images().flip(3))]
        assert torch.allclose(found["teacher-posteriors", "mirror"][m], (looks[0] + looks[1]) / 2, atol=1e-5)


def test_readouts_with_several_members_of_a_class(images):
    "Two own classes that mean one: posteriors add up, in the logits' read-out too."
    teachers = {PHOTO: teacher(PHOTO, ["beagle", "poodle", "cat"]), SKETCH: teacher(SKETCH, ["cat", "dog"])}
    class_map = align_classes(teachers[PHOTO].classes, teachers[SKETCH].classes, {"beagle": "dog", "poodle": "dog"})
    found, _ = teacher_readouts(teachers, class_map, images[PHOTO], images[SKETCH])
    p = teachers[PHOTO](images[PHOTO].images()).posteriors
    assert class_map.classes == ["cat", "dog"]
    assert torch.allclose(found["teacher-posteriors", ""][PHOTO], torch.stack([p[:, 2], p[:, 0] + p[:, 1]], 1), atol=1e-5)
    z = teachers[PHOTO](images[PHOTO].images()).logits
    assert torch.allclose(found["teacher-logits", ""][PHOTO], F.normalize(torch.stack([z[:, 2], z[:, :2].logsumexp(1)], 1), dim=1), atol=1e-4)


def test_the_inner_product_knows_how_sure_the_gallery_is():
    "Why it is the stronger form: with calibrated answers it orders photos by the probability of being right, where the cosine cannot."
    sure, unsure, other = torch.tensor([.9, .1]), torch.tensor([.6, .4]), torch.tensor([.1, .9])
    photos, query = torch.stack([unsure, sure, other]), torch.tensor([[.6, .4]])
    assert (query @ photos.T).argmax() == 1 and (F.normalize(query, dim=1) @ F.normalize(photos, dim=1).T).argmax() == 0


def test_features_of_different_width_are_left_out_with_a_reason(pair, images):
    teachers = {PHOTO: pair[PHOTO], SKETCH: teacher(SKETCH, TOY_CLASSES[:4], "small")}
    found, left_out = teacher_readouts(teachers, align_classes(TOY_CLASSES[:4], TOY_CLASSES[:4]), images[PHOTO], images[SKETCH])
    assert list(left_out) == [READOUTS[0]] and "16" in left_out[READOUTS[0]] and "128" in left_out[READOUTS[0]]
    assert tuple(found) == READOUTS[1:]


# ---- the ceiling

def test_it_has_the_students_of_crossx(pair, real):
    c = config()
    ours, theirs = DataDependent(pair[PHOTO], pair[SKETCH], c, real[PHOTO], real[SKETCH]), CrossX(pair[PHOTO], pair[SKETCH], c)
    for m in MODALITIES:
        a, b = ours.crossx.distiller.encoders()[m], theirs.distiller.encoders()[m]
        assert a.card == b.card and all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    assert ours.crossx.distiller.terms.weights == theirs.distiller.terms.weights
    assert ours.crossx.distiller.optimizer.param_groups[0]["lr"] == theirs.distiller.optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("preset", ["dfsbir", "paper"])
def test_it_takes_as_many_steps_of_the_same_size(pair, real, preset, monkeypatch):
    changes = dict(rounds=2, student_steps=2, student_batch=5, width=8, photo_size=SIZE, sketch_size=SIZE, device="cpu")
    c = CrossXConfig.preset(preset, **changes)
    run = DataDependent(pair[PHOTO], pair[SKETCH], c, real[PHOTO], real[SKETCH])
    sizes, step = [], run.crossx.distiller.step
    monkeypatch.setattr(run.crossx.distiller, "step", lambda batch: sizes.append(len(batch)) or step(batch))
    encoders = run.fit(progress=False)
    assert sizes == [5] * 4 == [c.student_batch] * c.plan().count("teach")
    assert encoders[PHOTO].card["readout"]["kind"] == c.readout


def test_pairs_are_real_and_of_one_class(pair, real):
    run = DataDependent(pair[PHOTO], pair[SKETCH], config(), real[PHOTO], real[SKETCH])
    pairs = run.sample(40)
    for m in MODALITIES:
        distance = (pairs.of(m)[:, None] - real[m].images()[None]).abs().flatten(2).sum(2)
        at = distance.argmin(1)
        assert distance.min(1)[0].max() == 0
        assert [real[m].classes[k] for k in real[m].labels[at]] == [run.classes[k] for k in pairs.label]
    assert len(set(pairs.label.tolist())) == 3


def test_targets_are_what_a_crossx_run_would_teach(pair, real):
    "The teachers' answers to the very images that the students see, blends included; the pairs are real before that."
    run = DataDependent(pair[PHOTO], pair[SKETCH], config(views=1, vary=False, mix=1., temperature=2.), real[PHOTO], real[SKETCH])
    run.crossx.collect()
    for m in MODALITIES:
        assert torch.allclose(run.batch.target_of(m), run.crossx.class_map.posteriors(pair[m](run.batch.of(m)).logits, m, 2.), atol=1e-5)
    assert ((run.batch.photo[:, None] - real[PHOTO].images()[None]).abs().flatten(2).sum(2).min(1)[0] > 0).sum() > 1, "blends, but where an image met itself"


def test_labels_as_targets(pair, real):
    run = DataDependent(pair[PHOTO], pair[SKETCH], config(vary=False, mix=1.), real[PHOTO], real[SKETCH], labels=True)
    run.crossx.collect()
    for m in MODALITIES:
        assert torch.equal(run.batch.target_of(m), F.one_hot(run.batch.label, 3).float())
        assert (run.batch.of(m)[:, None] - real[m].images()[None]).abs().flatten(2).sum(2).min(1)[0].max() == 0, "none is a blend"


def test_same_seed_same_ceiling(pair, real):
    first, again, other = (DataDependent(pair[PHOTO], pair[SKETCH], config(seed=s), real[PHOTO], real[SKETCH]).fit(progress=False)[PHOTO].state_dict() for s in (0, 0, 1))
    assert all(torch.equal(v, again[k]) for k, v in first.items())
    assert any(not torch.equal(v, other[k]) for k, v in first.items())


def test_it_learns(real):
    "Fresh students and true labels: from chance to better than chance."
    classes = TOY_CLASSES[:5]
    c = config(warm_start=False, batch=10, student_steps=60, student_batch=24, student_lr=3e-3, average=0., vary=False)
    run = DataDependent(teacher(PHOTO, classes), teacher(SKETCH, classes, seed=1), c, real[PHOTO], real[SKETCH], labels=True)
    encoders = run.fit(progress=False)
    with torch.no_grad():
        report = evaluate_retrieval(*(encoders[m](real[m].images()) for m in (SKETCH, PHOTO)), *(real[m].labels for m in (SKETCH, PHOTO)))
    assert report.metrics["mAP@all"] > report.floor["mAP@all"] + .2


def test_the_data_free_law_forbids_it(pair, real):
    with data_free(), pytest.raises(DataFreeViolation, match="ceiling"):
        DataDependent(pair[PHOTO], pair[SKETCH], config(), real[PHOTO], real[SKETCH])


def test_a_shared_class_without_images_is_named(pair, real):
    with pytest.raises(ValueError, match=TOY_CLASSES[2]):
        DataDependent(pair[PHOTO], pair[SKETCH], config(), real[PHOTO].take(real[PHOTO].labels != 2), real[SKETCH])
