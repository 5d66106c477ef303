"""The gallery's file: what goes in comes out, damage is refused, one writer, many readers."""

import errno
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from search.helpers import COUNT, Wrapped, content, fork, in_child, index, save

import dfsbir.search.gallery_file
from dfsbir.core.checkpoint import save_state
from dfsbir.search.gallery import Gallery
from dfsbir.search.gallery_file import (
    FORMAT,
    GalleryMismatch,
    Item,
    Rows,
    single_writer,
    write_rows,
)

# ---- what goes in comes out


def some_rows(n, dim=3):
    names = ["a/b c.jpg", os.fsdecode(b"caf\xe9/x.jpg"), "ünï.png", "tab\tnew\nline.jpg"]
    labels = [None, "b", "a", "caf\udce9"]
    items = [
        Item(f"{names[i % 4]}{i}", 10**12 + i, f"{i:064x}", labels[i % 4], -i) for i in range(n)
    ]
    vectors = torch.arange(n * dim, dtype=torch.float32).view(n, dim)
    return items, vectors, [b"\xff" * (i % 5) for i in range(n)]


@pytest.mark.parametrize("n, dim", [(1, 1), (1, 4), (7, 3), (50, 5)])
@pytest.mark.parametrize("piece", [1, 3, 1000])
def test_rows_come_back(tmp_path, n, dim, piece):
    items, vectors, thumbnails = some_rows(n, dim)
    head = {"encoder": "e", "broken": [["x", "y"]]}
    write_rows(tmp_path / "g", iter(items), vectors.split(piece), iter(thumbnails), **head)
    rows = Rows(tmp_path / "g")
    assert rows.items == items and len(rows) == n and rows.items[-1] == items[-1]
    assert rows.items[2:5] == items[2:5]
    assert torch.equal(rows.vectors, vectors) and rows.head.items() >= head.items()
    assert [rows.thumbnail(i) for i in range(n)] == thumbnails
    assert rows.head["labels"] == sorted({i.label for i in items} - {None})
    with pytest.raises(IndexError):
        rows.items[n]


def test_the_same_rows_are_the_same_file(tmp_path):
    items, vectors, thumbnails = some_rows(9)
    for name, piece in (("a", 2), ("b", 9)):
        write_rows(tmp_path / name, items, vectors.split(piece), thumbnails, encoder="e")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="maps are read in /proc")
@pytest.mark.parametrize("maps", [True, False])
def test_where_mapped_files_cannot_be_replaced_none_stays_mapped(tmp_path, monkeypatch, maps):
    "As on Windows: the rows are the same, and the file can be replaced while they are in use."
    monkeypatch.setattr(dfsbir.search.gallery_file, "MAPS_FILES", maps)
    items, vectors, thumbnails = some_rows(9)
    write_rows(tmp_path / "g.safetensors", items, [vectors], thumbnails, encoder="e")
    rows = Rows(tmp_path / "g.safetensors")
    mapped = str(tmp_path / "g.safetensors") in Path("/proc/self/maps").read_text()
    assert mapped == maps
    assert rows.items == items and torch.equal(rows.vectors, vectors)
    assert [rows.thumbnail(i) for i in range(9)] == thumbnails


def test_large_vectors_are_checked_on_request(tmp_path, monkeypatch):
    items, vectors, thumbnails = some_rows(9)
    write_rows(tmp_path / "g", items, [vectors], thumbnails)
    data = bytearray((tmp_path / "g").read_bytes())
    data[data.index(vectors.numpy().tobytes()) + 30] ^= 1
    (tmp_path / "g").write_bytes(data)
    monkeypatch.setattr(dfsbir.search.gallery_file, "VERIFY_BYTES", 50)
    rows = Rows(tmp_path / "g")
    with pytest.raises(GalleryMismatch, match="g is damaged"):
        rows.verify()


# ---- damage and other formats


@pytest.mark.parametrize("damage", ["cut", "empty", "bits", "paths", "text", "state"])
def test_a_damaged_gallery_is_refused(gallery, photos, encoders, damage):
    file = gallery.folder / "gallery.safetensors"
    data = bytearray(file.read_bytes())
    if damage == "bits":
        data[data.index(gallery.vectors.numpy().tobytes()) + 3] ^= 16
    if damage == "paths":
        data[data.index(gallery.items[0].path.encode())] ^= 1
    if damage == "state":
        save_state(file, {"vectors": torch.zeros(2, 2)}, {"format": FORMAT})
    else:
        broken = {"cut": data[: len(data) // 2], "empty": b"", "text": b"hello"}
        file.write_bytes(broken.get(damage, data))
    before = file.read_bytes()
    for act in (
        lambda: Gallery(gallery.folder),
        lambda: index(gallery.folder, photos, encoders["photo"]),
    ):
        with pytest.raises(GalleryMismatch, match=file.name):
            act()
    assert file.read_bytes() == before


def test_another_format_is_refused(gallery, photos, encoders, monkeypatch):
    file = gallery.folder / "gallery.safetensors"
    file.unlink()
    monkeypatch.setattr(dfsbir.search.gallery_file, "FORMAT", "dfsbir-gallery-0")
    index(gallery.folder, photos, encoders["photo"])
    monkeypatch.undo()
    before = file.read_bytes()
    for act in (
        lambda: Gallery(gallery.folder),
        lambda: index(gallery.folder, photos, encoders["photo"]),
    ):
        with pytest.raises(GalleryMismatch, match=f"dfsbir-gallery-0.*{FORMAT}"):
            act()
    assert file.read_bytes() == before


# ---- kills, full disks


def test_a_kill_while_writing_keeps_the_old_gallery(gallery, photos, toy, encoders):
    save(toy, COUNT, photos / "new.jpg")

    def work():
        os.replace = lambda *a: os.kill(os.getpid(), signal.SIGKILL)
        index(gallery.folder, photos, encoders["photo"])

    assert in_child(work) == -signal.SIGKILL
    assert Gallery(gallery.folder).items == gallery.items
    assert len(index(gallery.folder, photos, encoders["photo"])) == COUNT + 1
    left = {p.name for p in gallery.folder.rglob("*") if p.is_file()}
    assert left == {"gallery.safetensors", "lock"}


def test_no_permission_to_write(photos, encoders, tmp_path):
    (tmp_path / "file").write_text("in the way")
    encoder = Wrapped(encoders["photo"])
    with pytest.raises(OSError, match="file"):
        index(tmp_path / "file" / "gallery", photos, encoder)
    assert encoder.embedded == 0 and (tmp_path / "file").read_text() == "in the way"


def test_a_full_disk_is_noticed_beforehand(gallery, photos, encoders, monkeypatch):
    before, encoder = content(gallery.folder), Wrapped(encoders["photo"])
    full = shutil._ntuple_diskusage(10**9, 10**9, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda p: full)
    with pytest.raises(OSError, match="0 MB free"):
        index(gallery.folder, photos, encoder)
    assert encoder.embedded == 0 and content(gallery.folder) == before


def test_a_disk_that_fills_up_leaves_the_old_gallery(gallery, photos, toy, encoders, monkeypatch):
    save(toy, COUNT, photos / "new.jpg")
    before = content(gallery.folder)

    def full(file, *rest):
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(dfsbir.search.gallery_file, "_write_columns", full)
    with pytest.raises(OSError, match="No space left"):
        index(gallery.folder, photos, encoders["photo"])
    assert content(gallery.folder) == before


# ---- one writer, many readers


def test_a_second_writer_is_refused_and_a_dead_one_forgotten(gallery, photos, encoders):
    here, there = fork.Pipe()

    def hold():
        with single_writer(gallery.folder):
            there.send("held")
            signal.pause()

    child = fork.Process(target=hold)
    child.start()
    assert here.recv() == "held"
    try:
        with pytest.raises(BlockingIOError):
            index(gallery.folder, photos, encoders["photo"])
        assert len(Gallery(gallery.folder)) == COUNT, "readers need no lock"
    finally:
        child.kill()
        child.join(60)
    index(gallery.folder, photos, encoders["photo"])
    with (
        single_writer(gallery.folder),
        pytest.raises(BlockingIOError, match=str(gallery.folder / "lock")),
    ):
        index(gallery.folder, photos, encoders["photo"])
    index(gallery.folder, photos, encoders["photo"])


def test_a_refused_thread_leaves_the_lock_as_it_is(gallery):
    "If it opened and closed the file, the first writer would lose the system's lock."

    def other():
        dfsbir.search.gallery_file._folders_being_written.clear()  # only the system's lock is left
        try:
            with single_writer(gallery.folder):
                os._exit(1)
        except BlockingIOError:
            os._exit(0)

    with single_writer(gallery.folder):
        with pytest.raises(BlockingIOError), single_writer(gallery.folder):
            pass
        assert in_child(other) == 0
    with single_writer(gallery.folder):
        pass


def test_two_read_while_one_writes(gallery, photos, toy, encoders):
    states = {gallery.digest: len(gallery)}
    extra = save(toy, COUNT, photos / "extra.jpg")
    states[index(gallery.folder, photos, encoders["photo"]).digest] = COUNT + 1
    stop = fork.Event()

    def read():
        n = 0
        while not stop.is_set() or n < 5:
            g = Gallery(gallery.folder)
            g.thumbnail(len(g) - 1)
            first = g.search(g.vectors[:1], 3).indices[0, 0]
            if states.get(g.digest) != len(g) or first != 0:
                os._exit(7)
            n += 1

    readers = [fork.Process(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    data, modified = extra.read_bytes(), extra.stat().st_mtime_ns
    for _ in range(6):
        extra.unlink()
        index(gallery.folder, photos, encoders["photo"])
        extra.write_bytes(data)
        os.utime(extra, ns=(modified, modified))
        index(gallery.folder, photos, encoders["photo"])
    stop.set()
    for reader in readers:
        reader.join(60)
    assert [reader.exitcode for reader in readers] == [0, 0]


def test_no_gallery_where_there_is_none(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(FileNotFoundError, match=folder.name):
            Gallery(Path(folder))
