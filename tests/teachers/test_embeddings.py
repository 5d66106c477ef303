"""What the teachers alone offer for retrieval: their embeddings against the definitions."""

import pytest
import torch
import torch.nn.functional as F

from dfsbir.core.types import MODALITIES
from dfsbir.data.image_set import ImageSet
from dfsbir.data.toy import toy_pairs
from dfsbir.data.toy_shapes import TOY_CLASSES
from dfsbir.teachers.class_map import align_classes, to_shared
from dfsbir.teachers.embeddings import TEACHER_EMBEDDINGS, teacher_embeddings
from dfsbir.teachers.nets import build_net, input_of
from dfsbir.teachers.teacher import Teacher

SIZE, PHOTO, SKETCH = 28, *MODALITIES


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


# ---- the teachers' own embeddings


def cosine(a, b):
    return (a @ b / a.norm() / b.norm()).item()


@pytest.mark.parametrize("i, j", [(0, 0), (3, 17)])
def test_the_definitions(pair, images, i, j):
    "Similarity of photo i and sketch j, computed by hand."
    class_map = align_classes(*(pair[m].classes for m in MODALITIES))
    found, left_out = teacher_embeddings(pair, class_map, images[PHOTO], images[SKETCH])
    assert tuple(found) == TEACHER_EMBEDDINGS and not left_out
    score = {k: (space[SKETCH][j] @ space[PHOTO][i]).item() for k, space in found.items()}
    out = {m: pair[m](images[m].images()) for m in MODALITIES}
    z, p = {}, {}
    for m, n in ((PHOTO, i), (SKETCH, j)):
        own = [out[m].logits[n, pair[m].classes.index(c)] for c in class_map.classes]
        z[m] = torch.stack(own)
        p[m] = z[m].exp() / z[m].exp().sum()
    features = cosine(out[PHOTO].features[i], out[SKETCH].features[j])
    product = sum(p[PHOTO][k].item() * p[SKETCH][k].item() for k in range(3))
    wanted = {
        ("teacher-features", ""): features,
        ("teacher-logits", ""): cosine(z[PHOTO], z[SKETCH]),
        ("teacher-posteriors", ""): product,
        ("teacher-posteriors", "cosine"): cosine(p[PHOTO], p[SKETCH]),
    }
    for key, value in wanted.items():
        assert score[key] == pytest.approx(value, abs=1e-4), key


def test_mirror_is_the_mean_over_an_image_and_its_mirror_image(pair, images):
    class_map = align_classes(*(pair[m].classes for m in MODALITIES))
    found, _ = teacher_embeddings(pair, class_map, images[PHOTO], images[SKETCH])
    for m in MODALITIES:
        x = images[m].images()
        views = [class_map.posteriors(pair[m](v).logits, m) for v in (x, x.flip(3))]
        mean = (views[0] + views[1]) / 2
        assert torch.allclose(found["teacher-posteriors", "mirror"][m], mean, atol=1e-5)


def test_several_own_classes_of_one_shared_class(images):
    "Two own classes that mean one: posteriors add up, among the logits too."
    teachers = {
        PHOTO: teacher(PHOTO, ["beagle", "poodle", "cat"]),
        SKETCH: teacher(SKETCH, ["cat", "dog"]),
    }
    aliases = {"beagle": "dog", "poodle": "dog"}
    class_map = align_classes(teachers[PHOTO].classes, teachers[SKETCH].classes, aliases)
    found, _ = teacher_embeddings(teachers, class_map, images[PHOTO], images[SKETCH])
    out = teachers[PHOTO](images[PHOTO].images())
    p, z = out.posteriors, out.logits
    assert class_map.classes == ["cat", "dog"]
    added = torch.stack([p[:, 2], p[:, 0] + p[:, 1]], 1)
    assert torch.allclose(found["teacher-posteriors", ""][PHOTO], added, atol=1e-5)
    joined = F.normalize(torch.stack([z[:, 2], z[:, :2].logsumexp(1)], 1), dim=1)
    assert torch.allclose(found["teacher-logits", ""][PHOTO], joined, atol=1e-4)


def test_the_inner_product_prefers_the_more_certain_photo():
    "With calibrated posteriors it orders photos by the probability of being right."
    certain, uncertain, other = (torch.tensor(p) for p in ([0.9, 0.1], [0.6, 0.4], [0.1, 0.9]))
    photos, query = torch.stack([uncertain, certain, other]), torch.tensor([[0.6, 0.4]])
    assert (query @ photos.T).argmax() == 1
    cosines = F.normalize(query, dim=1) @ F.normalize(photos, dim=1).T
    assert cosines.argmax() == 0, "the cosine cannot"


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
