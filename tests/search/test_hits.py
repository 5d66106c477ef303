"""What a search gives: JSON for programs, contact sheets for people."""

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dfsbir.search.gallery_file import Item
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
