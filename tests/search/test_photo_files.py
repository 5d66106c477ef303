"""Photo files: they come in as open_image reads them, or are listed as broken with a reason."""

import io
import re

import numpy as np
import pytest
import torch
from PIL import Image
from search.helpers import (
    BAD_FILES,
    GOOD_FILES,
    SIDE,
    index,
    jpeg,
    picture,
    write_file,
)

from dfsbir.data.image_files import BrokenImage, open_image
from dfsbir.evaluation.retrieval import embed
from dfsbir.search.photo_files import decode_photo, failure_reason
from dfsbir.search.searcher import Searcher


@pytest.mark.parametrize("kind", GOOD_FILES)
def test_image_files_of_every_kind_come_in(kind, encoders, tmp_path):
    (tmp_path / "p").mkdir()
    file = write_file(kind, tmp_path / "p")
    pixels, thumbnail = decode_photo(file.read_bytes(), SIDE)
    if kind == "50 megapixels":  # the same picture, smaller: open_image would need a minute
        small = picture().resize((800, 625), Image.Resampling.NEAREST)
        wanted = open_image(io.BytesIO(jpeg(small)), "photo", SIDE).float()
    else:
        wanted = open_image(file, "photo", SIDE).float()
    assert pixels.shape == (3, SIDE, SIDE) and (pixels.float() - wanted).abs().mean() < 3
    shown = Image.open(io.BytesIO(thumbnail))
    assert shown.width == shown.height <= 96
    if "turned" in kind:
        upright = np.array(picture().crop((10, 0, 50, 40)).resize((SIDE, SIDE)))
        difference = pixels.float() - torch.from_numpy(upright).permute(2, 0, 1)
        assert difference.abs().mean() < 8
    gallery = index(tmp_path / "g", tmp_path / "p", encoders["photo"])
    assert len(gallery) == 1 and not gallery.broken
    vectors = embed(encoders["photo"], pixels[None] / 255)
    torch.testing.assert_close(gallery.vectors, vectors, atol=1e-5, rtol=0)
    hits = Searcher(gallery, encoders).by_photo(file, k=3)
    assert hits.indices.shape == (1, 1) and hits.scores[0, 0] > 0.98


@pytest.mark.parametrize("kind", BAD_FILES)
def test_broken_files_are_listed_and_the_rest_comes_in(kind, gallery, photos, encoders):
    file = write_file(kind, photos)
    after = index(gallery.folder, photos, encoders["photo"])
    ((path, reason),) = after.broken
    assert path == file.name and after.changes["broken"] == 1
    assert after.items == gallery.items and torch.equal(after.vectors, gallery.vectors)
    with pytest.raises(BrokenImage) as error:
        decode_photo(file.read_bytes(), SIDE)
    assert failure_reason(error.value) == reason and not re.search("<|0x", reason)
    for search in (Searcher(after, encoders).by_photo, Searcher(after, encoders).by_sketch):
        with pytest.raises(ValueError, match=file.name):
            search(file)
    picture().save(file, "PNG")
    mended = index(gallery.folder, photos, encoders["photo"])
    assert not mended.broken and len(mended) == len(gallery) + 1
