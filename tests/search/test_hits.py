"""What a search gives: JSON for programs, sheets for people, ties and odd names told."""

import dataclasses
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from search.helpers import index

from dfsbir.search.gallery_file import Item
from dfsbir.search.hits import printable
from dfsbir.search.searcher import Searcher


@pytest.fixture
def hits(gallery, encoders, toy):
    "Seven hits of each of two sketches."
    return Searcher(gallery, encoders).by_sketch(toy[1].images()[:2], 7)


def test_hits_as_json(hits, gallery):
    content = json.loads(hits.to_json())
    places = [[hit["index"] for hit in hits_of_query] for hits_of_query in content["queries"]]
    assert places == hits.indices.tolist() and content["encoder"] == gallery.encoder_id
    first = content["queries"][0]
    assert [hit["rank"] for hit in first] == list(range(1, 8))
    names = [field.name for field in dataclasses.fields(Item)]
    assert Item(**{name: first[0][name] for name in names}) == hits.items()[0]
    assert Path(content["photos"], first[0]["path"]).is_file()


def test_hits_as_a_contact_sheet(hits, gallery):
    sheet = hits.contact_sheet(columns=4)
    first = np.asarray(sheet.crop((6 + 102, 6, 6 + 102 + 96, 6 + 96)))
    assert sheet.size == (4 * 102 + 6, 2 * 118 + 6)
    assert np.array_equal(first, np.asarray(gallery.thumbnail(hits.indices[0, 0])))
    shown = Image.open(io.BytesIO(hits._repr_jpeg_()))
    assert shown.size == hits.contact_sheet().size


@pytest.mark.parametrize("name", ["hot-air balloon", "wine_bottle", "a" * 300, "W" * 40])
def test_a_caption_that_is_too_wide_is_cut(hits, gallery, name):
    size = hits.contact_sheet().size
    gallery.items = [dataclasses.replace(item, label=name) for item in gallery.items]
    assert hits.contact_sheet().size == size


# ---- ties


def test_a_collapsed_encoder_is_a_tie_of_all(gallery):
    "One vector for every photo: every rank is tied, and what is not shown is counted too."
    gallery.vectors = torch.ones_like(gallery.vectors)
    for k in (1, 5, len(gallery)):
        hits = gallery.search(torch.ones(2, gallery.vectors.shape[1]), k)
        assert hits.tied(1) == list(range(1, k + 1)) and "order" in hits.tie(1)
        assert json.loads(hits.to_json())["tied_ranks"] == [list(range(1, k + 1))] * 2


def test_only_tied_ranks_are_named(gallery):
    gallery.vectors = torch.eye(gallery.vectors.shape[1]).repeat(2, 1)
    query = torch.arange(12, 0, -1.0)[None]
    assert gallery.search(query, 3).tied() == [1, 2, 3]
    gallery.vectors = gallery.vectors[:12]
    hits = gallery.search(query, 5)
    assert hits.tied() == [] and hits.tie() == ""
    query[0, 4] = query[0, 5] = query[0, 3]
    assert gallery.search(query, 4).tied() == [4], "tied with photos that are not shown"
    assert gallery.search(query, 9).tied() == [4, 5, 6]


def test_copies_of_a_photo_are_no_tie(gallery, photos, encoders):
    for name in ("y.jpg", "z.jpg"):
        shutil.copy(photos / "car" / "01.jpg", photos / name)
    after = index(gallery.folder, photos, encoders["photo"])
    hits = Searcher(after, encoders).by_photo(photos / "z.jpg", k=8)
    assert len(hits.scores[0, :3].unique()) == 1 and hits.tied() == []


# ---- names


@pytest.mark.parametrize(
    "name, shown",
    [
        ("plain.jpg", "plain.jpg"),
        ("Käse 猫.jpg", "Käse 猫.jpg"),
        ("a\nb.jpg", "a\\nb.jpg"),
        ("red\x1b[31m.jpg", "red\\x1b[31m.jpg"),
        ("caf\udce9.jpg", "caf\\udce9.jpg"),
        ("right\u202eleft.jpg", "right\\u202eleft.jpg"),
        ("", ""),
    ],
)
def test_names_are_shown_without_codes(name, shown):
    assert printable(name) == shown and printable(name).isprintable()


def test_odd_names_on_sheets_and_in_json(hits, gallery):
    name = "caf\udce9\n\x1b[31m"
    gallery.items = [dataclasses.replace(i, path=name, label=name) for i in gallery.items]
    assert hits.contact_sheet().width > 96
    assert json.loads(hits.to_json())["queries"][0][0]["path"] == name
    hits.to_json().encode("ascii")
