"""What the search notebook should not hold: kills, second writers, readers at work, damaged files, images and strokes of every bad kind, oracles, a cluster."""

import dataclasses
import errno
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import dfsbir.core.checkpoint
import dfsbir.search.gallery
from dfsbir.core.checkpoint import save_state
from dfsbir.core.types import MODALITIES, Normalizer
from dfsbir.data.folders import read_folder
from dfsbir.data.image_files import open_image
from dfsbir.data.toy import toy_pairs
from dfsbir.data.toy_shapes import TOY_CLASSES
from dfsbir.evaluation.retrieval import embed, rank_topk
from dfsbir.search.exact import nearest
from dfsbir.search.gallery import Gallery, GalleryMismatch, Item, encoder_id, single_writer
from dfsbir.search.indexing import index_photos
from dfsbir.search.photo_files import decode_photo
from dfsbir.search.searcher import Searcher, _on_canvas, sketch_from_strokes
from dfsbir.students.encoder import HeadSpec, encoder_from_teacher, load_encoders, save_encoders
from dfsbir.students.heads import MetricSpace
from dfsbir.teachers.class_map import align_classes
from dfsbir.teachers.nets import build_net
from dfsbir.teachers.teacher import Teacher

SIDE, COUNT = 28, 24
fork = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_encoders(seed=0, **options):
    "An untrained pair."
    classes = list(TOY_CLASSES)
    torch.manual_seed(seed)
    teachers = {
        m: Teacher(
            build_net("dfsbir", "tiny", 10),
            classes,
            Normalizer(SIDE),
            m,
            card=dict(source="dfsbir", name="tiny"),
        )
        for m in MODALITIES
    }
    space = MetricSpace.random(10, 12)
    pair = {
        m: encoder_from_teacher(
            teachers[m], align_classes(classes, classes), space, **options
        ).eval()
        for m in MODALITIES
    }
    for e in pair.values():
        e.net.fc.weight.data *= 20  # an untrained net answers alike to everything
    return pair


@pytest.fixture(scope="module")
def encoders():
    return make_encoders()


@pytest.fixture(scope="module")
def toy():
    return toy_pairs(COUNT + 6, size=40, split="test")


def save(toy, i, path):
    "Toy photo i as a file."
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((toy[0][i][0].permute(1, 2, 0) * 255).byte().numpy()).save(
        path, **(dict(quality=95) if path.suffix == ".jpg" else {})
    )
    return path


@pytest.fixture
def photos(tmp_path, toy):
    "Toy photos as JPEG files in class folders."
    for i in range(COUNT):
        save(toy, i, tmp_path / "photos" / TOY_CLASSES[i % 10] / f"{i:02d}.jpg")
    return tmp_path / "photos"


def index(folder, photos, encoder, **options):
    return index_photos(folder, photos, encoder, **{"batch_size": 5, "progress": False, **options})


@pytest.fixture
def gallery(tmp_path, photos, encoders):
    return index(tmp_path / "gallery", photos, encoders["photo"])


class Wrapped(nn.Module):
    "The photo encoder, with something done before each batch; it passes for the encoder itself."

    def __init__(self, encoder, before):
        super().__init__()
        self.encoder, self.card, self.normalizer, self.before, self.seen = (
            encoder,
            encoder.card,
            encoder.normalizer,
            before,
            0,
        )

    def forward(self, x):
        self.before(self.seen)
        self.seen += len(x)
        return self.encoder(x)

    def state_dict(self, *args, **options):
        return self.encoder.state_dict(*args, **options)


def counted(encoder):
    return Wrapped(encoder, lambda seen: None)


def content(folder):
    "Every file below a folder, with its bytes."
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.name != "lock"
    }


def in_child(work):
    "Exit code of a forked process."
    child = fork.Process(target=work)
    child.start()
    child.join(60)
    return child.exitcode


# ---- exact search


@pytest.mark.parametrize("n, k", [(1, 1), (40, 40), (500, 7)])
def test_nearest_is_the_exact_ranking_with_ties_in_order(n, k):
    torch.manual_seed(0)
    for q, v in (
        (torch.randn(9, 6), torch.randn(n, 6)),
        (torch.randn(9, 3).round(), torch.randn(n, 3).round()),
        (torch.zeros(2, 3), torch.randn(n, 3)),
    ):
        scores, places = nearest(q, v, k)
        wanted, order = rank_topk(q, v, k)
        assert torch.equal(places, order)
        torch.testing.assert_close(scores, wanted)


def test_nearest_is_faiss_flat():
    faiss = pytest.importorskip("faiss", reason="faiss is not installed (extra: search)")
    torch.manual_seed(0)
    q, v = torch.randn(30, 16), torch.randn(2000, 16)
    flat = faiss.IndexFlatIP(16)
    flat.add(v.numpy())
    scores, places = flat.search(q.numpy(), 20)
    ours = nearest(q, v, 20)
    assert np.array_equal(ours[1].numpy(), places)
    np.testing.assert_allclose(ours[0].numpy(), scores, rtol=1e-5, atol=1e-5)


def test_nearest_in_chunks(monkeypatch):
    torch.manual_seed(0)
    q, v = torch.randn(7, 4), torch.randn(2**20, 4)  # four queries a chunk
    one_by_one = [nearest(row[None], v, 3) for row in q]
    together = nearest(q, v, 3)
    assert torch.equal(together[1], torch.cat([places for _, places in one_by_one]))


# ---- what a gallery holds


def test_a_gallery_holds_what_embed_gives(gallery, photos, encoders):
    data = read_folder(photos, "photo", SIDE)
    torch.testing.assert_close(gallery.vectors, embed(encoders["photo"], data), atol=1e-5, rtol=0)
    assert (
        gallery.classes == data.classes
        and gallery.labels.tolist() == data.labels.tolist()
        and len(gallery) == COUNT
    )
    assert [str(gallery.file(i)) for i in range(COUNT)] == [
        str(Path(p).resolve()) for p in data.paths
    ]
    assert gallery.encoder_id == encoder_id(encoders["photo"]) and not gallery.broken
    first = gallery.items[0]
    assert (
        first.size == gallery.file(0).stat().st_size
        and len(first.checksum) == 64
        and first.label == first.path.split("/")[0]
    )
    assert gallery.thumbnail(0).size == (96, 96) and gallery.thumbnail(0, 30).size == (30, 30)


def test_workers_change_nothing(gallery, photos, encoders, tmp_path):
    other = index(tmp_path / "other", photos, encoders["photo"], workers=2)
    torch.testing.assert_close(other.vectors, gallery.vectors)
    assert other.items == gallery.items


def test_a_gallery_of_an_image_set(toy, encoders, tmp_path):
    data = toy[0].take(slice(12))
    gallery = index(tmp_path / "gallery", data, encoders["photo"])
    torch.testing.assert_close(gallery.vectors, embed(encoders["photo"], data), atol=1e-5, rtol=0)
    assert (
        gallery.classes == sorted({TOY_CLASSES[c] for c in data.labels})
        and gallery.thumbnail(3).size == (96, 96)
        and gallery.root is None
    )
    with pytest.raises(FileNotFoundError):
        gallery.file(0)
    again = counted(encoders["photo"])
    assert (
        index(tmp_path / "gallery", toy[0].take(slice(14)), again).changes
        == dict(embedded=2, known=12, gone=0, broken=0)
        and again.seen == 2
    )


def test_photos_without_class_folders_have_no_label(toy, encoders, tmp_path):
    for i, name in enumerate(("a b.jpg", "ünï.png", ".hidden.jpg")):
        save(toy, i, tmp_path / "p" / name)
    save(toy, 4, tmp_path / "p" / ".thumbs" / "x.jpg")
    gallery = index(tmp_path / "g", tmp_path / "p", encoders["photo"])
    assert (
        [i.path for i in gallery.items] == ["a b.jpg", "ünï.png"]
        and gallery.labels.tolist() == [-1, -1]
        and gallery.classes == []
    )
    with pytest.raises(ValueError, match="not in class folders"):
        gallery.search(gallery.vectors[:1], label="car")
    assert gallery.search(gallery.vectors[:1]).contact_sheet().width > 96


# ---- bringing it up to date


def test_only_what_is_new_goes_through_the_net(gallery, photos, toy, encoders):
    save(toy, COUNT, photos / "new" / "a.jpg")
    files = sorted(photos.rglob("*.jpg"))
    changed, renamed, gone, touched = files[0], files[1], files[2], files[3]
    save(toy, COUNT + 1, changed)
    renamed.rename(photos / "elsewhere.jpg")
    gone.unlink()
    os.utime(touched, ns=(1, 1))
    shutil.copy(files[4], photos / "new" / "copy.jpg")
    encoder = counted(encoders["photo"])
    after = index(gallery.folder, photos, encoder)
    assert encoder.seen == 2 and after.changes == dict(
        embedded=2, known=COUNT - 1, gone=2, broken=0
    )
    assert [i.path for i in after.items] == [
        p.relative_to(photos).as_posix() for p in sorted(photos.rglob("*.jpg"))
    ]
    torch.testing.assert_close(
        after.vectors,
        embed(
            encoders["photo"],
            torch.stack([open_image(p, "photo", SIDE) for p in sorted(photos.rglob("*.jpg"))])
            / 255,
        ),
        atol=1e-5,
        rtol=0,
    )
    assert next(i for i in after.items if i.path == "elsewhere.jpg").label is None
    nothing = counted(encoders["photo"])
    assert index(gallery.folder, photos, nothing).changes["embedded"] == nothing.seen == 0


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
    same = [
        n
        for n, i in enumerate(after.items)
        if i.checksum == after.items[hits.indices[0, 0]].checksum
    ]
    assert len(same) == 4 and hits.indices[0].tolist() == same and len(hits.scores[0].unique()) == 1


def test_linked_folders_are_indexed_once(toy, encoders, tmp_path):
    "A link to a folder is a folder; one that leads back ends."
    (
        save(toy, 0, tmp_path / "elsewhere" / "0.jpg"),
        save(toy, 1, tmp_path / "photos" / "b" / "1.jpg"),
    )
    (tmp_path / "photos" / "a").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos" / "b" / "back").symlink_to(tmp_path / "photos")
    assert [
        (i.path, i.label)
        for i in index(tmp_path / "gallery", tmp_path / "photos", encoders["photo"]).items
    ] == [("a/0.jpg", "a"), ("b/1.jpg", "b")]


def test_a_name_that_is_no_text(toy, encoders, tmp_path):
    pyarrow = pytest.importorskip("pyarrow.parquet")
    name = os.fsdecode(b"caf\xe9.jpg")
    save(toy, 0, tmp_path / "photos" / name)
    made = index(tmp_path / "gallery", tmp_path / "photos", encoders["photo"])
    made.to_parquet(tmp_path / "g.parquet")
    assert made.items[0].path == name and pyarrow.read_table(tmp_path / "g.parquet")[
        "path"
    ].to_pylist() == ["caf\\udce9.jpg"]


def test_a_gallery_of_sketches_is_refused(toy, encoders, tmp_path):
    with pytest.raises(
        ValueError, match="a gallery holds photos; found an ImageSet of modality sketch"
    ):
        index(tmp_path / "gallery", toy[1], encoders["photo"])


def test_moved_with_its_photos_or_without(gallery, photos, encoders, tmp_path):
    (tmp_path / "new").mkdir()
    for folder in (photos, gallery.folder):
        shutil.move(folder, tmp_path / "new" / folder.name)
    moved = Gallery(tmp_path / "new" / "gallery")
    assert moved.file(3) == (tmp_path / "new" / "photos" / moved.items[3].path).resolve()
    shutil.move(moved.folder, tmp_path / "alone")
    alone = Gallery(tmp_path / "alone")
    assert (
        alone.thumbnail(3).tobytes() == gallery.thumbnail(3).tobytes()
        and len(Searcher(alone, encoders).by_strokes([[(0, 0), (1, 1)]]).items()) == 10
    )
    with pytest.raises(FileNotFoundError, match="index the folder where they are now"):
        alone.file(3)
    encoder = counted(encoders["photo"])
    assert (
        index(alone.folder, tmp_path / "new" / "photos", encoder).file(3).is_file()
        and encoder.seen == 0
    )


# ---- kills, locks, readers


def test_a_kill_while_embedding_keeps_the_old_gallery_and_the_work(
    gallery, photos, toy, encoders, monkeypatch
):
    for i in range(6):
        save(toy, COUNT + i, photos / "new" / f"{i}.jpg")
    monkeypatch.setattr("dfsbir.search.indexing.PART", 2)
    die = Wrapped(
        encoders["photo"], lambda seen: seen == 4 and os.kill(os.getpid(), signal.SIGKILL)
    )
    assert in_child(lambda: index(gallery.folder, photos, die, batch_size=2)) == -signal.SIGKILL
    assert Gallery(gallery.folder).items == gallery.items and list(
        (gallery.folder / "parts").glob("*")
    )
    rest = counted(encoders["photo"])
    after = index(gallery.folder, photos, rest)
    assert (
        rest.seen == 2
        and len(after) == COUNT + 6
        and not list((gallery.folder / "parts").glob("*"))
    )
    torch.testing.assert_close(
        after.vectors,
        embed(encoders["photo"], read_folder(photos, "photo", SIDE)),
        atol=1e-5,
        rtol=0,
    )


def test_a_kill_while_writing_keeps_the_old_gallery(gallery, photos, toy, encoders):
    save(toy, COUNT, photos / "new.jpg")

    def work():
        os.replace = lambda *a: os.kill(os.getpid(), signal.SIGKILL)
        index(gallery.folder, photos, encoders["photo"])

    assert in_child(work) == -signal.SIGKILL
    assert (
        Gallery(gallery.folder).items == gallery.items
        and len(list(gallery.folder.glob(".gallery*"))) == 1
    )
    assert len(index(gallery.folder, photos, encoders["photo"])) == COUNT + 1
    assert sorted(p.name for p in gallery.folder.iterdir()) == ["gallery.safetensors", "lock"]


def test_an_interrupt_keeps_the_work(photos, encoders, tmp_path):
    def stop(seen):
        if seen == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="10 photos were embedded and are kept"):
        index(tmp_path / "g", photos, Wrapped(encoders["photo"], stop))
    with pytest.raises(FileNotFoundError, match="holds no gallery"):
        Gallery(tmp_path / "g")
    assert index(tmp_path / "g", photos, encoders["photo"]).changes["embedded"] == COUNT - 10


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
        with pytest.raises(BlockingIOError, match="lock is held"):
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
    "Closing its own handle of the file would let the first writer's lock go."
    with single_writer(gallery.folder):
        with pytest.raises(BlockingIOError, match="is held"), single_writer(gallery.folder):
            pass

        def other():
            dfsbir.search.gallery._held.clear()  # another process knows only the system's lock
            try:
                with single_writer(gallery.folder):
                    os._exit(1)
            except BlockingIOError:
                os._exit(0)

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
            if states.get(g.digest) != len(g) or g.search(g.vectors[:1], 3).indices[0, 0] != 0:
                os._exit(7)
            n += 1

    readers = [fork.Process(target=read) for _ in range(2)]
    for r in readers:
        r.start()
    held, times = extra.read_bytes(), extra.stat().st_mtime_ns
    for _ in range(6):
        extra.unlink()
        index(gallery.folder, photos, encoders["photo"])
        extra.write_bytes(held)
        os.utime(extra, ns=(times, times))
        index(gallery.folder, photos, encoders["photo"])
    stop.set()
    for r in readers:
        r.join(60)
    assert [r.exitcode for r in readers] == [0, 0]


# ---- whose gallery it is


def test_another_encoder_is_refused(gallery, photos, encoders):
    before, other = content(gallery.folder), make_encoders(seed=1)
    with pytest.raises(GalleryMismatch, match="made by another encoder"):
        index(gallery.folder, photos, other["photo"])
    with pytest.raises(GalleryMismatch, match="made by another photo encoder"):
        Searcher(gallery, other)
    assert content(gallery.folder) == before
    with pytest.raises(ValueError, match="wants a photo encoder; found one of modality sketch"):
        index(gallery.folder, photos, encoders["sketch"])
    alien = make_encoders()["sketch"]
    alien.head.proxies.mul_(-1)
    with pytest.raises(GalleryMismatch, match="do not share one space"):
        Searcher(gallery, {"photo": encoders["photo"], "sketch": alien})


def test_an_encoders_id_is_its_weights_and_input(encoders, tmp_path):
    save_encoders(tmp_path, encoders, run="another name")
    assert encoder_id(load_encoders(tmp_path)["photo"]) == encoder_id(encoders["photo"])
    same = make_encoders()["photo"]
    assert encoder_id(same) == encoder_id(encoders["photo"])
    assert (
        encoder_id(make_encoders(flip_tta=True)["photo"])
        != encoder_id(same)
        != encoder_id(make_encoders(head=HeadSpec(temperature=2.0))["photo"])
    )
    next(same.parameters()).data[0] += 1e-6
    assert encoder_id(same) != encoder_id(encoders["photo"])


def test_searcher_takes_folders(gallery, encoders, tmp_path):
    save_encoders(tmp_path / "e", encoders)
    by_folder = Searcher(gallery.folder, tmp_path / "e").by_strokes([[(0, 0), (1, 1)]])
    assert torch.equal(
        by_folder.indices, Searcher(gallery, encoders).by_strokes([[(0, 0), (1, 1)]]).indices
    )


def test_another_format_is_refused(gallery, photos, encoders, monkeypatch):
    monkeypatch.setattr(dfsbir.search.gallery, "FORMAT", "dfsbir-gallery-0")
    file = gallery.folder / "gallery.safetensors"
    file.unlink()
    index(gallery.folder, photos, encoders["photo"])
    monkeypatch.undo()
    before = file.read_bytes()
    for act in (
        lambda: Gallery(gallery.folder),
        lambda: index(gallery.folder, photos, encoders["photo"]),
    ):
        with pytest.raises(
            GalleryMismatch, match="'dfsbir-gallery-0', this dfsbir reads 'dfsbir-gallery-1'"
        ):
            act()
    assert file.read_bytes() == before


@pytest.mark.parametrize("damage", ["cut", "empty", "bits", "text", "state"])
def test_a_damaged_gallery_is_refused(gallery, photos, encoders, damage):
    file = gallery.folder / "gallery.safetensors"
    data = bytearray(file.read_bytes())
    if damage == "bits":
        data[data.index(gallery.vectors.numpy().tobytes()) + 3] ^= 16
    if damage == "state":
        save_state(file, {"vectors": torch.zeros(2, 2)}, {"format": dfsbir.search.gallery.FORMAT})
    else:
        file.write_bytes(
            {"cut": data[: len(data) // 2], "empty": b"", "bits": data, "text": b"hello"}[damage]
        )
    before = file.read_bytes()
    for act in (
        lambda: Gallery(gallery.folder),
        lambda: index(gallery.folder, photos, encoders["photo"]),
    ):
        with pytest.raises(
            GalleryMismatch, match="is damaged .*remove it and index the photos again"
        ):
            act()
    assert file.read_bytes() == before


def test_damaged_and_foreign_parts_are_passed_over(photos, encoders, tmp_path, monkeypatch):
    def stop(seen):
        if seen == 10:
            raise KeyboardInterrupt

    for pair in (encoders, make_encoders(seed=1)):
        with pytest.raises(KeyboardInterrupt):
            index(tmp_path / "g", photos, Wrapped(pair["photo"], stop))
    (tmp_path / "g" / "parts" / "x.safetensors").write_bytes(b"half")
    gallery = index(tmp_path / "g", photos, encoders["photo"])
    assert gallery.changes["embedded"] == COUNT - 10 and not list(
        (tmp_path / "g" / "parts").glob("*")
    )
    torch.testing.assert_close(
        gallery.vectors,
        embed(encoders["photo"], read_folder(photos, "photo", SIDE)),
        atol=1e-5,
        rtol=0,
    )


# ---- folders and disks


def test_folders_without_photos(gallery, encoders, tmp_path):
    before = content(gallery.folder)
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("hello")
    for folder, said in (
        ("empty", "holds no photos: wanted files that end in"),
        ("texts", "holds no photos"),
        ("none", "is not a folder of photos"),
        ("texts/a.txt", "is not a folder of photos"),
    ):
        with pytest.raises(FileNotFoundError, match=said):
            index(gallery.folder, tmp_path / folder, encoders["photo"])
    (tmp_path / "texts" / "a.jpg").write_text("hello")
    with pytest.raises(
        ValueError,
        match=r"none of the 1 photos can be read, the first is a.jpg \(UnidentifiedImageError",
    ):
        index(gallery.folder, tmp_path / "texts", encoders["photo"])
    assert content(gallery.folder) == before


def test_no_gallery_where_there_is_none(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(FileNotFoundError, match="holds no gallery: make one with index_photos"):
            Gallery(folder)


def test_no_permission_to_write(photos, encoders, tmp_path):
    (tmp_path / "file").write_text("in the way")
    encoder = counted(encoders["photo"])
    with pytest.raises(OSError, match="cannot write to"):
        index(tmp_path / "file" / "gallery", photos, encoder)
    assert encoder.seen == 0 and (tmp_path / "file").read_text() == "in the way"


def test_a_full_disk_is_told_beforehand(gallery, photos, encoders, monkeypatch):
    before, encoder = content(gallery.folder), counted(encoders["photo"])
    monkeypatch.setattr(
        shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(10**9, 10**9, 1000)
    )
    with pytest.raises(OSError, match="0 MB free"):
        index(gallery.folder, photos, encoder)
    assert encoder.seen == 0 and content(gallery.folder) == before


def test_a_disk_that_fills_up_leaves_the_old_gallery(gallery, photos, toy, encoders, monkeypatch):
    save(toy, COUNT, photos / "new.jpg")
    before = content(gallery.folder)

    def full(tensors, path, *rest):
        Path(path).write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(dfsbir.core.checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        index(gallery.folder, photos, encoders["photo"])
    assert content(gallery.folder) == before


def test_an_encoder_of_no_numbers(gallery, photos, tmp_path):
    bad = make_encoders()["photo"]
    bad.net.fc.bias.data[0] = float("nan")
    with pytest.raises(ValueError, match="not finite numbers: look at its weights"):
        index(tmp_path / "other", photos, bad)
    with pytest.raises(FileNotFoundError):
        Gallery(tmp_path / "other")


# ---- image files


def png_of_size(width, height):
    "A PNG that says it is large, and holds one line."
    chunk = lambda kind, data: (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    )
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(bytes(3 * min(width, 4000) + 1)))
        + chunk(b"IEND", b"")
    )


def picture(size=(60, 40), mode="RGB"):
    "A picture without symmetry: red above, dark to the left."
    x = np.zeros((size[1], size[0], 3), np.uint8)
    x[: size[1] // 3, :, 0], x[:, size[0] // 4 :, 1] = 250, 120
    return Image.fromarray(x).convert(mode)


def saved(kind, path):
    "A file of a kind, as a user may have it; -> its name."
    exif = Image.Exif()
    exif[0x0112] = 6
    write = {
        "50 megapixels": (
            "jpg",
            lambda p: picture().resize((8000, 6250), Image.Resampling.NEAREST).save(p, quality=50),
        ),
        "cmyk": ("jpg", lambda p: picture(mode="CMYK").save(p, quality=95)),
        "grey": ("jpg", lambda p: picture(mode="L").save(p, quality=95)),
        "16 bit": (
            "png",
            lambda p: Image.fromarray(np.asarray(picture(mode="L")).astype(np.uint16) * 257).save(
                p
            ),
        ),
        "animated": (
            "gif",
            lambda p: picture().save(
                p, save_all=True, append_images=[Image.new("RGB", (60, 40), "blue")], duration=50
            ),
        ),
        "turned": (
            "jpg",
            lambda p: picture().rotate(90, expand=True).save(p, exif=exif, quality=95),
        ),
        "turned and large": (
            "jpg",
            lambda p: picture((1200, 800)).rotate(90, expand=True).save(p, exif=exif, quality=95),
        ),
        "transparent": (
            "png",
            lambda p: Image.merge(
                "RGBA", (*picture().split(), Image.linear_gradient("L").resize((60, 40)))
            ).save(p),
        ),
        "palette": ("png", lambda p: picture(mode="P").save(p)),
        "one pixel": ("png", lambda p: Image.new("RGB", (1, 1), "red").save(p)),
        "long": ("jpg", lambda p: picture((900, 3)).save(p)),
        "bomb": ("png", lambda p: p.write_bytes(png_of_size(30000, 30000))),
        "large bomb": ("png", lambda p: p.write_bytes(png_of_size(2**30, 2**30))),
        "cut": ("jpg", lambda p: p.write_bytes(save_bytes(picture((400, 300)))[:900])),
        "empty": ("jpg", lambda p: p.write_bytes(b"")),
        "text": ("jpg", lambda p: p.write_text("hello")),
    }[kind]
    file = path / f"{kind}.{write[0]}"
    write[1](file)
    return file


def save_bytes(image):
    out = io.BytesIO()
    image.save(out, "JPEG")
    return out.getvalue()


@pytest.mark.parametrize(
    "kind",
    [
        "50 megapixels",
        "cmyk",
        "grey",
        "16 bit",
        "animated",
        "turned",
        "turned and large",
        "transparent",
        "palette",
        "one pixel",
        "long",
    ],
)
def test_image_files_of_every_kind_come_in(kind, gallery, encoders, tmp_path):
    (tmp_path / "p").mkdir()
    file = saved(kind, tmp_path / "p")
    pixels, thumb = decode_photo(file.read_bytes(), SIDE)
    wanted = open_image(
        file
        if kind != "50 megapixels"
        else io.BytesIO(save_bytes(picture().resize((800, 625), Image.Resampling.NEAREST))),
        "photo",
        SIDE,
    ).float()
    small = Image.open(io.BytesIO(thumb))
    assert (
        pixels.shape == (3, SIDE, SIDE)
        and (pixels.float() - wanted).abs().mean() < 3
        and small.width == small.height <= 96
    )
    if "turned" in kind:
        assert (
            pixels.float()
            - torch.from_numpy(
                np.array(picture().crop((10, 0, 50, 40)).resize((SIDE, SIDE)))
            ).permute(2, 0, 1)
        ).abs().mean() < 8, "upright"
    new = index(tmp_path / "g", tmp_path / "p", encoders["photo"])
    assert len(new) == 1 and not new.broken
    torch.testing.assert_close(
        new.vectors, embed(encoders["photo"], pixels[None] / 255), atol=1e-5, rtol=0
    )
    hits = Searcher(new, encoders).by_photo(file, k=3)
    assert hits.indices.shape == (1, 1) and hits.scores[0, 0] > 0.98


@pytest.mark.parametrize(
    "kind, said",
    [
        ("bomb", "decompression bomb"),
        ("large bomb", "DecompressionBomb"),
        ("cut", "OSError"),
        ("empty", "UnidentifiedImageError"),
        ("text", "UnidentifiedImageError: cannot identify image file$"),
    ],
)
def test_broken_files_are_listed_and_the_rest_comes_in(kind, said, gallery, photos, encoders):
    file = saved(kind, photos)
    after = index(gallery.folder, photos, encoders["photo"])
    ((path, reason),) = after.broken
    assert path == file.name and re.search(said, reason), reason
    assert (
        after.items == gallery.items
        and torch.equal(after.vectors, gallery.vectors)
        and after.changes["broken"] == 1
    )
    with pytest.raises(ValueError, match=f"{file.name} cannot be read as an image: "):
        Searcher(after, encoders).by_photo(file)
    with pytest.raises(ValueError, match=f"{file.name} cannot be read as an image: "):
        Searcher(after, encoders).by_sketch(file)
    picture().save(file, "PNG")
    assert not index(gallery.folder, photos, encoders["photo"]).broken, (
        "a file that was mended comes in"
    )


def test_a_file_that_goes_away_meanwhile_is_listed(photos, encoders, tmp_path, monkeypatch):
    monkeypatch.setattr(
        Path,
        "read_bytes",
        lambda self, read=Path.read_bytes: (
            (_ for _ in ()).throw(FileNotFoundError(errno.ENOENT, "No such file or directory"))
            if self.name == "03.jpg"
            else read(self)
        ),
    )
    gallery = index(tmp_path / "g", photos, encoders["photo"])
    assert len(gallery) == COUNT - 1 and gallery.broken == [
        ("cup/03.jpg", "FileNotFoundError: No such file or directory")
    ]


# ---- strokes


def slow_canvas(stroke, n=1500):
    "Points of a stroke that lie on the canvas, by walking along it."
    points = np.concatenate([np.linspace(a, b, n) for a, b in zip(stroke, stroke[1:])])
    return points[((points >= 0) & (points <= 1)).all(1)]


@pytest.mark.parametrize("seed", range(6))
def test_strokes_are_cut_at_the_edge(seed):
    stroke = np.random.default_rng(seed).uniform(-0.6, 1.6, (9, 2))
    stroke[3] = stroke[2] + [0, 0.3]  # a vertical piece
    parts, walked = _on_canvas(stroke), slow_canvas(stroke)
    assert all(((p >= -1e-9) & (p <= 1 + 1e-9)).all() for p in parts)
    if not len(walked):
        assert not parts
        return
    cut = np.concatenate([slow_canvas(p.clip(0, 1)) for p in parts])
    for one, other in ((walked, cut), (cut, walked)):
        assert max(np.abs(other - p).sum(1).min() for p in one[::53]) < 5e-3
    inside = np.random.default_rng(seed).uniform(0, 1, (9, 2))
    (whole,) = _on_canvas(inside)
    np.testing.assert_allclose(whole, inside)


@pytest.mark.parametrize(
    "strokes, said",
    [
        ([], "no strokes"),
        ([[]], "no strokes"),
        ([[], np.zeros((0, 2))], "no strokes"),
        ([[(0.5, float("nan"))]], "not a finite number"),
        ([[(0.1, 0.1), (float("inf"), 0.5)]], "not a finite number"),
        ([[(1.5, 0.5)]], "no stroke touches the canvas"),
        ([[(2, 2), (3, 3)], [(-1, 0), (-0.1, 1)]], "found x and y from -1 to 3"),
        ([[(0.1, 0.2, 0.3)]], r"sequence of \(x, y\) points"),
        ([["ab"]], r"sequence of \(x, y\) points"),
        (5, r"sequence of \(x, y\) points"),
        ([5], r"sequence of \(x, y\) points"),
        (None, r"sequence of \(x, y\) points"),
    ],
)
def test_bad_strokes(strokes, said, gallery, encoders):
    with pytest.raises(ValueError, match=said):
        sketch_from_strokes(strokes, 32)
    with pytest.raises(ValueError, match=said):
        Searcher(gallery, encoders).by_strokes(strokes)


@pytest.mark.parametrize(
    "strokes",
    [
        [[(0.5, 0.5)]],
        [[(0, 0)]],
        [[(0.5, 0.5), (0.5, 0.5)]],
        [[(1e-9, 1)], []],
        [[(0.2, 0.5), (1.4, 0.5)]],
        [[(-9, 0.5), (9, 0.5)]],
        [np.array([[0.1, 0.1], [0.9, 0.9]])],
    ],
)
def test_scant_strokes_are_drawn(strokes, gallery, encoders):
    sketch = sketch_from_strokes(strokes, 32)
    assert sketch.shape == (1, 32, 32) and sketch.max() == 1 and sketch.min() < 0.8
    hits = Searcher(gallery, encoders).by_strokes(strokes, k=4)
    assert hits.scores.isfinite().all() and hits.indices.shape == (1, 4)


def test_by_strokes_is_by_sketch_of_the_drawing(gallery, encoders):
    strokes, searcher = (
        [[(0.2, 0.2), (0.8, 0.3)], [(0.5, 0.5), (0.4, 0.9), (0.1, 0.8)]],
        Searcher(gallery, encoders),
    )
    a, b = (
        searcher.by_strokes(strokes, 7, width=0.05),
        searcher.by_sketch(sketch_from_strokes(strokes, SIDE, 0.05), 7),
    )
    assert torch.equal(a.indices, b.indices) and torch.equal(a.scores, b.scores)


# ---- queries and answers


def test_search_by_label_is_a_filtered_ranking(gallery, encoders, toy):
    queries = embed(encoders["sketch"], toy[1])
    scores, order = rank_topk(queries, gallery.vectors, COUNT)
    for label in ("car", "tree"):
        hits = gallery.search(queries, 3, label)
        for q in range(len(queries)):
            assert hits.indices[q].tolist() == [
                i for i in order[q].tolist() if gallery.items[i].label == label
            ][:3] and {i.label for i in hits.items(q)} == {label}


def test_mistaken_searches(gallery, encoders, toy):
    searcher, sketch = Searcher(gallery, encoders), toy[1][0][0]
    assert searcher.by_sketch(sketch, k=10**6).indices.shape == (1, COUNT)
    assert len(set(searcher.by_sketch(sketch, k=50, label="car").indices[0].tolist())) == 3
    for act, said in (
        (lambda: searcher.by_sketch(sketch, k=0), "at least 1"),
        (lambda: searcher.by_sketch(sketch, label="unicorn"), "'unicorn'; there are bottle, car"),
        (lambda: searcher.by_sketch(torch.ones(1, 9, 9)), "blank"),
        (lambda: searcher.by_sketch(torch.rand(3, 9, 9)), r"a sketch is \(1,H,W\)"),
        (lambda: searcher.by_sketch(torch.rand(1, 9, 9) * 3), r"lie in \[0,1\]"),
        (lambda: searcher.by_sketch(torch.full((1, 9, 9), float("nan"))), r"lie in \[0,1\]"),
        (lambda: searcher.by_photo(torch.rand(1, 9, 9)), r"a photo is \(3,H,W\)"),
        (lambda: searcher.by_sketch(torch.zeros(0, 1, 9, 9)), "several; found"),
        (lambda: gallery.search(torch.rand(2, 5)), r"wants \(Q,12\)"),
        (lambda: gallery.search(torch.full((1, 12), float("nan"))), "NaN"),
    ):
        with pytest.raises(ValueError, match=said):
            act()
    with pytest.raises(FileNotFoundError, match="there is no sketch nowhere.png"):
        searcher.by_sketch("nowhere.png")


def test_a_query_may_be_a_file_a_picture_or_a_tensor(gallery, encoders, toy, tmp_path):
    searcher, x = Searcher(gallery, encoders), (toy[1].images() * 255).round() / 255
    image = Image.fromarray((x[3, 0] * 255).byte().numpy())
    image.save(tmp_path / "s.png")
    predict_log_probs = [
        searcher.by_sketch(q, 5)
        for q in (
            tmp_path / "s.png",
            str(tmp_path / "s.png"),
            image,
            image.convert("RGB"),
            image.convert("RGBA"),
            image.convert("CMYK"),
        )
    ]
    assert all(torch.equal(a.indices, predict_log_probs[0].indices) for a in predict_log_probs[1:])
    assert torch.equal(
        searcher.by_sketch((x[3] * 255).byte(), 5).indices, searcher.by_sketch(x[3], 5).indices
    )
    many = searcher.by_sketch(x[:4], 5)
    assert (
        len(many) == 4
        and torch.equal(many.indices[3:], searcher.by_sketch(x[3], 5).indices)
        and many.contact_sheet(2).size == many.contact_sheet(3).size
    )


def test_a_picture_is_read_like_its_file(gallery, encoders, tmp_path):
    "Whatever its mode: black ink on a transparent ground that is black as well, and modes that few formats know."
    searcher, ink = Searcher(gallery, encoders), Image.new("P", (60, 60), 1)
    ink.putpalette([0, 0, 0, 0, 0, 0] + [0] * 762)
    ink.paste(0, (10, 25, 50, 35))
    ink.save(tmp_path / "ink.png", transparency=1)
    with Image.open(tmp_path / "ink.png") as image:
        assert image.mode == "P" and torch.equal(
            searcher.by_sketch(image).indices, searcher.by_sketch(tmp_path / "ink.png").indices
        )
    colour = picture()
    for mode in ("HSV", "La", "RGBa"):
        try:
            odd = colour.convert(mode)
        except ValueError:
            odd = colour.convert(mode[:-1].upper() + "A").convert(mode)
        assert len(searcher.by_photo(odd))


def test_answers_as_json_and_as_a_sheet(gallery, encoders, toy):
    hits = Searcher(gallery, encoders).by_sketch(toy[1].images()[:2], 7)
    said = json.loads(hits.to_json())
    assert [[h["index"] for h in q] for q in said["queries"]] == hits.indices.tolist() and [
        h["rank"] for h in said["queries"][0]
    ] == list(range(1, 8))
    assert (
        said["encoder"] == gallery.encoder_id
        and Item(
            **{
                k: said["queries"][1][0][k]
                for k in ("path", "size", "checksum", "label", "modified")
            }
        )
        == hits.items(1)[0]
    )
    assert Path(said["photos"], said["queries"][0][0]["path"]).is_file()
    sheet = hits.contact_sheet(columns=4)
    first = np.asarray(sheet.crop((6 + 102, 6, 6 + 102 + 96, 6 + 96)))
    assert sheet.size == (4 * 102 + 6, 2 * 118 + 6) and np.array_equal(
        first, np.asarray(gallery.thumbnail(hits.indices[0, 0]))
    )
    assert (
        Image.open(io.BytesIO(hits._repr_jpeg_())).size == hits.contact_sheet().size
        and "24 photos" in gallery._repr_markdown_()
    )


def test_a_caption_that_is_too_wide_is_cut(gallery, encoders, toy):
    hits = Searcher(gallery, encoders).by_sketch(toy[1].images()[0], 12)
    for name in ("hot-air balloon", "wine_bottle", "a" * 300, "W" * 40):
        gallery.items = [dataclasses.replace(i, label=name) for i in gallery.items]
        assert hits.contact_sheet().size == hits.contact_sheet(0).size


# ---- approximate, Parquet


def test_an_approximate_index_says_what_it_finds(gallery, encoders, toy, photos):
    pytest.importorskip("faiss", reason="faiss is not installed (extra: search)")
    rng = torch.Generator().manual_seed(0)
    big = Gallery(gallery.folder)
    big.vectors, big.items = (
        torch.nn.functional.normalize(torch.randn(3000, 12, generator=rng), dim=1),
        gallery.items * 125,
    )
    queries = torch.nn.functional.normalize(torch.randn(100, 12, generator=rng), dim=1)
    exact = big.search(queries, 10)
    found = {}
    for recall in (0.5, 0.9, 1.0):
        said = big.add_index(recall, queries)
        hits = big.search(queries, 10, approximate=True)
        share = np.mean(
            [
                len(set(a) & set(b)) / 10
                for a, b in zip(hits.indices.tolist(), exact.indices.tolist())
            ]
        )
        assert (
            said["recall@10"] >= recall
            and share == pytest.approx(said["recall@10"], abs=1e-3)
            and said["queries"] == 100
        )
        assert (hits.scores.diff(dim=1) <= 0).all()
        found[recall] = said["looked into"]
    assert found[0.5] < found[0.9] <= found[1.0] and torch.equal(hits.indices, exact.indices)


def test_an_approximate_index_belongs_to_one_state(gallery, encoders, photos, toy):
    pytest.importorskip("faiss", reason="faiss is not installed (extra: search)")
    searcher, sketch = Searcher(gallery, encoders, approximate=True), toy[1][0][0]
    with pytest.raises(
        FileNotFoundError, match="has no approximate index: make one with add_index"
    ):
        searcher.by_sketch(sketch)
    gallery.add_index()
    exact = Searcher(gallery, encoders)
    assert torch.equal(
        searcher.by_sketch(sketch, COUNT).indices, exact.by_sketch(sketch, COUNT).indices
    )
    assert torch.equal(
        searcher.by_sketch(sketch, 2, "car").indices, exact.by_sketch(sketch, 2, "car").indices
    )
    assert torch.equal(
        Gallery(gallery.folder).search(gallery.vectors, 3, approximate=True).indices,
        gallery.search(gallery.vectors, 3).indices,
    )
    index(gallery.folder, photos, encoders["photo"])
    Gallery(gallery.folder).search(gallery.vectors[:1], approximate=True)  # nothing changed
    save(toy, COUNT, photos / "new.jpg")
    after = index(gallery.folder, photos, encoders["photo"])
    with pytest.raises(GalleryMismatch, match="of an earlier state"):
        after.search(gallery.vectors[:1], approximate=True)
    (gallery.folder / "index.safetensors").write_bytes(b"bad")
    with pytest.raises(GalleryMismatch, match="is damaged"):
        after.search(gallery.vectors[:1], approximate=True)
    for recall in (0, 1.1):
        with pytest.raises(ValueError, match="recall is"):
            gallery.add_index(recall)


def test_few_in_a_cell_are_completed_exactly():
    faiss = pytest.importorskip("faiss", reason="faiss is not installed (extra: search)")
    gallery, rng = Gallery.__new__(Gallery), torch.Generator().manual_seed(0)
    gallery.vectors = torch.randn(100, 4, generator=rng)
    gallery._index = faiss.IndexIVFFlat(faiss.IndexFlatIP(4), 4, 50, faiss.METRIC_INNER_PRODUCT)
    gallery._index.train(gallery.vectors.numpy())
    gallery._index.add(gallery.vectors.numpy())
    gallery.folder = Path(os.devnull).parent
    found = dfsbir.search.gallery.Path.is_file
    try:
        dfsbir.search.gallery.Path.is_file = lambda self: True
        scores, places = gallery._approximately(gallery.vectors[:5], 30)
    finally:
        dfsbir.search.gallery.Path.is_file = found
    assert torch.equal(places, nearest(gallery.vectors[:5], gallery.vectors, 30)[1])


def test_parquet(gallery, photos, toy, encoders, tmp_path):
    parquet = pytest.importorskip(
        "pyarrow.parquet", reason="pyarrow is not installed (extra: search)"
    )
    save(toy, COUNT, photos / "top.jpg")
    gallery = index(gallery.folder, photos, encoders["photo"])
    gallery.to_parquet(tmp_path / "g.parquet")
    table = parquet.read_table(tmp_path / "g.parquet")
    assert np.array_equal(np.stack(table["vector"].to_numpy()), gallery.vectors.numpy())
    for k in ("path", "label", "size", "checksum"):
        assert table[k].to_pylist() == [getattr(i, k) for i in gallery.items]
    assert table["label"].to_pylist().count(None) == 1 and table.schema.metadata == {
        b"dfsbir.format": b"dfsbir-gallery-1",
        b"dfsbir.encoder": gallery.encoder_id.encode(),
    }


@pytest.mark.parametrize(
    "module, extra, act",
    [
        ("faiss", "search", lambda g, p, e: g.add_index()),
        ("pyarrow", "search", lambda g, p, e: g.to_parquet(g.folder / "x.parquet")),
        ("ray", "ray", lambda g, p, e: index(g.folder.parent / "other", p, e, ray="local")),
    ],
)
def test_a_missing_extra_is_named(module, extra, act, gallery, photos, encoders, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"dfsbir\[{extra}\]"):
        act(gallery, photos, encoders["photo"])


# ---- a cluster


def test_embedding_on_ray(gallery, photos, toy, encoders, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray", reason="ray is not installed (extra: ray)")
    pytest.importorskip("ray.data", reason="ray.data is not installed (extra: ray)")
    (photos / "bad.jpg").write_text("hello")
    shutil.copytree(gallery.folder, tmp_path / "other")
    for i in range(6):
        save(toy, COUNT + i, photos / "new" / f"{i}.jpg")
    (photos / "car" / "01.jpg").rename(photos / "renamed.jpg")
    monkeypatch.setenv(
        "RAY_worker_niceness", "0"
    )  # Ray's workers step back behind everything else, which takes minutes on a busy machine
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        clustered = index(tmp_path / "other", photos, encoders["photo"], ray="auto", batch_size=3)
    finally:
        ray.shutdown()
    here = index(gallery.folder, photos, encoders["photo"])
    assert clustered.items == here.items and clustered.broken == here.broken == [
        ("bad.jpg", "UnidentifiedImageError: cannot identify image file")
    ]
    assert clustered.changes == here.changes == dict(embedded=6, known=COUNT, gone=0, broken=1)
    assert [clustered.thumbnail(i).tobytes() for i in range(COUNT + 6)] == [
        here.thumbnail(i).tobytes() for i in range(COUNT + 6)
    ]
    torch.testing.assert_close(clustered.vectors, here.vectors, atol=1e-5, rtol=0)
