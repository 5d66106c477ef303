"""ImageSet: parts, batches in any process, refusals."""

import subprocess
import sys

import pytest
import torch

from dfsbir.data.folders import read_folder
from dfsbir.data.image_files import BrokenImage
from dfsbir.data.image_set import ImageSet


def test_an_item_is_an_image_in_0_1_and_a_label(toy):
    image, label = toy[0][3]
    assert image.dtype == torch.float32 and image.min() >= 0 and image.max() <= 1
    assert label == 3


def test_split_holds_back_a_share_of_every_class(toy):
    photos, _ = toy
    train, val = photos.split(0.25, seed=0)
    assert torch.bincount(val.labels).tolist() == [5] * 10 and len(train) + len(val) == 200
    assert not set(train.instances.tolist()) & set(val.instances.tolist())
    again = photos.split(0.25, seed=0)[1]
    assert again.digest() == val.digest() != photos.split(0.25, seed=1)[1].digest()


@pytest.mark.parametrize(
    "indices, labels",
    [([5, 0], [5, 0]), (slice(3), [0, 1, 2]), ([], []), (torch.tensor([7]), [7])],
)
def test_take(toy, indices, labels):
    part = toy[0].take(indices)
    assert part.labels.tolist() == labels
    assert part.images().shape == (len(labels), 3, 32, 32)
    for image, label in zip(part.images(), labels):  # instance i is of class i at the start
        assert torch.equal(image, toy[0][label][0])


def test_take_by_mask(toy):
    photos, _ = toy
    assert len(photos.take(photos.labels == 2)) == 20


def test_the_order_of_batches(toy):
    photos, sketches = toy

    def order(seed):
        batches = photos.loader(64, shuffle=True, seed=seed)
        return torch.cat([labels for _, labels in batches]).tolist()

    assert order(0) == order(0) != order(1)
    images, labels = next(iter(sketches.loader(50)))
    assert images.shape == (50, 1, 32, 32) and torch.equal(labels, sketches.labels[:50])


def test_batches_of_chosen_positions(toy):
    photos, _ = toy
    batches = list(photos.loader(2, order=torch.tensor([9, 3, 3])))
    assert [labels.tolist() for _, labels in batches] == [[9, 3], [3]]
    assert torch.equal(batches[0][0], photos.take([9, 3]).images())


def test_batches_leave_the_global_random_numbers_alone(toy):
    torch.manual_seed(0)
    wanted = torch.rand(1)
    torch.manual_seed(0)
    list(toy[0].loader(64, shuffle=True))
    toy[0].digest()
    assert torch.equal(torch.rand(1), wanted)


@pytest.mark.parametrize("cached", [True, False])
def test_worker_processes_give_the_same_batches(class_folders, cached):
    images = read_folder(class_folders, "photo", 16, cached=cached)
    here, elsewhere = (list(images.loader(4, shuffle=True, workers=w)) for w in (0, 2))
    for (a, a_labels), (b, b_labels) in zip(here, elsewhere, strict=True):
        assert torch.equal(a, b) and torch.equal(a_labels, b_labels)
    assert images.digest() == images.digest(workers=2)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_named_whichever_process_meets_it(class_folders, workers):
    images = read_folder(class_folders, "photo", 16, cached=False)
    victim = class_folders / "cat" / "0.png"
    victim.write_bytes(b"")
    with pytest.raises(BrokenImage) as e:
        list(images.loader(2, workers=workers))
    assert e.value.path == str(victim) and e.value.reason
    with pytest.raises(BrokenImage, match="0.png"):
        images.digest(workers)


def test_workers_do_not_open_training_images_where_none_may_be_read(class_folders):
    "The data-free law holds in worker processes too."
    from dfsbir.core.data_guard import DataFreeViolation, data_free

    images = read_folder(class_folders, "photo", 16, cached=False)
    for workers in (0, 1):
        with data_free(), pytest.raises(DataFreeViolation):
            list(images.loader(2, workers=workers))


MANY = """
import os, resource, sys
from dfsbir.data.folders import read_folder

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

images = read_folder(sys.argv[1], "photo", 224, cached=False)
list(images.loader(32, order=range(64)))
before = peak()
for batch, _ in images.loader(32):
    pass
print(len(images), peak() - before)
"""


def test_memory_stays_flat(tmp_path, picture, root):
    "1,500 photos of 224 px, 900 MB as floats, are read in batches within 60 MB."
    first = picture(tmp_path / "cat" / "0.png", size=(8, 8))
    for i in range(1, 1500):
        (tmp_path / "cat" / f"{i}.png").hardlink_to(first)
    done = subprocess.run(
        [sys.executable, "-c", MANY, tmp_path], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    count, grown = map(int, done.stdout.split())
    assert count == 1500 and grown < 60


def test_floats_become_the_bytes_they_came_from(toy):
    photos, _ = toy
    again = ImageSet(photos.images(), photos.labels, photos.classes, "photo")
    assert torch.equal(again.pixels(), photos.pixels())


BYTES = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)


@pytest.mark.parametrize(
    "images, labels, modality, says",
    [
        (BYTES, [0, 5], "photo", "0 to 5"),
        (BYTES, [0], "photo", "'labels': 1"),
        (BYTES, [0, 0], "sketch", r"\(2, 3, 8, 8\)"),
        (BYTES.float() + 2, [0, 0], "photo", r"\[0,1\]"),
        (BYTES.long(), [0, 0], "photo", "int64"),
        (BYTES, [0, 0], "video", "video"),
    ],
)
def test_what_does_not_fit_is_refused(images, labels, modality, says):
    with pytest.raises(ValueError, match=says):
        ImageSet(images, labels, ["a"], modality)


def test_a_class_of_one_image_cannot_be_split():
    one = ImageSet(BYTES, [0, 1], ["a", "b"], "photo")
    with pytest.raises(ValueError, match="'a'"):
        one.split(0.5)
    with pytest.raises(ValueError, match="1.0"):
        one.split(1.0)
