"""The gallery: what it holds, moved folders, the encoder that it belongs to, labels, Parquet."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from search.helpers import COUNT, SIDE, Wrapped, content, index, make_encoders, save

from dfsbir.data.folders import read_folder
from dfsbir.evaluation.retrieval import embed, rank_topk
from dfsbir.search.gallery import Gallery, encoder_id, write_parquet
from dfsbir.search.gallery_file import FORMAT, GalleryMismatch, Item, write_rows
from dfsbir.search.searcher import Searcher
from dfsbir.students.encoder import HeadSpec, load_encoders, save_encoders


def test_a_gallery_holds_what_embed_gives(gallery, photos, encoders):
    data = read_folder(photos, "photo", SIDE)
    torch.testing.assert_close(gallery.vectors, embed(encoders["photo"], data), atol=1e-5, rtol=0)
    assert gallery.classes == data.classes and len(gallery) == COUNT
    assert gallery.labels.tolist() == data.labels.tolist()
    files = [str(gallery.file(i)) for i in range(COUNT)]
    assert files == [str(Path(p).resolve()) for p in data.paths]
    assert gallery.encoder_id == encoder_id(encoders["photo"]) and not gallery.broken
    first = gallery.items[0]
    assert first.size == gallery.file(0).stat().st_size and len(first.checksum) == 64
    assert first.label == first.path.split("/")[0]
    assert gallery.thumbnail(0).size == (96, 96) and gallery.thumbnail(0, 30).size == (30, 30)


def test_a_gallery_of_an_image_set(toy, encoders, tmp_path):
    data = toy[0].take(slice(12))
    gallery = index(tmp_path / "gallery", data, encoders["photo"])
    torch.testing.assert_close(gallery.vectors, embed(encoders["photo"], data), atol=1e-5, rtol=0)
    assert gallery.classes == sorted({data.classes[c] for c in data.labels})
    assert gallery.thumbnail(3).size == (96, 96) and gallery.root is None
    with pytest.raises(FileNotFoundError):
        gallery.file(0)
    again = Wrapped(encoders["photo"])
    changes = index(tmp_path / "gallery", toy[0].take(slice(14)), again).changes
    assert changes.items() >= dict(embedded=2, known=12, gone=0, broken=0).items()
    assert again.embedded == 2


def test_moved_with_its_photos_or_without(gallery, photos, encoders, tmp_path):
    (tmp_path / "new").mkdir()
    for folder in (photos, gallery.folder):
        shutil.move(folder, tmp_path / "new" / folder.name)
    moved = Gallery(tmp_path / "new" / "gallery")
    assert moved.file(3) == (tmp_path / "new" / "photos" / moved.items[3].path).resolve()
    shutil.move(moved.folder, tmp_path / "alone")
    alone = Gallery(tmp_path / "alone")
    assert alone.thumbnail(3).tobytes() == gallery.thumbnail(3).tobytes()
    assert len(Searcher(alone, encoders).by_strokes([[(0, 0), (1, 1)]]).items()) == 10
    with pytest.raises(FileNotFoundError, match="photos"):
        alone.file(3)
    encoder = Wrapped(encoders["photo"])
    again = index(alone.folder, tmp_path / "new" / "photos", encoder)
    assert again.file(3).is_file() and encoder.embedded == 0


def test_photos_that_were_moved_alone_are_found_by_their_new_root(gallery, photos, tmp_path):
    moved = photos.rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="root"):
        gallery.file(3)
    again = Gallery(gallery.folder, root=moved)
    assert again.file(3) == (moved / again.items[3].path).resolve()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Gallery(gallery.folder, root=tmp_path / "nowhere")


def test_a_generated_gallery_is_written_in_pieces_and_searched(tmp_path):
    "Vectors that never are in memory together: the same hits as of the whole matrix."
    pytest.importorskip("faiss", reason="faiss is not installed (extra: search)")
    count = 20_000
    generator = torch.Generator().manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(count, 16, generator=generator), dim=1)
    items = (Item(f"{n % 7}/{n}.jpg", n, f"{n:064x}", str(n % 7)) for n in range(count))
    write_rows(
        tmp_path / "gallery.safetensors",
        items,
        vectors.split(777),
        (b"%d" % n for n in range(count)),
        encoder="none",
        broken=[],
        roots=[],
    )
    gallery, queries = Gallery(tmp_path), vectors[:50]
    assert len(gallery) == count and gallery.items[-1].path == f"{(count - 1) % 7}/{count - 1}.jpg"
    assert gallery.classes == [str(n) for n in range(7)]
    scores, places = rank_topk(queries, vectors, 10)
    hits = gallery.search(queries, 10)
    assert torch.equal(hits.indices, places)
    torch.testing.assert_close(hits.scores, scores)
    for kind in ("ivf", "hnsw"):
        summary = gallery.add_index(0.9, queries, kind)
        again = Gallery(tmp_path).search(queries, 10, approximate=True)
        found = (again.scores >= hits.scores[:, -1:] - 1e-5).double().mean().item()
        assert summary["recall@10"] >= 0.9 and found >= 0.89


# ---- whose gallery it is


def test_another_encoder_is_refused(gallery, photos, encoders):
    before, other = content(gallery.folder), make_encoders(seed=1)
    with pytest.raises(GalleryMismatch, match=encoder_id(other["photo"])[:12]):
        index(gallery.folder, photos, other["photo"])
    with pytest.raises(GalleryMismatch, match=encoder_id(other["photo"])[:12]):
        Searcher(gallery, other)
    assert content(gallery.folder) == before
    with pytest.raises(ValueError, match="sketch"):
        index(gallery.folder, photos, encoders["sketch"])
    alien = make_encoders()["sketch"]
    alien.head.proxies.mul_(-1)
    with pytest.raises(GalleryMismatch, match="one space"):
        Searcher(gallery, {"photo": encoders["photo"], "sketch": alien})


def test_an_encoders_id_is_its_weights_and_input(encoders, tmp_path):
    save_encoders(tmp_path, encoders, run="another name")
    ours = encoder_id(encoders["photo"])
    assert encoder_id(load_encoders(tmp_path)["photo"]) == ours
    same = make_encoders()["photo"]
    assert encoder_id(same) == ours
    others = {
        encoder_id(make_encoders(**o)["photo"])
        for o in ({"flip_tta": True}, {"head": HeadSpec(temperature=2.0)})
    }
    assert len(others | {ours}) == 3
    next(same.parameters()).data[0] += 1e-6
    assert encoder_id(same) != ours


# ---- search


def test_search_by_label_is_a_filtered_ranking(gallery, encoders, toy):
    queries = embed(encoders["sketch"], toy[1])
    _, order = rank_topk(queries, gallery.vectors, COUNT)
    for label in ("car", "tree"):
        hits = gallery.search(queries, 3, label)
        for q in range(len(queries)):
            of_label = [i for i in order[q].tolist() if gallery.items[i].label == label]
            assert hits.indices[q].tolist() == of_label[:3]
            assert {i.label for i in hits.items(q)} == {label}


def test_mistaken_searches(gallery):
    for vectors, fact in (
        (torch.rand(2, 5), r"\(2, 5\)"),
        (torch.rand(12), r"\(12,\)"),
        (torch.full((1, 12), float("nan")), "NaN"),
    ):
        with pytest.raises(ValueError, match=fact):
            gallery.search(vectors)
    with pytest.raises(ValueError, match="0"):
        gallery.search(gallery.vectors[:1], k=0)
    with pytest.raises(ValueError, match="unicorn.*bottle"):
        gallery.search(gallery.vectors[:1], label="unicorn")


def test_it_is_shown_as_a_table(gallery):
    text = gallery._repr_markdown_()
    assert f"{COUNT} photos" in text and all(name in text for name in gallery.classes)


# ---- an approximate index


def test_an_approximate_index_belongs_to_one_state(gallery, encoders, photos, toy):
    pytest.importorskip("faiss", reason="faiss is not installed (extra: search)")
    searcher, sketch = Searcher(gallery, encoders, approximate=True), toy[1][0][0]
    with pytest.raises(FileNotFoundError, match="add_index"):
        searcher.by_sketch(sketch)
    for kind in ("ivf", "hnsw"):
        gallery.add_index(kind=kind)
        exact = Searcher(gallery, encoders)
        for k, label in ((COUNT, None), (2, "car")):
            found = searcher.by_sketch(sketch, k, label).indices
            assert torch.equal(found, exact.by_sketch(sketch, k, label).indices)
        again = Gallery(gallery.folder).search(gallery.vectors, 3, approximate=True)
        assert torch.equal(again.indices, gallery.search(gallery.vectors, 3).indices)
    index(gallery.folder, photos, encoders["photo"])
    Gallery(gallery.folder).search(gallery.vectors[:1], approximate=True)  # nothing changed
    save(toy, COUNT, photos / "new.jpg")
    after = index(gallery.folder, photos, encoders["photo"])
    with pytest.raises(GalleryMismatch, match="earlier"):
        after.search(gallery.vectors[:1], approximate=True)
    (gallery.folder / "index.safetensors").write_bytes(b"bad")
    with pytest.raises(GalleryMismatch, match="damaged"):
        after.search(gallery.vectors[:1], approximate=True)


# ---- Parquet


def test_parquet(gallery, photos, toy, encoders, tmp_path):
    parquet = pytest.importorskip(
        "pyarrow.parquet", reason="pyarrow is not installed (extra: search)"
    )
    save(toy, COUNT, photos / "top.jpg")
    gallery = index(gallery.folder, photos, encoders["photo"])
    write_parquet(gallery, tmp_path / "g.parquet")
    table = parquet.read_table(tmp_path / "g.parquet")
    assert np.array_equal(np.stack(table["vector"].to_numpy()), gallery.vectors.numpy())
    for name in ("path", "label", "size", "checksum"):
        assert table[name].to_pylist() == [getattr(i, name) for i in gallery.items]
    assert table["label"].to_pylist().count(None) == 1
    assert table.schema.metadata == {
        b"dfsbir.format": FORMAT.encode(),
        b"dfsbir.encoder": gallery.encoder_id.encode(),
    }


def test_a_name_that_is_no_text(toy, encoders, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    name = os.fsdecode(b"caf\xe9.jpg")
    save(toy, 0, tmp_path / "photos" / name)
    made = index(tmp_path / "gallery", tmp_path / "photos", encoders["photo"])
    assert made.items[0].path == name and made.file(0).is_file()
    write_parquet(made, tmp_path / "g.parquet")
    assert parquet.read_table(tmp_path / "g.parquet")["path"].to_pylist() == ["caf\\udce9.jpg"]
