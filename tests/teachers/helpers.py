"A tiny classifier whose batch norms have statistics, files of programs, and images of noise."

import warnings

import pytest
import torch
from torch import nn

from dfsbir.core.types import Modality, Normalizer
from dfsbir.data.image_set import ImageSet
from dfsbir.teachers.nets import build_net
from dfsbir.teachers.teacher import Teacher

CLASSES = ["cup", "star", "tree"]


def with_statistics(net):
    "The net in evaluation mode, with batch-norm statistics as if it had been trained."
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 2)
    return net.eval()


def tiny_net(classes=3, seed=0):
    torch.manual_seed(seed)
    return with_statistics(build_net("dfsbir", "tiny", classes))


def make_teacher(net=None, classes=CLASSES, size=16, modality="photo", **options):
    return Teacher(net or tiny_net(len(classes)), classes, Normalizer(size), modality, **options)


def noise(n=4, channels=3, size=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, channels, size, size, generator=generator)


def brightness_set(n=60, modality="photo", size=16):
    "Three classes that brightness alone tells apart."
    labels = torch.arange(n) % 3
    grain = noise(n, Modality(modality).channels, size, seed=1)
    images = labels.float()[:, None, None, None] / 3 + (0.2 * grain).clamp(0, 1)
    return ImageSet(images, labels, CLASSES, modality)


def save_program(net, x, path):
    "The net as TorchScript (.pt), torch.export (.pt2) or ONNX (.onnx), by the name of the file."
    if path.suffix == ".pt":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.save(torch.jit.trace(net, x), path)
    elif path.suffix == ".pt2":
        batch = ({0: torch.export.Dim("batch")},)
        torch.export.save(torch.export.export(net, (x,), dynamic_shapes=batch), path)
    else:
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnx2torch")
        torch.onnx.export(net, (x,), path, dynamo=True, verbose=False)
