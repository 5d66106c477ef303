"What is found out about a file, over the kinds of files and architectures."

import json

import pytest
import torch
from safetensors.torch import save_file
from teachers.helpers import (
    CLASSES,
    brightness_set,
    make_teacher,
    noise,
    save_program,
    tiny_net,
)

from dfsbir.core.checkpoint import UnsafeCheckpoint
from dfsbir.data.image_set import ImageSet
from dfsbir.teachers.card import make_card
from dfsbir.teachers.inspect import FAMILIES, inspect_checkpoint, matching_nets
from dfsbir.teachers.loading import load_teacher, save_teacher
from dfsbir.teachers.nets import build_net
from dfsbir.teachers.training import train_teacher

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"
)
LARGE = ("large", "base", "l_16", "l_32", "101", "152", "vgg", "wide", "lite3", "lite4")
NETS = [n for nets in FAMILIES.values() for n in nets if not any(k in n for k in LARGE)]


@pytest.mark.parametrize("net", NETS)
def test_nets_are_recognised_by_their_weights(net):
    source, _, name = net.partition("/")
    if source == "efficientnet-lite":
        pytest.importorskip("efficientnet_lite_pytorch")
    with torch.device("meta"):
        weights = build_net(source, name, 5).state_dict()
    assert net in matching_nets({f"module.model.{k}": v for k, v in weights.items()}, 5)


@pytest.mark.parametrize(
    "net", ["torchvision/resnet18", "torchvision/mobilenet_v2", "timm/resnet10t"]
)
def test_files_in_the_order_of_the_alphabet(tmp_path, net):
    source, _, name = net.partition("/")
    weights = build_net(source, name, 5).state_dict()
    save_file({k: v.contiguous() for k, v in weights.items()}, tmp_path / "w.safetensors")
    found = inspect_checkpoint(tmp_path / "w.safetensors")
    assert (found.outputs, found.channels) == (5, 3) and net in found.nets
    assert found.head in ("fc", "classifier.1")


def test_weights_of_no_known_net():
    weights = build_net("dfsbir", "tiny", 5).state_dict()
    assert matching_nets(weights, 6) == []
    assert matching_nets({**weights, "more": torch.ones(1)}, 5) == []
    assert matching_nets({"one.weight": torch.ones(5, 3)}, 5) == []


def save_as(kind, folder):
    "The tiny net as a file of this kind."
    net, path, x = tiny_net(), folder / f"net.{kind}", noise(2)
    if kind == "pth":
        torch.save(net.state_dict(), path)
    elif kind == "safetensors":
        save_teacher(make_teacher(net, card=dict(source="dfsbir", name="tiny")), path)
    else:
        save_program(net, x, path)
    return path


KINDS = {  # suffix: kind, batch norms, nets, missing
    "pth": ("weights", 4, ["dfsbir/tiny"], ["classes", "modality", "input.size"]),
    "safetensors": ("weights", 4, ["dfsbir/tiny"], []),
    "pt": ("script", 4, ["dfsbir/tiny"], ["classes", "modality", "input.size"]),
    "pt2": ("program", 4, ["dfsbir/tiny"], ["classes", "modality"]),
    "onnx": ("onnx", 0, [], ["classes", "modality", "input.mean and input.std"]),
}


@pytest.mark.parametrize("suffix", KINDS)
def test_files_of_every_kind(tmp_path, suffix):
    kind, batch_norms, nets, missing = KINDS[suffix]
    path = save_as(suffix, tmp_path)
    found = inspect_checkpoint(path)
    assert (found.kind, found.batch_norms, found.nets) == (kind, batch_norms, nets)
    assert (found.outputs, found.channels, found.missing) == (3, 3, missing)
    assert any("batch-norm" in w for w in found.warnings) == (batch_norms == 0)
    known = {"classes": CLASSES, "modality": "photo"}
    known["input"] = {"size": 16, "mean": 0.5, "std": 0.5}
    complete = inspect_checkpoint(path, known)
    assert complete.missing == [] and json.loads(json.dumps(complete.card)) == complete.card
    t = load_teacher(path, complete.card)
    wanted = make_teacher()(noise()).logits
    torch.testing.assert_close(t(noise()).logits, wanted, atol=1e-4, rtol=1e-3)
    assert path.name in str(complete) and "cup" in str(complete)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "Weights of a classifier that tells three brightnesses apart, and test images."
    path = tmp_path_factory.mktemp("trained") / "w.pth"
    t = train_teacher(
        brightness_set(120), net="tiny", epochs=8, lr=1e-2, augment=False, progress=False
    )
    torch.save(t.net.state_dict(), path)
    return path, brightness_set(60)


def test_the_accuracy_of_a_right_card(trained):
    path, data = trained
    found = inspect_checkpoint(path, make_card(CLASSES, "photo", 16, "dfsbir", "tiny"), data)
    assert found.accuracy > 0.8 and not found.warnings
    assert found.tested == "60 images of 3 classes"
    renamed = ImageSet(data.source, data.labels, ["cup", "star", "shrub"], "photo")
    found = inspect_checkpoint(path, found.card, renamed)
    assert "40 images of 2 classes" in found.tested and "shrub" in found.tested


@pytest.mark.parametrize(
    "wrong, named",
    [(dict(dark_on_light=False), "polarity"), (dict(mean=0, std=1), "mean and std 0.5")],
)
def test_a_wrong_card_is_found_out_by_images(trained, wrong, named):
    path, data = trained
    card = make_card(CLASSES, "photo", 16, "dfsbir", "tiny", **wrong)
    found = inspect_checkpoint(path, card, data)
    assert any(named in w for w in found.warnings)


def test_what_does_not_agree_is_said(tmp_path):
    path = save_as("pth", tmp_path)
    found = inspect_checkpoint(path, {"classes": ["a", "b"]})
    assert any("2 classes" in w for w in found.warnings)
    torch.save({k: v.half() for k, v in tiny_net().state_dict().items()}, path)
    assert any("float16" in w for w in inspect_checkpoint(path).warnings)
    with pytest.raises(ValueError, match="zebra"):
        data = brightness_set()
        data.classes = ["zebra", "horse", "cow"]
        inspect_checkpoint(path, make_card(CLASSES, "photo", 16, "dfsbir", "tiny"), data)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.pth"):
        inspect_checkpoint(tmp_path / "none.pth")
    (tmp_path / "x.pth").write_bytes(b"nothing")
    with pytest.raises(UnsafeCheckpoint, match="x.pth"):
        inspect_checkpoint(tmp_path / "x.pth")


def test_images_are_read_once_the_card_says_how(tmp_path):
    "Modality and side come from the card; nothing is read where it is not complete."
    asked = []

    def read(modality, size):
        asked.append((modality, size))
        return brightness_set()

    path = save_as("safetensors", tmp_path)
    found = inspect_checkpoint(path, images=read)
    assert asked == [("photo", 16)]
    assert found.accuracy == inspect_checkpoint(path, images=brightness_set()).accuracy
    assert inspect_checkpoint(save_as("pth", tmp_path), images=read).missing
    assert len(asked) == 1
