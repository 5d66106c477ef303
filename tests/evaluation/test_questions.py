"""Questions: which test sketches search which test photos, and what is measured among them."""

import pytest
import torch

from dfsbir.core.device import make_fabric
from dfsbir.core.types import MODALITIES, Modality
from dfsbir.data.toy_shapes import TOY_CLASSES, TOY_HELD_OUT
from dfsbir.evaluation.questions import embed_test, plan_questions, whole_question
from dfsbir.teachers.class_groups import group_classes
from dfsbir.teachers.class_map import align_classes, to_shared
from dfsbir.teachers.experiment_data import ToyData
from dfsbir.teachers.teacher_recipe import TeacherRecipe

PHOTO, SKETCH = MODALITIES


@pytest.fixture(scope="module")
def asked():
    "Class map, groups, test images and questions of teachers that share four of seven classes."
    unseen = list(TOY_HELD_OUT[:2])
    class_map = align_classes(TOY_CLASSES[:6], (*TOY_CLASSES[2:6], TOY_CLASSES[7]))
    groups = group_classes(class_map, {}, unseen)
    names = [c for g in groups.values() for c in g]
    found = ToyData(60, 40, 28).test(names, unseen)
    test = {m: to_shared(found[m], names) for m in MODALITIES}
    return groups, names, test, plan_questions("toy", groups, test)


def test_questions_against_a_slow_loop(asked):
    groups, names, test, questions = asked
    known = [c for g in ("shared", "photo-only", "sketch-only") for c in groups[g]]
    wanted = {
        "toy": (groups["shared"], groups["shared"]),
        "toy/all": (known, known),
        "toy/photo-only": (groups["photo-only"], known),
        "toy/sketch-only": (groups["sketch-only"], known),
        "toy/unseen": (groups["unseen"], groups["unseen"]),
    }
    assert [q.dataset for q in questions] == list(wanted)
    for q in questions:
        for m, classes in zip((SKETCH, PHOTO), wanted[q.dataset]):
            slow = [i for i, k in enumerate(test[m].labels.tolist()) if names[k] in classes]
            assert q.places[m].tolist() == slow


def test_answers_are_measured_among_the_asked_images_alone(asked):
    _, names, test, questions = asked
    space = {m: torch.nn.functional.one_hot(test[m].labels, len(names)).float() for m in MODALITIES}
    for q in questions:
        report = q.ask(space, test)
        assert report.metrics["mAP@all"] == 1.0 and report.classes == names
        assert len(report.query_labels) == len(q.places[SKETCH])
    whole = whole_question("toy", test)
    assert len(whole.places[PHOTO]) == len(test[PHOTO])


def test_a_class_without_test_images_is_named(asked):
    groups, names, test, _ = asked
    without = {**test, SKETCH: test[SKETCH].take(test[SKETCH].labels != 0)}
    with pytest.raises(ValueError, match=names[0]):
        plan_questions("toy", groups, without)


def test_embeddings_of_the_test_images(asked):
    _, names, test, _ = asked
    recipe = TeacherRecipe(net="tiny", size=28)
    encoders = {m: recipe.untrained(m, names).net for m in MODALITIES}

    class Encoder(torch.nn.Module):
        def __init__(self, modality):
            super().__init__()
            self.net, self.modality = encoders[modality], modality

        def forward(self, x):
            return self.net(x.expand(-1, 3, -1, -1))

    space = embed_test({m: Encoder(m).eval() for m in MODALITIES}, test, make_fabric("cpu"))
    assert [len(space[m]) for m in MODALITIES] == [len(test[m]) for m in MODALITIES]
    assert Modality.PHOTO in space
