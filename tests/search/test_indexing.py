"""Indexing: only what is new is embedded; kills keep the work; nothing is lost or stale."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from search.helpers import COUNT, SIDE, Wrapped, in_child, index, make_encoders, save

from dfsbir.data.folders import read_folder
from dfsbir.data.image_files import open_image
from dfsbir.evaluation.retrieval import embed
from dfsbir.search.gallery import Gallery
from dfsbir.search.searcher import Searcher


def expected_vectors(photos, encoder):
    "What `embed` gives for the photos of a folder, in order of path."
    files = sorted(photos.rglob("*.jpg"))
    images = torch.stack([open_image(p, "photo", SIDE) for p in files]) / 255
    return embed(encoder, images)


def stop_after(photos_embedded):
    "Before a batch: Ctrl-C once so many photos were embedded."

    def before(embedded):
        if embedded == photos_embedded:
            raise KeyboardInterrupt

    return before


# ---- bringing it up to date


def test_only_what_is_new_goes_through_the_net(gallery, photos, toy, encoders):
    save(toy, COUNT, photos / "new" / "a.jpg")
    files = sorted(photos.rglob("*.jpg"))
    changed, renamed, gone, touched = files[:4]
    save(toy, COUNT + 1, changed)
    renamed.rename(photos / "elsewhere.jpg")
    gone.unlink()
    os.utime(touched, ns=(1, 1))
    shutil.copy(files[4], photos / "new" / "copy.jpg")
    encoder = Wrapped(encoders["photo"])
    after = index(gallery.folder, photos, encoder)
    counts = dict(embedded=2, known=COUNT - 1, gone=2, broken=0)
    assert encoder.embedded == 2 and after.changes.items() >= counts.items()
    files = sorted(photos.rglob("*.jpg"))
    assert [i.path for i in after.items] == [p.relative_to(photos).as_posix() for p in files]
    wanted = expected_vectors(photos, encoders["photo"])
    torch.testing.assert_close(after.vectors, wanted, atol=1e-5, rtol=0)
    assert next(i for i in after.items if i.path == "elsewhere.jpg").label is None
    nothing = Wrapped(encoders["photo"])
    assert index(gallery.folder, photos, nothing).changes["embedded"] == nothing.embedded == 0


def test_other_content_of_the_same_size_is_noticed(gallery, photos, encoders):
    file = sorted(photos.rglob("*.jpg"))[0]
    data = bytearray(file.read_bytes())
    data[-40] ^= 1
    file.write_bytes(data)
    assert index(gallery.folder, photos, encoders["photo"]).changes["embedded"] == 1


def test_equal_photos_stand_in_gallery_order(gallery, photos, encoders):
    for name in ("z", "m", "a"):
        shutil.copy(photos / "car" / "01.jpg", photos / f"{name}.jpg")
    after = index(gallery.folder, photos, encoders["photo"])
    hits = Searcher(after, encoders).by_photo(photos / "m.jpg", k=4)
    checksum = hits.items()[0].checksum
    same = [n for n, item in enumerate(after.items) if item.checksum == checksum]
    assert len(same) == 4 and hits.indices[0].tolist() == same
    assert len(hits.scores[0].unique()) == 1


def test_photos_of_the_far_future_are_indexed_once(photos, encoders, tmp_path):
    for file in photos.rglob("*.jpg"):
        os.utime(file, (1e10, 1e10))  # in the year 2286
    index(tmp_path / "g", photos, encoders["photo"])
    counts = dict(embedded=0, known=COUNT, gone=0, broken=0)
    assert index(tmp_path / "g", photos, encoders["photo"]).changes == counts


def failing(monkeypatch, name, number):
    "Reading files of this name fails, with this number of the system's errors."
    read = Path.read_bytes

    def fail(path):
        if path.name == name:
            raise OSError(number, os.strerror(number))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", fail)


def test_a_file_that_goes_away_meanwhile_is_listed(photos, encoders, tmp_path, monkeypatch):
    failing(monkeypatch, "03.jpg", errno.ENOENT)
    gallery = index(tmp_path / "g", photos, encoders["photo"])
    ((path, reason),) = gallery.broken
    assert len(gallery) == COUNT - 1 and path == "cup/03.jpg" and "FileNotFoundError" in reason


# ---- kills and interrupts


def test_a_kill_while_embedding_keeps_the_old_gallery_and_the_work(
    gallery, photos, toy, encoders, monkeypatch
):
    for i in range(6):
        save(toy, COUNT + i, photos / "new" / f"{i}.jpg")
    monkeypatch.setattr("dfsbir.search.indexing.SMALLEST_PART", 2)

    def die(embedded):
        if embedded == 4:
            os.kill(os.getpid(), signal.SIGKILL)

    dying = Wrapped(encoders["photo"], die)
    assert in_child(lambda: index(gallery.folder, photos, dying, batch_size=2)) == -signal.SIGKILL
    assert Gallery(gallery.folder).items == gallery.items
    rest = Wrapped(encoders["photo"])
    after = index(gallery.folder, photos, rest)
    assert rest.embedded == 2 and len(after) == COUNT + 6
    assert not list((gallery.folder / "parts").glob("*"))
    wanted = expected_vectors(photos, encoders["photo"])
    torch.testing.assert_close(after.vectors, wanted, atol=1e-5, rtol=0)


def test_an_interrupt_keeps_the_work(photos, encoders, tmp_path):
    with pytest.raises(KeyboardInterrupt, match="10 photos"):
        index(tmp_path / "g", photos, Wrapped(encoders["photo"], stop_after(10)))
    with pytest.raises(FileNotFoundError):
        Gallery(tmp_path / "g")
    assert index(tmp_path / "g", photos, encoders["photo"]).changes["embedded"] == COUNT - 10


def test_an_error_keeps_the_work(photos, encoders, tmp_path):
    def fail(embedded):
        if embedded == 10:
            raise MemoryError

    with pytest.raises(MemoryError):
        index(tmp_path / "g", photos, Wrapped(encoders["photo"], fail))
    assert index(tmp_path / "g", photos, encoders["photo"]).changes["embedded"] == COUNT - 10


def test_damaged_and_foreign_parts_are_left_out(photos, encoders, tmp_path):
    for pair in (encoders, make_encoders(seed=1)):
        with pytest.raises(KeyboardInterrupt):
            index(tmp_path / "g", photos, Wrapped(pair["photo"], stop_after(10)))
    (tmp_path / "g" / "parts" / "x.safetensors").write_bytes(b"half")
    gallery = index(tmp_path / "g", photos, encoders["photo"])
    assert gallery.changes["embedded"] == COUNT - 10
    assert not list((tmp_path / "g" / "parts").glob("*"))
    wanted = embed(encoders["photo"], read_folder(photos, "photo", SIDE))
    torch.testing.assert_close(gallery.vectors, wanted, atol=1e-5, rtol=0)


def test_what_a_kill_leaves_grows_with_the_run(photos, encoders, tmp_path, monkeypatch):
    "However long the run, all but an eighth is kept, or all but the smallest part."
    monkeypatch.setattr("dfsbir.search.indexing.SMALLEST_PART", 2)
    for i, file in enumerate(sorted(photos.rglob("*.jpg"))):
        for n in range(4):  # other content each time
            (photos / f"{i}_{n}.jpg").write_bytes(file.read_bytes() + bytes([n]))
    for killed_after in (10, 60, 110):
        folder = tmp_path / str(killed_after)

        def die(embedded, limit=killed_after):
            if embedded >= limit:
                os.kill(os.getpid(), signal.SIGKILL)

        dying = Wrapped(encoders["photo"], die)
        code = in_child(lambda f=folder, e=dying: index(f, photos, e, batch_size=1))
        assert code == -signal.SIGKILL
        rest = Wrapped(encoders["photo"])
        total = len(index(folder, photos, rest))
        kept = total - rest.embedded
        assert killed_after - kept <= max(2, killed_after // 8) + 1


def test_verify_finds_what_size_and_time_hide(gallery, photos, encoders):
    file = sorted(photos.rglob("*.jpg"))[0]
    stat, data = file.stat(), bytearray(file.read_bytes())
    data[-40] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert index(gallery.folder, photos, encoders["photo"]).changes["embedded"] == 0
    encoder = Wrapped(encoders["photo"])
    after = index(gallery.folder, photos, encoder, verify=True)
    assert after.changes["embedded"] == encoder.embedded == 1
    assert len(after) == COUNT and after.changes["gone"] == 1


def test_a_known_photo_that_cannot_be_read_now_stays(gallery, photos, encoders, monkeypatch):
    "As on a network drive; one that was read and is damaged goes."
    damaged = photos / "car" / "01.jpg"
    stat = damaged.stat()
    damaged.write_bytes(bytes(stat.st_size))
    os.utime(damaged, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    failing(monkeypatch, "03.jpg", errno.EIO)
    after = index(gallery.folder, photos, encoders["photo"], verify=True)
    assert after.changes == dict(embedded=0, known=COUNT - 1, gone=1, broken=1)
    ((path, reason),) = after.listing.unreadable
    assert path == "cup/03.jpg" and "OSError" in reason and after.broken[0][0] == "car/01.jpg"
    places = [n for n, item in enumerate(gallery.items) if item.path != "car/01.jpg"]
    assert after.items == [gallery.items[n] for n in places]
    assert torch.equal(after.vectors, gallery.vectors[places])


def test_of_equal_photos_those_that_left_are_gone(photos, encoders, tmp_path):
    copies = [photos / "car" / "01.jpg", photos / "copy.jpg", photos / "other.jpg"]
    for copy in copies[1:]:
        shutil.copy(copies[0], copy)
    index(tmp_path / "g", photos, encoders["photo"])
    for copy in copies:
        os.utime(copy, ns=(1, 1))  # as a backup restores them
    copies[1].rename(photos / "renamed.jpg")
    copies[2].unlink()
    changes = index(tmp_path / "g", photos, encoders["photo"]).changes
    assert changes == dict(embedded=0, known=COUNT + 1, gone=1, broken=0)


WORKERS = """
import os, sys, time
import torch
sys.path[:0] = sys.argv[3:]
from search.helpers import Wrapped, index, make_encoders
torch.set_num_threads(1)
def wait(embedded):
    children = f"/proc/{os.getpid()}/task/{os.getpid()}/children"
    print(open(children).read(), flush=True)
    time.sleep(600)
index(sys.argv[1], sys.argv[2], Wrapped(make_encoders()["photo"], wait), workers=2)
"""


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are looked up in /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_when_their_run_is_killed(how, photos, tmp_path):
    command = [sys.executable, "-c", WORKERS, tmp_path / "g", photos, ROOT, ROOT / "tests"]
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True) as run:
        workers = run.stdout.readline().split()
        run.send_signal(how)
        run.wait(60)
    assert len(workers) >= 2

    def alive(worker):
        try:
            return Path(f"/proc/{worker}/stat").read_text().split(") ")[1][0] != "Z"
        except FileNotFoundError:
            return False

    deadline = time.monotonic() + 60
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, workers))
