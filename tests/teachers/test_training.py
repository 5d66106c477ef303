"Training: it learns, keeps its best epoch, is repeatable, and never sees validation images."

import os

import numpy as np
import pytest
import torch
from PIL import Image
from teachers.helpers import CLASSES, brightness_set, make_teacher, noise, tiny_net

from dfsbir.core.types import Normalizer
from dfsbir.data.folders import read_folder
from dfsbir.data.image_set import IMAGES_PER_WORKER, ImageSet
from dfsbir.teachers.loading import load_teacher
from dfsbir.teachers.nets import SmallNet
from dfsbir.teachers.training import accuracy, learning_curve, train_teacher


def quick(data, **options):
    "A tiny teacher after one epoch."
    return train_teacher(data, **{**dict(net="tiny", epochs=1, progress=False), **options})


def test_training_learns_and_keeps_the_best_epoch(tmp_path):
    data, state = brightness_set(), torch.get_rng_state()
    path = tmp_path / "t.safetensors"
    t = quick(data, epochs=6, lr=1e-2, augment=False, out=path)
    assert torch.equal(torch.get_rng_state(), state)
    best = max(t.history, key=lambda h: (h["val_accuracy"], -h["val_loss"]))
    assert t.card["accuracy"] == {"validation": best["val_accuracy"]}
    assert t.card["epoch"] == best["epoch"] and t.card["manifest"] == data.digest()
    rate, loss = accuracy(t, data.split(0.1, 0)[1])
    assert rate == best["val_accuracy"] > 0.6
    assert loss == pytest.approx(best["val_loss"], abs=1e-4)
    assert load_teacher(path).digest() == t.digest()
    assert len(learning_curve(t).axes) == 2


def test_training_never_sees_validation_images(monkeypatch):
    data, seen = brightness_set(), []
    monkeypatch.setattr(
        "dfsbir.teachers.training.augment_batch", lambda x, m, g=None: seen.append(x) or x
    )
    quick(data)
    val = data.split(0.1, 0)[1].images()
    assert len(seen) > 1
    assert not any(torch.equal(a, b) for a in torch.cat(seen) for b in val)


def test_training_twice_is_the_same():
    data = brightness_set(modality="sketch")
    a, b, c = (quick(data, seed=seed).digest() for seed in (0, 0, 1))
    assert a == b != c


@pytest.fixture
def decoded(tmp_path):
    "Photos that are decoded when they are wanted."
    random = np.random.default_rng(0)
    for name in CLASSES[:2]:
        (tmp_path / name).mkdir()
        for i in range(20):
            pixels = random.integers(0, 255, (24, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    return read_folder(tmp_path, "photo", 16, cached=False)


def test_processes_that_decode_change_no_number(decoded):
    alone, helped = (quick(decoded, batch_size=8, workers=n) for n in (0, 2))
    assert alone.digest() == helped.digest()
    assert alone.history == helped.history
    assert accuracy(alone, decoded, workers=0) == accuracy(alone, decoded, workers=2)
    in_memory = decoded.with_pixels(decoded.images())
    assert alone.digest() == quick(in_memory, batch_size=8).digest()


def test_half_of_the_processors_decode_where_there_are_many_images_in_files(decoded):
    many = decoded.take([0] * IMAGES_PER_WORKER * 64)
    assert many.loader(workers=None).num_workers == min((os.cpu_count() or 1) // 2, 64)
    assert decoded.loader(workers=None).num_workers == 0
    assert decoded.with_pixels(decoded.images()).loader(workers=2).num_workers == 0


def test_a_start_is_taken_over():
    start = make_teacher(tiny_net(7), list("abcdefg"))
    near = quick(brightness_set(), lr=1e-8, init=start)
    first = near.net.stem[0].weight
    torch.testing.assert_close(first, start.net.stem[0].weight, atol=1e-5, rtol=0)
    assert near.proxies.shape == (3, 16)


@pytest.mark.parametrize("net", ["grey", SmallNet(3, (8, 16), channels=1)], ids=["name", "module"])
def test_a_net_of_one_channel_is_trained_on_one_channel(net, tmp_path):
    path = tmp_path / "t.safetensors"
    t = quick(brightness_set(), net=net, out=path)
    assert t.normalizer.channels == 1 and t.normalizer.mean.item() == 0.5
    x = noise(2)
    colour = torch.cat([x, x.flip(1)])[:, [2, 0, 1]]
    grey = (colour * torch.tensor(Normalizer.LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)
    wanted = t(grey.expand(-1, 3, -1, -1)).logits
    torch.testing.assert_close(t(colour).logits, wanted, atol=1e-4, rtol=1e-4)
    own = None if net == "grey" else SmallNet(3, (8, 16), channels=1)
    assert torch.equal(load_teacher(path, net=own)(colour).logits, t(colour).logits)


def test_what_cannot_be_trained():
    data = brightness_set()
    other = ImageSet(data.images(), data.labels, list("abc"), "photo")
    with pytest.raises(ValueError, match="classes"):
        quick(data, val=other)
    with pytest.raises(FloatingPointError, match="lr=1e"):
        quick(data, epochs=3, lr=1e30)
    with pytest.raises(ValueError, match="'x'.*|.*'cup'"):
        accuracy(make_teacher(classes=["x", "y", "z"]), data)
    assert list(data.classes) == CLASSES
