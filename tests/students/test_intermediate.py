"Intermediate layers as shape: against a slow loop, with threads, and what is refused."

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from students.helpers import (
    CLASS_MAP,
    LAYERS,
    SIDE,
    SKETCH,
    D,
    K,
    make_intermediate,
    make_students,
    noise_pairs,
    spec,
)
from torch import nn

from dfsbir.core.device import capture
from dfsbir.core.types import Modality
from dfsbir.data.procedural import procedural_objects
from dfsbir.students.intermediate import IntermediateFeatures
from dfsbir.teachers.nets import build_net, input_of
from dfsbir.teachers.teacher import Teacher


def inner_means(net, x):
    "Logits of a classifier, and the mean of each of the layers."
    modules = {name: net.get_submodule(name) for name in LAYERS}
    with torch.no_grad(), capture(modules) as outputs:
        logits = net(x)
    return logits, [outputs[name].mean((2, 3)) for name in LAYERS]


def slow_shape(net, normalizer, images, objects, bn_center_weight, axes):
    "Logits and shape of images, by the definition."
    _, known = inner_means(net, normalizer(objects))
    logits, found = inner_means(net, normalizer(images))
    deviations = [v.std(0, correction=0) for v in known]
    least = 0.01 * torch.cat(deviations).mean()
    layers = []
    for name, v, deviation, inner in zip(LAYERS, known, deviations, found, strict=True):
        bias = net.get_submodule(name).bias.detach()
        centre = (1 - bn_center_weight) * v.mean(0) + bn_center_weight * bias
        z = ((inner - centre) / (deviation + least)).clamp(-8, 8)
        layers.append(F.normalize(z, dim=1))
    shape = torch.cat(layers, 1)
    return logits, F.normalize(shape if axes is None else shape @ axes, dim=1)


@pytest.mark.parametrize(
    "bn_center_weight, dim", [(0.0, D), (0.3, D), (0.3, 32 + K)]
)  # two layers of 16 channels: 32 dimensions of shape take them all
def test_intermediate_heads_against_a_slow_loop(teachers, bn_center_weight, dim):
    teachers = copy.deepcopy(teachers)
    for t in teachers.values():
        for name in LAYERS:
            nn.init.normal_(t.net.get_submodule(name).bias)
    d = make_intermediate(teachers, flip_tta=False, size=24, dim=dim)
    objects, images = procedural_objects(30, SIDE), noise_pairs()
    d.calibrate(objects, bn_center_weight)
    encoders = d.encoders()
    axes = [e.head.shape.axes for e in encoders.values()]
    if dim == D:
        assert torch.equal(*axes)
    else:
        assert axes == [None, None]
    for m, e in encoders.items():
        assert e.normalizer.size == 24 and teachers[m].normalizer.size == SIDE
        logits, shape = slow_shape(
            teachers[m].net,
            e.normalizer,
            images.of(m),
            objects.of(m),
            bn_center_weight,
            e.head.shape.axes,
        )
        p = CLASS_MAP.posteriors(logits, m, 2.0)
        residual_norm = (1 - p.square().sum(1, keepdim=True)).sqrt()
        wanted = p @ e.head.proxies + residual_norm * (shape @ e.head.basis)
        torch.testing.assert_close(e(images.of(m)), wanted, atol=1e-4, rtol=1e-4)
        log_p = e.predict_log_probs(images.of(m))[1]
        torch.testing.assert_close(log_p.exp(), CLASS_MAP.posteriors(logits, m))


def test_training_means_are_the_batch_norms_biases(teachers):
    "They are the mean outputs over the images whose statistics the batch norm keeps."
    net = copy.deepcopy(teachers[Modality.SKETCH].net)
    layer, x = net.get_submodule(LAYERS[0]), torch.rand(16, 3, SIDE, SIDE)
    nn.init.normal_(layer.bias)
    with torch.no_grad(), capture({LAYERS[0]: layer}) as outputs:
        net.train()(x)
    torch.testing.assert_close(
        IntermediateFeatures(net, LAYERS[:1]).training_means(),
        outputs[LAYERS[0]].mean((0, 2, 3)),
        atol=1e-4,
        rtol=1e-4,
    )


def test_training_means_want_batch_norms(teachers):
    d = make_intermediate(teachers, layers=["blocks.0.one", "blocks.0.bn2"])
    with pytest.raises(ValueError, match="blocks.0.one.*Conv2d"):
        d.calibrate(noise_pairs(), bn_center_weight=0.5)


def test_threads_that_share_an_encoder_see_their_own_images(teachers):
    d = make_intermediate(teachers)
    d.calibrate(noise_pairs())
    encoder, images = d.encoders()[Modality.PHOTO], torch.rand(16, 3, SIDE, SIDE)
    with torch.no_grad():
        alone = [encoder(x[None]) for x in images]

    def embed_one(i):
        with torch.no_grad():  # of the thread
            return encoder(images[i][None])

    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(embed_one, list(range(16)) * 10))
    for i, e in enumerate(together):
        torch.testing.assert_close(e, alone[i % 16])


@pytest.mark.parametrize(
    "layers, options, named",
    [
        (["block.0.bn1"], {}, "blocks.0.bn1"),
        ([], {}, "at least one"),
        (["blocks.0", "fc"], {}, "'fc'"),
        (LAYERS, dict(warm=False), "warm=True"),
        (["blocks.0.bn1"], dict(dim=64), "61"),
    ],
)
def test_layers_that_cannot_be_read(teachers, layers, options, named):
    with pytest.raises(ValueError, match=named):
        make_students(teachers, spec("intermediate", layers=layers), **options)
    hooks = [m._forward_hooks for t in teachers.values() for m in t.net.modules()]
    assert not any(hooks), "nothing is left in the teachers"


def test_layers_of_different_widths_are_refused(teachers):
    net, card = build_net("dfsbir", "small", len(SKETCH)), dict(source="dfsbir", name="small")
    other = Teacher(net, SKETCH, input_of("dfsbir", SIDE), Modality.SKETCH, card=card)
    with pytest.raises(ValueError, match="architecture"):
        make_intermediate({**teachers, Modality.SKETCH: other}, layers=["blocks.0.bn1"])
