"ONNX files as torch's two exporters write them, one written by hand, and refusals."

import sys

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from teachers.helpers import CLASSES, noise, with_statistics
from torch import nn

from dfsbir.teachers.card import make_card
from dfsbir.teachers.loading import load_teacher

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnx2torch")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"
)

PUBLIC = {
    "resnet18": lambda: torchvision.models.resnet18(num_classes=3),
    "mobilenet_v2": lambda: torchvision.models.mobilenet_v2(num_classes=3),
    "efficientnet_b0": lambda: torchvision.models.efficientnet_b0(num_classes=3),
    "resnet10t": lambda: timm.create_model("resnet10t", num_classes=3),
}
EXPORTERS = {"dynamo": dict(dynamo=True), "script": dict(dynamo=False)}
OLDER = {
    "dynamo, opset 18": dict(dynamo=True, opset_version=18),
    "script, opset 17": dict(dynamo=False, opset_version=17),
}


def card_of(size, classes=CLASSES):
    return make_card(classes, "photo", size, mean=0, std=1)


@pytest.fixture(scope="module", params=PUBLIC)
def public(request):
    "An untrained public net: many of its biases are equal, and written once."
    torch.manual_seed(0)
    return with_statistics(PUBLIC[request.param]())


def assert_loads(net, path, **export):
    "An export of one image loads, takes three, and has equal logits and a gradient."
    x = noise(3, size=64)
    torch.onnx.export(net, (x[:1],), path, verbose=False, **export)
    t = load_teacher(path, card_of(64))
    torch.testing.assert_close(t(x).logits, net(x), atol=1e-4, rtol=1e-3)
    image = x.clone().requires_grad_()
    assert torch.autograd.grad(t(image).logits.sum(), image)[0].abs().sum() > 0


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_default_exports_of_public_nets(tmp_path, public, exporter):
    assert_loads(public, tmp_path / "net.onnx", **EXPORTERS[exporter])


@pytest.mark.parametrize("export", OLDER)
def test_older_opsets(tmp_path, export):
    torch.manual_seed(0)
    net = with_statistics(PUBLIC["mobilenet_v2"]())
    assert_loads(net, tmp_path / "net.onnx", **OLDER[export])


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_newer_operators_are_rewritten(tmp_path, approximate):
    "Gelu is of opset 20; an equal split, and a mean over two axes, changed in 18."
    net = Halves(approximate).eval()
    x = noise(3)
    torch.onnx.export(
        net,
        (x,),
        tmp_path / "net.onnx",
        dynamo=True,
        opset_version=20,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    t = load_teacher(tmp_path / "net.onnx", card_of(16))
    torch.testing.assert_close(t(x).logits, net(x), atol=1e-5, rtol=1e-4)


class Halves(nn.Module):
    "Two halves of the channels, a Gelu between them, and a linear layer."

    def __init__(self, approximate):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3), nn.Conv2d(4, 4, 1)
        self.gelu, self.fc = nn.GELU(approximate), nn.Linear(4, 3)

    def forward(self, x):
        a, b = self.one(x).chunk(2, 1)
        return self.fc((self.gelu(3 * a) * self.two(b)).mean((2, 3)))


def write_by_hand(path, operator="Relu"):
    "Conv, batch norm, an activation, pooling and a linear layer; gives the weights."
    make, info = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    generator = torch.Generator().manual_seed(0)
    weights = {
        "kernel": torch.randn(4, 3, 3, 3, generator=generator),
        "scale": torch.ones(4),
        "shift": torch.zeros(4),
        "mean": torch.randn(4, generator=generator),
        "var": torch.ones(4) * 2,
        "rows": torch.randn(3, 4, generator=generator),
        "bias": torch.randn(3, generator=generator),
    }
    nodes = [
        make("Conv", ["x", "kernel"], ["c"], pads=[1, 1, 1, 1]),
        make("BatchNormalization", ["c", "scale", "shift", "mean", "var"], ["n"]),
        make(operator, ["n"], ["r"]),
        make("GlobalAveragePool", ["r"], ["p"]),
        make("Flatten", ["p"], ["f"]),
        make("Gemm", ["f", "rows", "bias"], ["y"], transB=1),
    ]
    x = info("x", onnx.TensorProto.FLOAT, ["n", 3, 16, 16])
    y = info("y", onnx.TensorProto.FLOAT, ["n", 3])
    tensors = [onnx.numpy_helper.from_array(v.numpy(), k) for k, v in weights.items()]
    graph = onnx.helper.make_graph(nodes, "g", [x], [y], tensors)
    opset = 18 if operator == "Mish" else 13
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=8
    )
    onnx.save(model, path)
    return weights


def test_a_graph_with_batch_norms_keeps_them(tmp_path):
    w = write_by_hand(tmp_path / "net.onnx")
    t, x = load_teacher(tmp_path / "net.onnx", card_of(16)), noise().requires_grad_()
    inner = F.conv2d(x, w["kernel"], padding=1)
    normalized = F.batch_norm(inner, w["mean"], w["var"], w["scale"], w["shift"])
    features = normalized.relu().mean((2, 3))
    out = t(x)
    torch.testing.assert_close(out.features, features, atol=1e-5, rtol=1e-4)
    logits = features @ w["rows"].T + w["bias"]
    torch.testing.assert_close(out.logits, logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(t.proxies, w["rows"])
    torch.testing.assert_close(out.bn[0][0], inner.mean((0, 2, 3)), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(t.bn_targets()[0][1], w["var"])


def test_what_cannot_be_converted_is_refused_with_a_line_that_exports(tmp_path):
    write_by_hand(tmp_path / "net.onnx", "Mish")
    with pytest.raises(ValueError, match="net.onnx.*dynamic_shapes"):
        load_teacher(tmp_path / "net.onnx", card_of(16))
    (tmp_path / "net.onnx").write_bytes(b"no graph")
    with pytest.raises(ValueError, match="net.onnx"):
        load_teacher(tmp_path / "net.onnx", card_of(16))


def test_the_line_that_the_refusal_names_works(tmp_path):
    "A vision transformer fixed to one image cannot be freed; exported as advised, it loads."
    torch.manual_seed(0)
    net, x = timm.create_model("test_vit", num_classes=3).eval(), noise(3, size=160)
    torch.onnx.export(net, (x[:1],), tmp_path / "fixed.onnx", dynamo=True, verbose=False)
    with pytest.raises(ValueError, match="torch.export.Dim"):
        load_teacher(tmp_path / "fixed.onnx", card_of(160))
    batch = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(
        net, (x[:2],), tmp_path / "any.onnx", dynamo=True, dynamic_shapes=batch, verbose=False
    )
    t = load_teacher(tmp_path / "any.onnx", card_of(160))
    torch.testing.assert_close(t(x).logits, net(x), atol=1e-4, rtol=1e-3)


def test_without_the_extra(tmp_path, monkeypatch):
    write_by_hand(tmp_path / "net.onnx")
    monkeypatch.setitem(sys.modules, "onnx2torch", None)
    with pytest.raises(ImportError, match=r"dfsbir\[onnx\]"):
        load_teacher(tmp_path / "net.onnx", card_of(16))
