"""Indexing: only what is new is embedded; kills keep the work; nothing is lost or stale."""

import errno
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
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


def test_a_file_that_goes_away_meanwhile_is_listed(photos, encoders, tmp_path, monkeypatch):
    read = Path.read_bytes

    def vanished(path):
        if path.name == "03.jpg":
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", vanished)
    gallery = index(tmp_path / "g", photos, encoders["photo"])
    ((path, reason),) = gallery.broken
    assert len(gallery) == COUNT - 1 and path == "cup/03.jpg" and "FileNotFoundError" in reason


# ---- kills and interrupts


def test_a_kill_while_embedding_keeps_the_old_gallery_and_the_work(
    gallery, photos, toy, encoders, monkeypatch
):
    for i in range(6):
        save(toy, COUNT + i, photos / "new" / f"{i}.jpg")
    monkeypatch.setattr("dfsbir.search.indexing.PART", 2)

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
