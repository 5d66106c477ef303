"""The links of a distillation: what a teacher knows, and what a student takes over."""

import pytest
import torch
import torch.nn.functional as F

from dfsbir.data.image_set import ImageSet
from dfsbir.finegrained.experiment import FineStudy
from dfsbir.finegrained.neighbourhood import (
    distillation_features,
    examine_links,
    judged_alike,
    own_ranks,
    shared_neighbours,
)
from dfsbir.finegrained.structure import Structure
from dfsbir.finegrained.study import make_study


class Means(torch.nn.Module):
    "The mean colour of an image as its feature."

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return x.mean((2, 3))


@pytest.fixture
def colours():
    "Six photos of one colour each, the last two the same."
    angles = torch.linspace(0.1, 1.4, 5)[[0, 1, 2, 3, 4, 4]]
    colours = torch.stack([angles.cos(), angles.sin(), torch.zeros(6)], 1)
    return ImageSet(colours[:, :, None, None].expand(-1, -1, 16, 16), [0] * 6, ["a"], "photo")


def test_ranks_of_the_photos_themselves(colours):
    "A change of structure leaves a plain colour as it is; of twins the earlier comes first."
    plain = Structure(drop=0)
    assert own_ranks(Means(), colours, plain).tolist() == [1, 1, 1, 1, 1, 2]


def test_judgements_that_follow_the_colours(colours):
    triplets = torch.tensor([[0, 1, 3], [4, 3, 0], [2, 4, 3], [1, 1, 2], [1, 2, 1]])
    assert judged_alike(Means(), colours, triplets).tolist() == [True, True, False]


def test_shared_neighbours_slowly():
    torch.manual_seed(0)
    a, b = (F.normalize(torch.randn(12, 5), dim=1) for _ in range(2))
    common = 0
    for i in range(12):
        near = [
            {j for _, j in sorted((-(x[i] @ x[j]).item(), j) for j in range(12) if j != i)[:3]}
            for x in (a, b)
        ]
        common += len(near[0] & near[1])
    assert shared_neighbours(a, b, 3) == pytest.approx(common / 36)
    assert shared_neighbours(a, a, 3) == shared_neighbours(a, b, 11) == 1


@pytest.mark.parametrize("k", (0, 12))
def test_there_are_as_many_neighbours(k):
    features = torch.eye(12)
    with pytest.raises(ValueError, match="11"):
        shared_neighbours(features, features, k)


def test_distillation_features_are_the_second_output(toy, tiny_config):
    torch.manual_seed(0)
    encoder = tiny_config("full").encoder.build().eval()
    found = distillation_features(encoder, toy[0])
    with torch.no_grad():
        wanted = encoder.outputs([toy[0].images()])[0][1]
    assert torch.allclose(found, wanted, atol=1e-5)


def test_all_links_of_a_study(tmp_path, tiny_config):
    small = dict(toy_images=16, toy_test=12, toy_unlabelled=10, validation=0)
    changes = tiny_config("full").flat()
    changes = {k: v for k, v in changes.items() if k.split(".")[0] in ("encoder", "pairs")}
    changes |= {"unlabelled.batch": 6, "distillation.k": 3, "training.epochs": 1}
    teacher = {"training.epoch_steps": 1, "unlabelled.batch": 6}
    study = FineStudy(make_study("full", changes, teacher, data=small), tmp_path)
    study.read()
    study.prepare()
    torch.manual_seed(0)
    students = {"itself": study.teacher, "another": study.config.finegrained.encoder.build()}
    found = examine_links(study, students)
    assert set(found) == {
        "before: a changed photo finds itself",
        "teacher: a changed photo finds itself",
        "itself: shares the teacher's neighbours",
        "another: shares the teacher's neighbours",
        "by chance: shares the teacher's neighbours",
    }
    assert found["by chance: shares the teacher's neighbours"] == pytest.approx(3 / 11)
    assert all(0 <= value <= 1 for value in found.values())
