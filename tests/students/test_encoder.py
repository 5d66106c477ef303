"Encoders: warm and cold, of other nets and inputs, on disk, in a fresh process, as ONNX."

import json
import subprocess
import sys

import pytest
import torch
from students.helpers import (
    CLASS_MAP,
    SIDE,
    SKETCH,
    D,
    K,
    make_distiller,
    make_intermediate,
    make_students,
    noise_pairs,
    spec,
)
from torch import nn

from dfsbir.core.checkpoint import UnsafeCheckpoint, save_state
from dfsbir.core.types import MODALITIES, Modality, Normalizer
from dfsbir.students.distillation import with_targets
from dfsbir.students.encoder import (
    HEADS,
    HeadSpec,
    encoder_from_card,
    encoder_from_teacher,
    export_onnx,
    load_encoder,
    load_encoders,
    save_encoders,
)
from dfsbir.students.heads import MetricSpace
from dfsbir.teachers.class_map import align_classes
from dfsbir.teachers.nets import build_net, input_of
from dfsbir.teachers.teacher import Teacher

SPACE = MetricSpace.random(K, D)
KINDS = ("posterior", "feature", "joint", "intermediate")


def test_there_are_four_heads():
    assert tuple(HEADS) == KINDS


@pytest.mark.parametrize("flip_tta", [False, True])
def test_a_warm_posterior_student_has_its_teachers_posteriors(teachers, flip_tta):
    for e, m in zip(make_students(teachers, flip_tta=flip_tta), MODALITIES, strict=True):
        x = noise_pairs().of(m)
        logits = teachers[m](x).logits
        log_p = e.eval().predict_log_probs(x)[1]
        torch.testing.assert_close(log_p.exp(), CLASS_MAP.posteriors(logits, m))
        assert not any(p.requires_grad for p in teachers[m].net.parameters())
        assert all(p.requires_grad for p in e.net.parameters())
        with torch.no_grad():
            next(e.parameters()).add_(1)
        assert torch.equal(teachers[m](x).logits, logits), "the student is a copy"


def test_frozen_batch_norm_stays_and_a_fresh_one_moves(teachers):
    for warm in (True, False):
        e = make_students(teachers, warm=warm)[0]
        before = {k: v.clone() for k, v in e.net.state_dict().items() if "running" in k}
        e.train()(torch.rand(4, 3, SIDE, SIDE))
        after = e.net.state_dict()
        assert all(torch.equal(before[k], after[k]) for k in before) is warm


class OneChannel(nn.Module):
    "A teacher's net of one channel that no source knows by name."

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, 2)
        self.head = nn.Linear(6, len(SKETCH))

    def forward(self, x):
        return self.head(self.conv(x).relu().mean((2, 3)))


@pytest.fixture
def nameless():
    "A teacher that came as a module."
    normalizer = Normalizer(28, 1, 0.2, 0.4, dark_on_light=False)
    return Teacher(OneChannel(), SKETCH, normalizer, "sketch")


@pytest.mark.parametrize("kind", ["posterior", "feature"])
def test_a_student_of_another_net_has_that_nets_input(nameless, kind):
    x = torch.rand(2, 1, 40, 40)
    e = encoder_from_teacher(
        nameless, CLASS_MAP, SPACE, spec(kind), warm=False, net="dfsbir/small"
    ).eval()
    assert e.normalizer.card() == input_of("dfsbir", 28).card()
    assert type(e.net).__name__ == "SmallNet" and e(x).shape == (2, D)
    assert encoder_from_card(e.card).state_dict().keys() == e.state_dict().keys()

    grey = encoder_from_teacher(
        nameless, CLASS_MAP, SPACE, spec(kind), warm=False, net="dfsbir/grey"
    ).eval()
    assert grey.normalizer.channels == grey.net.get_submodule("stem.0").in_channels == 1
    assert grey(x).shape == (2, D)


def test_a_teacher_without_a_name_wants_another_net(nameless):
    with pytest.raises(ValueError, match="net=.*warm=False"):
        encoder_from_teacher(nameless, CLASS_MAP, SPACE)
    with pytest.raises(ValueError, match="warm=False"):
        encoder_from_teacher(nameless, CLASS_MAP, SPACE, net="dfsbir/small")


def test_head_specs_that_mean_nothing():
    with pytest.raises(ValueError, match="posterior.*found 'features'"):
        HeadSpec("features")
    with pytest.raises(ValueError, match="temperature"):
        HeadSpec("joint", temperature=0.0)
    with pytest.raises(ValueError, match="layers"):
        HeadSpec("joint", layers=["blocks.0.bn1"])


def named_teacher(source, name, size):
    "An untrained photo teacher of three classes."
    net = build_net(source, name, 3)
    card = dict(source=source, name=name)
    return Teacher(net, "abc", input_of(source, size, net, name), Modality.PHOTO, card=card)


def test_a_net_that_goes_on_after_its_last_layer():
    "Its classes can be read; its features where the net without that layer gives them."
    space, class_map = MetricSpace.random(3, D), align_classes("abc", "abc")
    squeeze = named_teacher("torchvision", "squeezenet1_1", 64)
    deit = named_teacher("timm", "deit_tiny_distilled_patch16_224", 224)
    x = torch.rand(1, 3, 64, 64)
    for kind in ("joint", "feature"):
        with pytest.raises(ValueError, match=f"{kind} head.*deit.*posterior"):
            encoder_from_teacher(deit, class_map, space, spec(kind))
        e = encoder_from_teacher(squeeze, class_map, space, spec(kind)).eval()
        with torch.no_grad():
            assert e(x).shape == (1, D)
    for t in (squeeze, deit):
        with torch.no_grad():
            e = encoder_from_teacher(t, class_map, space).eval()
            p, wanted = e.predict_log_probs(x)[1].exp(), class_map.posteriors(t(x).logits, "photo")
        torch.testing.assert_close(p, wanted, atol=1e-4, rtol=1e-3)


# files


@pytest.fixture(scope="module")
def saved(teachers, tmp_path_factory):
    "Encoders with each head on disk, trained a little, and their embeddings of some images."
    torch.manual_seed(0)
    top = tmp_path_factory.mktemp("encoders")
    batch, embeddings = with_targets(noise_pairs(), teachers, CLASS_MAP), {}
    for kind in KINDS:
        if kind == "intermediate":
            d = make_intermediate(teachers)
            d.calibrate(batch)
        else:
            d = make_distiller(teachers, kind)
            for _ in range(2):
                d.step(batch)
        encoders = d.encoders()
        save_encoders(top / kind, encoders, run="a run")
        with torch.no_grad():
            embeddings[kind] = {str(m): encoders[m](batch.of(m)) for m in MODALITIES}
    known = {"photo": batch.photo, "sketch": batch.sketch, **embeddings}
    save_state(top / "known.safetensors", known)
    return top


FRESH = """
import json, sys, torch
torch.set_num_threads(1)
from pathlib import Path
from dfsbir.core.checkpoint import load_state
from dfsbir.students.encoder import load_encoders
top, worst = Path(sys.argv[1]), {}
known = load_state(top / "known.safetensors")
for kind in ("posterior", "feature", "joint", "intermediate"):
    for m, e in load_encoders(top / kind).items():
        assert not e.training and not any(p.requires_grad for p in e.parameters())
        worst[f"{kind} {m}"] = (e(known[str(m)]) - known[kind][str(m)]).abs().max().item()
print(json.dumps([worst, sorted(k for k in sys.modules if k.startswith("dfsbir."))]))
"""


def test_encoders_are_the_same_in_a_fresh_process(saved):
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(saved)], capture_output=True, text=True, timeout=200
    )
    assert not done.returncode, done.stderr
    worst, loaded = json.loads(done.stdout.splitlines()[-1])
    assert len(worst) == 8 and not any(worst.values()), worst
    training = [k for k in loaded if k.startswith(("dfsbir.inversion", "dfsbir.crossx"))]
    assert not training, "no training code is needed"


def test_a_damaged_encoder_is_named(saved, tmp_path):
    whole = (saved / "posterior" / "photo.safetensors").read_bytes()
    (tmp_path / "photo.safetensors").write_bytes(whole[:-100])
    with pytest.raises(UnsafeCheckpoint, match="photo.safetensors"):
        load_encoder(tmp_path / "photo.safetensors")
    with pytest.raises(FileNotFoundError, match="nothing"):
        load_encoders(tmp_path / "nothing")


@pytest.mark.parametrize(
    "kind, modality",
    [("posterior", Modality.PHOTO), ("joint", Modality.SKETCH), ("intermediate", Modality.PHOTO)],
)
def test_onnx_gives_the_same_embeddings(saved, tmp_path, kind, modality):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    encoder = load_encoders(saved / kind)[modality]
    assert export_onnx(encoder, tmp_path / "e.onnx") <= 1e-4
    session = runtime.InferenceSession(str(tmp_path / "e.onnx"), providers=["CPUExecutionProvider"])
    for n in (1, 5):  # any batch
        x = torch.rand(n, modality.channels, SIDE, SIDE)
        theirs = torch.from_numpy(session.run(None, {"images": x.numpy()})[0])
        torch.testing.assert_close(theirs, encoder(x), atol=1e-4, rtol=0)
    assert [p.name for p in tmp_path.iterdir()] == ["e.onnx"]
