"Every kind of checkpoint as a teacher, and what does not fit."

import hashlib
import io
import json
import warnings
import zipfile
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from teachers.helpers import CLASSES, make_teacher, noise, tiny_net, with_statistics
from torch import nn

from dfsbir.core.checkpoint import UnsafeCheckpoint
from dfsbir.core.types import Modality
from dfsbir.teachers.card import make_card
from dfsbir.teachers.loading import kind_of_file, load_teacher, save_teacher

CARD = make_card(CLASSES, "photo", 16, "dfsbir", "tiny")
UNNAMED = make_card(CLASSES, "photo", 16, mean=0.5, std=0.5)
BATCH = ({0: torch.export.Dim("batch")},)
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning",
    "ignore::DeprecationWarning",
    "ignore::UserWarning",
    "ignore::torch.jit.TracerWarning",
)


def save_script(net, path, x, scripted=False):
    "A traced or scripted module on disk."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = torch.jit.script(net) if scripted else torch.jit.trace(net, x)
        torch.jit.save(module, path)


def save_program(net, path, x, dynamic=True):
    "A torch.export program on disk."
    program = torch.export.export(net, (x,), dynamic_shapes=BATCH if dynamic else None)
    torch.export.save(program, path)


def assert_same(a, b, x):
    "Equal logits, features and proxies."
    one, other = a(x), b(x)
    for u, v in (
        (one.logits, other.logits),
        (one.features, other.features),
        (a.proxies, b.proxies),
    ):
        torch.testing.assert_close(u, v, atol=1e-5, rtol=1e-4)


# weights


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s, "epoch": 1},
        lambda s: {"model": {f"module.{k}": v for k, v in s.items()}},
        lambda s: {"ema_state_dict": {f"backbone.net.{k}": v for k, v in s.items()}},
        lambda s: {k: v.half() if v.is_floating_point() else v for k, v in s.items()},
        lambda s: {k: v.double() if v.is_floating_point() else v for k, v in s.items()},
    ],
    ids=["plain", "nested", "wrapped", "average", "half", "double"],
)
def test_weights_in_every_wrapping(tmp_path, wrap):
    torch.save(wrap(tiny_net().state_dict()), tmp_path / "w.pth")
    t = load_teacher(tmp_path / "w.pth", CARD)
    wanted = make_teacher()(noise()).logits
    torch.testing.assert_close(t(noise()).logits, wanted, atol=0.02, rtol=0.02)
    own = load_teacher(tmp_path / "w.pth", UNNAMED, net=tiny_net(seed=5))
    assert torch.equal(own.proxies, t.proxies)


def test_a_module_whose_own_names_share_a_prefix(tmp_path):
    torch.save(tiny_net().state_dict(), tmp_path / "w.pth")
    wrapped = nn.Sequential()
    wrapped.add_module("inner", tiny_net(seed=5))
    t = load_teacher(tmp_path / "w.pth", UNNAMED, net=wrapped)
    assert torch.equal(t.proxies, make_teacher().proxies)


def test_plain_safetensors_name_the_command_that_helps(tmp_path):
    path = tmp_path / "photos.safetensors"
    save_file({k: v.contiguous() for k, v in tiny_net().state_dict().items()}, path)
    with pytest.raises(ValueError, match=r"dfsbir inspect .*photos\.safetensors"):
        load_teacher(path)
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        load_teacher(tmp_path / "none.safetensors")


def test_saving_and_loading(tmp_path):
    path = tmp_path / "t.safetensors"
    card = dict(source="dfsbir", name="tiny", accuracy={"validation": 0.5})
    t = make_teacher(card=card)
    save_teacher(t, path)
    loaded = load_teacher(path)
    assert torch.equal(loaded(noise()).logits, t(noise()).logits)
    assert loaded.digest() == t.digest()
    assert (loaded.classes, loaded.modality) == (CLASSES, Modality.PHOTO)
    assert {k: loaded.card[k] for k in t.card} == t.card
    json.dumps(loaded.card)


def test_a_pen_that_came_later_is_saved(tmp_path):
    card = {"source": "dfsbir", "name": "tiny"}
    teacher = make_teacher(modality="sketch", card=card)
    teacher.normalizer.pen = 0.053
    save_teacher(teacher, tmp_path / "sketch.safetensors")
    assert load_teacher(tmp_path / "sketch.safetensors").normalizer.pen == 0.053


def test_a_brought_teachers_card_has_its_file_and_checksum(tmp_path):
    path = tmp_path / "w.pth"
    torch.save(tiny_net().state_dict(), path)
    card = load_teacher(path, CARD).card
    assert card["file"] == str(path.resolve())
    assert card["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_weights_that_do_not_fit_are_named(tmp_path):
    path, weights = tmp_path / "w.pth", tiny_net().state_dict()
    without = {k: v for k, v in weights.items() if k != "stem.0.weight"}
    torch.save(without | {"odd": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="missing: stem.0.weight; unexpected: odd"):
        load_teacher(path, CARD)
    torch.save(weights | {"fc.weight": torch.zeros(9, 16)}, path)
    with pytest.raises(ValueError, match=r"fc.weight \(9, 16\).*\(3, 16\)"):
        load_teacher(path, CARD)
    with pytest.raises(ValueError, match="source.*name"):
        load_teacher(path, UNNAMED)
    with pytest.raises(ValueError, match="classes, modality, input"):
        load_teacher(path)
    with pytest.raises(FileNotFoundError, match="none.pth"):
        load_teacher(tmp_path / "none.pth", CARD)


def test_files_that_are_not_safe_or_not_numbers(tmp_path):
    path = tmp_path / "w.pth"
    torch.save(nn.Linear(2, 2), path)
    with pytest.raises(UnsafeCheckpoint) as e:
        load_teacher(path, CARD)
    assert "\x1b" not in str(e.value)
    broken = tiny_net().state_dict()
    broken["fc.weight"][0, 0] = float("nan")
    torch.save(broken, path)
    with pytest.raises(ValueError, match="fc.weight"):
        load_teacher(path, CARD)


# TorchScript and programs


@pytest.mark.parametrize("how", ["script", "trace", "program"])
def test_programs_give_the_same(tmp_path, how):
    net, wanted, path = tiny_net(), make_teacher(), tmp_path / "net.bin"
    if how == "program":
        save_program(net, path := tmp_path / "net.pt2", noise(2))
    else:
        save_script(net, path, noise(2), scripted=how == "script")
    t = load_teacher(path, UNNAMED)
    x, y = noise().requires_grad_(), noise().requires_grad_()
    a, b = t.train()(x), wanted(y)
    assert_same(t, wanted, noise())
    torch.testing.assert_close(t.bias, wanted.bias)

    def ordered(pairs):
        return sorted(tuple(round(s.sum().item(), 3) for s in pair) for pair in pairs)

    assert ordered(a.bn) == ordered(b.bn)
    assert ordered(t.bn_targets()) == ordered(wanted.bn_targets())
    for (mean, _), (target, _) in zip(a.bn, t.bn_targets(), strict=True):
        assert mean.shape == target.shape
    for out in (a, b):
        (out.logits.logsumexp(1).sum() + sum(m.square().sum() for m, _ in out.bn)).backward()
    torch.testing.assert_close(x.grad, y.grad, atol=1e-5, rtol=1e-4)
    assert x.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="own file"):
        save_teacher(t, tmp_path / "t.safetensors")


@pytest.mark.parametrize("how", ["script", "trace", "program"])
def test_a_program_whose_card_names_its_net_becomes_that_net(tmp_path, how):
    net, path = tiny_net(), tmp_path / "net.pt2"
    if how == "program":
        save_program(net, path, noise(2))
    else:
        save_script(net, path, noise(2), scripted=how == "script")
    t = load_teacher(path, CARD)
    assert t.digest() == make_teacher().digest()
    save_teacher(t, tmp_path / "t.safetensors")
    assert load_teacher(tmp_path / "t.safetensors").digest() == t.digest()
    with pytest.raises(ValueError, match="does not fit"):
        load_teacher(path, {**CARD, "name": "small"})


class Scaled(nn.Module):
    "A net with something else around it."

    def __init__(self):
        super().__init__()
        self.net = tiny_net()

    def forward(self, x):
        return self.net(3 * x)


def test_a_program_that_does_more_than_its_net_is_refused(tmp_path):
    save_script(Scaled(), tmp_path / "net.pt", noise(2))
    with pytest.raises(ValueError, match="logits"):
        load_teacher(tmp_path / "net.pt", CARD)
    assert load_teacher(tmp_path / "net.pt", UNNAMED).dim == 16


class Ran:
    "An object that writes a file when it is unpickled."

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def pickled(value) -> bytes:
    "What torch.save writes."
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def first_size(text):
    "A change of a program's text: the first size of its input."

    def change(program):
        sizes = program["graph_module"]["graph"]["tensor_values"]["x"]["sizes"]
        sizes[0]["as_expr"]["expr_str"] = text

    return change


def first_target(text):
    "A change of a program's text: its first operator."

    def change(program):
        program["graph_module"]["graph"]["nodes"][0]["target"] = text

    return change


def input_name(text):
    "A change of a program's text: the name of its input in the code that is made of it."

    def change(program):
        program["graph_module"]["graph"]["inputs"][-1]["as_tensor"]["name"] = text

    return change


def guard(text):
    "A change of a program's text: a condition on its inputs."
    return lambda program: program.update(guards_code=[text])


def weights_unpickled(program):
    "A change of a payload's text: the first tensor is read by pickle."
    next(iter(program["config"].values()))["use_pickle"] = True


def rewritten(path, members):
    "Writes a program with other members, or with changes of its text."
    with zipfile.ZipFile(path) as archive:
        contents = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    for name, content in members.items():
        if callable(content):
            text = json.loads(contents[name])
            content(text)
            content = json.dumps(text).encode()
        contents[name] = content
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in contents.items():
            archive.writestr(f"net/{name}", content)


@pytest.mark.parametrize("kind", ["inputs", "tensor", "object", "library", "size", "text"])
def test_a_program_that_would_run_code_is_refused_and_runs_none(tmp_path, kind):
    ran, path = tmp_path / "ran", tmp_path / "net.pt2"
    touch = f"__import__('pathlib').Path({str(ran)!r}).touch()"
    config = "data/weights/model_weights_config.json"
    kinds = {
        "inputs": [{"data/sample_inputs/model.pt": pickled(((noise(2), Ran(ran)), {}))}],
        "tensor": [{"data/weights/weight_0": pickled(Ran(ran)), config: weights_unpickled}],
        "object": [{"data/constants/opaque_obj_0": b""}, {"data/CONSTANTS/custom_obj_0": b""}],
        "library": [{"data/aotinductor/model/net.so": b""}],
        "size": [{"models/model.json": first_size(f"{touch} or Symbol('s1', integer=True)")}],
        "text": [
            {"models/model.json": change}
            for change in (
                first_size("exit()"),
                first_size("().__class__"),
                first_target("torch.os.system"),
                input_name(f"x={touch}"),
                guard(touch),
            )
        ],
    }
    for members in kinds[kind]:
        save_program(tiny_net(), path, noise(2))
        rewritten(path, members)
        with pytest.raises(UnsafeCheckpoint, match=r"net\.pt2 .* code .*weights alone"):
            load_teacher(path, UNNAMED)
        assert not ran.exists()


def test_a_program_with_guards_and_weights_that_look_like_pickles_is_read(tmp_path):
    save_program(tiny_net(), path := tmp_path / "net.pt2", noise(2))
    with zipfile.ZipFile(path) as archive:
        first = archive.read("net/data/weights/weight_0")
    conditions = "torch.sym_max(1, L['x'].size()[0] // 2) != 0"
    weights = {"data/weights/weight_0": b"\x80\x02" + first[2:]}
    rewritten(path, {**weights, "models/model.json": guard(conditions)})
    torch.testing.assert_close(
        load_teacher(path, UNNAMED)(noise(2)).logits,
        make_teacher()(noise(2)).logits,
        atol=0.01,
        rtol=0.01,
    )


def test_the_head_of_a_program_by_name(tmp_path):
    save_program(tiny_net(), tmp_path / "net.pt2", noise(2))
    found = load_teacher(tmp_path / "net.pt2", UNNAMED)
    assert load_teacher(tmp_path / "net.pt2", {**UNNAMED, "head": "fc"}).head == found.head


def test_programs_that_cannot_be_used(tmp_path):
    save_program(tiny_net(), tmp_path / "fixed.pt2", noise(2), dynamic=False)
    t = load_teacher(tmp_path / "fixed.pt2", UNNAMED)
    assert t(noise(2)).logits.shape == (2, 3)
    with pytest.raises(ValueError, match="dynamic_shapes"):
        t(noise(3))
    training = torch.jit.trace(tiny_net().train(), noise(2), check_trace=False)
    torch.jit.save(training, tmp_path / "training.pt")
    with pytest.raises(ValueError, match="training mode"):
        load_teacher(tmp_path / "training.pt", UNNAMED)
    save_script(tiny_net(), tmp_path / "t.pt", noise(2))
    five = make_card(list("abcde"), "photo", 16, mean=0.5, std=0.5)
    with pytest.raises(ValueError, match="5 outputs.*16 -> 3"):
        load_teacher(tmp_path / "t.pt", five)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_scripts_of_other_precisions(tmp_path, dtype):
    save_script(tiny_net().to(dtype), tmp_path / "net.pt", noise(2).to(dtype))
    t = load_teacher(tmp_path / "net.pt", UNNAMED)
    wanted = make_teacher()(noise()).logits
    torch.testing.assert_close(t(noise()).logits, wanted, atol=0.05, rtol=0.05)
    frozen = torch.jit.freeze(torch.jit.trace(tiny_net().to(dtype), noise(2).to(dtype)))
    torch.jit.save(frozen, tmp_path / "frozen.pt")
    with pytest.raises(ValueError, match="float"):
        load_teacher(tmp_path / "frozen.pt", UNNAMED)


def test_a_module_packed_for_one_processor_is_refused(tmp_path):
    packed = torch.jit.optimize_for_inference(torch.jit.trace(tiny_net(), noise(2)))
    torch.jit.save(packed, tmp_path / "packed.pt")
    with pytest.raises(ValueError, match="optimize_for_inference") as e:
        load_teacher(tmp_path / "packed.pt", UNNAMED)
    assert "\x1b" not in str(e.value)


PUBLIC = {  # source, how to make it
    "resnet18": ("torchvision", lambda: torchvision.models.resnet18(num_classes=3)),
    "mobilenet_v2": ("torchvision", lambda: torchvision.models.mobilenet_v2(num_classes=3)),
    "efficientnet_b0": (
        "torchvision",
        lambda: torchvision.models.efficientnet_b0(num_classes=3),
    ),
    "resnet10t": ("timm", lambda: timm.create_model("resnet10t", num_classes=3)),
}


@pytest.fixture(scope="module", params=PUBLIC)
def public(request):
    "Name, net and source of a public architecture, with statistics in its batch norms."
    source, make = PUBLIC[request.param]
    torch.manual_seed(0)
    return request.param, with_statistics(make()), source


@pytest.mark.parametrize("scripted", [False, True], ids=["traced", "scripted"])
def test_torchscript_of_public_nets(tmp_path, public, scripted):
    name, net, source = public
    if scripted and source == "timm":
        pytest.skip("timm's nets are traced")
    path, x = tmp_path / "net.pt", noise(2, size=64)
    save_script(net, path, x, scripted)
    assert kind_of_file(path) == "script"
    named = make_card(CLASSES, "photo", 64, source, name)
    unnamed = {k: v for k, v in named.items() if k not in ("source", "name")}
    t, again = load_teacher(path, unnamed), load_teacher(path, named)
    assert_same(t, again, x)
    wanted = net(again.normalizer(x))
    torch.testing.assert_close(t(x).logits, wanted, atol=1e-4, rtol=1e-3)
    assert len(t.bn_targets()) == len(again.bn_targets()) > 10
