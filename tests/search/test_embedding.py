"""Embedding: workers and clusters change nothing; what is not finite never reaches a gallery."""

import shutil
import sys

import pytest
import torch
from search.helpers import COUNT, index, make_encoders, save

from dfsbir.search.embedding import ray_workers
from dfsbir.search.gallery import Gallery


def test_workers_change_nothing(gallery, photos, encoders, tmp_path):
    other = index(tmp_path / "other", photos, encoders["photo"], workers=2)
    torch.testing.assert_close(other.vectors, gallery.vectors)
    assert other.items == gallery.items


def test_an_encoder_of_no_numbers(photos, tmp_path):
    bad = make_encoders()["photo"]
    bad.net.fc.bias.data[0] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        index(tmp_path / "other", photos, bad)
    with pytest.raises(FileNotFoundError):
        Gallery(tmp_path / "other")


def test_a_missing_extra_is_named(photos, encoders, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"dfsbir\[ray\]"):
        index(tmp_path / "other", photos, encoders["photo"], ray="local")


@pytest.mark.parametrize(
    "resources, blocks, expected",
    [
        ({"CPU": 8.0}, 100, (8, 0)),
        ({"CPU": 8.0}, 3, (3, 0)),
        ({"CPU": 16.0, "GPU": 1.0}, 100, (4, 0.25)),
        ({"CPU": 16.0, "GPU": 2.0}, 100, (8, 0.25)),
        ({"CPU": 2.0, "GPU": 2.0}, 100, (2, 1)),
        ({"CPU": 1.0, "GPU": 2.0}, 100, (2, 1)),
        ({"CPU": 16.0, "GPU": 4.0}, 1, (1, 0.25)),
        ({}, 5, (1, 0)),
    ],
)
def test_workers_share_the_gpus_of_a_cluster(resources, blocks, expected):
    "On GPUs where they are, four workers at most on each, as they decode as well."
    assert ray_workers(resources, blocks) == expected


def test_embedding_on_ray(gallery, photos, toy, encoders, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray", reason="ray is not installed (extra: ray)")
    pytest.importorskip("ray.data", reason="ray.data is not installed (extra: ray)")
    (photos / "bad.jpg").write_text("hello")
    shutil.copytree(gallery.folder, tmp_path / "other")
    for i in range(6):
        save(toy, COUNT + i, photos / "new" / f"{i}.jpg")
    (photos / "car" / "01.jpg").rename(photos / "renamed.jpg")
    # Ray lowers the priority of its workers, which takes minutes on a busy machine
    monkeypatch.setenv("RAY_worker_niceness", "0")
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    try:
        ray.init(num_cpus=2, **quiet)
    except Exception as error:  # its agents have 15 seconds to start (Ray's issue 65983)
        ray.shutdown()
        pytest.skip(f"Ray did not start on this busy machine: {error}")
    try:
        clustered = index(tmp_path / "other", photos, encoders["photo"], ray="auto", batch_size=3)
    finally:
        ray.shutdown()
    here = index(gallery.folder, photos, encoders["photo"])
    assert clustered.items == here.items and clustered.broken == here.broken
    assert [path for path, _ in here.broken] == ["bad.jpg"]
    counts = dict(embedded=6, known=COUNT, gone=0, broken=1)
    assert clustered.changes == here.changes and here.changes.items() >= counts.items()
    for i in range(COUNT + 6):
        assert clustered.thumbnail(i).tobytes() == here.thumbnail(i).tobytes()
    torch.testing.assert_close(clustered.vectors, here.vectors, atol=1e-5, rtol=0)
