"""Sketchy and TU-Berlin in their published layouts."""

import pytest

from dfsbir.data.benchmarks import read_sketchy, read_tuberlin
from dfsbir.data.image_files import BrokenImage
from dfsbir.data.manifest import Manifest, ManifestMismatch

TX = "tx_000000000000"


def make_sketchy(root, picture):
    "Two photos, two drawings each."
    for name, stem in (("airplane", "n02691156_58"), ("zebra", "n02391049_7")):
        picture(root / "photo" / TX / name / f"{stem}.jpg")
        for k in (1, 2):
            picture(root / "sketch" / TX / name / f"{stem}-{k}.png", 255, "L")
    return root


@pytest.mark.parametrize("inside", ("", "256x256", "rendered_256x256/256x256"))
def test_sketchy(tmp_path, picture, inside):
    make_sketchy(tmp_path / inside, picture)
    photos, sketches = read_sketchy(tmp_path, 16)
    assert photos.classes == sketches.classes == ["airplane", "zebra"]
    assert photos.instances.tolist() == [0, 1] and sketches.instances.tolist() == [0, 0, 1, 1]
    assert photos.labels.tolist() == [0, 1] and sketches.labels.tolist() == [0, 0, 1, 1]


def test_sketchy_with_a_manifest(tmp_path, picture):
    make_sketchy(tmp_path, picture)
    manifest = Manifest.scan(
        tmp_path, "sketchy", lambda path: "unseen" if "zebra" in path else "seen"
    )
    photos, sketches = read_sketchy(tmp_path, 16, manifest, "unseen")
    assert len(photos) == 1 and photos.instances.tolist() == [1]
    assert sketches.instances.tolist() == [1, 1]
    assert sketches.classes == ["airplane", "zebra"], "the classes of all splits"
    with pytest.raises(ValueError, match="'seen'"):
        read_sketchy(tmp_path, 16, split="seen")


def test_a_drawing_without_its_photo(tmp_path, picture):
    make_sketchy(tmp_path, picture)
    manifest = Manifest.scan(tmp_path, split_of=lambda path: "seen")
    stray = picture(tmp_path / "sketch" / TX / "zebra" / "n1_1-1.png")
    with pytest.raises(ManifestMismatch) as mismatch:
        read_sketchy(tmp_path, 16, manifest, "seen")
    assert mismatch.value.extra == [f"sketch/{TX}/zebra/n1_1-1.png"]
    with pytest.raises(BrokenImage) as e:
        read_sketchy(tmp_path, 16)
    assert e.value.path == str(stray)
    with pytest.warns(UserWarning, match="broken"):
        _, sketches = read_sketchy(tmp_path, 16, on_error="skip")
    assert sketches.broken[0][0] == str(stray) and len(sketches) == 4


def test_what_is_not_sketchy_is_refused(tmp_path, picture):
    make_sketchy(tmp_path, picture)
    with pytest.raises(FileNotFoundError, match="Sketchy"):
        read_sketchy(tmp_path / "photo", 16)


def test_tuberlin(tmp_path, picture):
    for name, k in (("airplane", 1), ("airplane", 2), ("alarm clock", 81)):
        picture(tmp_path / "png" / name / f"{k}.png", 255, "L")
    listed = "airplane/1.png\nairplane/2.png\nalarm clock/81.png\n"
    (tmp_path / "png" / "filelist.txt").write_text(listed)
    assert read_tuberlin(tmp_path, 16).classes == ["airplane", "alarm clock"]
    assert len(read_tuberlin(tmp_path / "png", 16)) == 3
    manifest = Manifest.scan(
        tmp_path, split_of=lambda path: "test" if path.endswith("2.png") else "train"
    )
    assert read_tuberlin(tmp_path, 16, manifest, "test").labels.tolist() == [0]
    (tmp_path / "png" / "airplane" / "2.png").rename(tmp_path / "png" / "airplane" / "3.png")
    with pytest.raises(ManifestMismatch) as e:
        read_tuberlin(tmp_path, 16)
    assert e.value.missing == ["airplane/2.png"] and e.value.extra == ["airplane/3.png"]
    with pytest.raises(FileNotFoundError, match="TU-Berlin"):
        read_tuberlin(tmp_path / "png" / "airplane", 16)
