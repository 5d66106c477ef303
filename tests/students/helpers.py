"Small teachers of two vocabularies, their students, and pairs of noise."

import torch

from dfsbir.core.types import MODALITIES, PairBatch
from dfsbir.students.distillation import Distiller
from dfsbir.students.encoder import HeadSpec, encoder_from_teacher
from dfsbir.students.heads import MetricSpace
from dfsbir.teachers.class_map import align_classes

SIDE = 20
PHOTO = ["poodle", "beagle", "car", "tree", "moon"]
SKETCH = ["dog", "automobile", "fish", "tree"]
CLASS_MAP = align_classes(PHOTO, SKETCH, {"poodle": "dog", "beagle": "dog", "automobile": "car"})
K, D = 3, 8
LAYERS = ["blocks.0.bn1", "blocks.0.bn2"]
WEIGHTS = dict(consistency=1.0, proxy_anchor=0.5, contrast=0.5)


def spec(kind="posterior", temperature=1.0, layers=None):
    "A head of this kind; an intermediate one reads two batch norms of the tiny net."
    if layers is None:
        layers = LAYERS if kind == "intermediate" else ()
    return HeadSpec(kind, temperature, layers)


def make_students(teachers, head=None, dim=D, **options):
    "One student a teacher."
    space = MetricSpace.random(K, dim)
    head = head or spec()
    return [
        encoder_from_teacher(teachers[m], CLASS_MAP, space, head, **options) for m in MODALITIES
    ]


def make_distiller(teachers, kind="posterior", **options):
    "A distiller with three terms, or four where the head has a shape to train."
    torch.manual_seed(1)
    students = make_students(teachers, spec(kind), warm=kind != "feature")
    weights = WEIGHTS | (dict(infonce=1.0) if kind == "joint" else {})
    if kind == "joint":
        options = dict(head_lr=1e-2, wise_ft_alpha=0.7) | options
    return Distiller(*students, weights, lr=1e-3, steps=6, **options)


def make_intermediate(teachers, layers=None, **options):
    "A distiller of students with intermediate heads, to be calibrated."
    options = dict(flip_tta=True) | options
    head = spec("intermediate", 2.0, layers)
    return Distiller(*make_students(teachers, head, **options), {}, steps=0)


def noise_pairs(n=8):
    "Pairs of noise, without targets."
    photos, sketches = torch.rand(n, 3, SIDE, SIDE), torch.rand(n, 1, SIDE, SIDE)
    return PairBatch(photos, sketches, torch.arange(n) % K)


def same_state(a, b):
    "Whether two modules have equal weights and buffers."
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
