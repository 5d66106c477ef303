"""Manifests: what differs, what was edited, what is in two splits."""

import os
import pickle

import pytest

from dfsbir.data.manifest import Manifest, ManifestMismatch, hashed_split


def test_round_trip_and_mismatches(class_folders, picture, tmp_path_factory):
    file = tmp_path_factory.mktemp("m") / "manifest.json"
    written = Manifest.scan(class_folders, "pets", hashed_split(0.5))
    written.write(file)
    read = Manifest.read(file).check(class_folders)
    assert read == written and read.sha256 == written.sha256
    assert sum(sum(count.values()) for count in read.counts.values()) == 6
    (class_folders / "cat" / "0.png").unlink()
    picture(class_folders / "ant" / "new.png")
    picture(class_folders / "ant" / "1.png", 7)
    with pytest.raises(ManifestMismatch) as e:
        read.check(class_folders)
    for found in (e.value, pickle.loads(pickle.dumps(e.value))):
        assert found.missing == ["cat/0.png"]
        assert found.extra == ["ant/new.png"]
        assert found.changed == ["ant/1.png"]
    for line in ("missing: cat/0.png", "extra: ant/new.png", "changed: ant/1.png"):
        assert line in str(e.value)


def test_a_long_list_of_differences_is_cut_in_the_message_alone():
    e = ManifestMismatch("root", missing=[f"{i}.png" for i in range(100)])
    assert len(e.missing) == 100 and str(e).count("\n") == 41 and "60 more" in str(e)


def test_a_manifest_that_was_cut_or_edited(class_folders, tmp_path_factory):
    file = tmp_path_factory.mktemp("m") / "manifest.json"
    Manifest.scan(class_folders).write(file)
    text = file.read_text()
    for wrong, says in (
        (text[:-20], "manifest.json"),
        ("[]", "manifest.json"),
        (text.replace("ant/0.png", "ant/7.png"), "changed after"),
        (text.replace("manifest-1", "manifest-9"), "manifest-9"),
    ):
        file.write_text(wrong)
        with pytest.raises(ValueError, match=says):
            Manifest.read(file)


def test_splits_and_leaks(tmp_path, picture):
    for where, value in (
        ("train/cat/1", 1),
        ("train/cat/2", 2),
        ("test/cat/1", 3),
        ("test/cat/2", 2),
    ):
        picture(tmp_path / f"{where}.png", value)
    manifest = Manifest.scan(tmp_path)
    assert manifest.splits == ["test", "train"]
    assert manifest.counts == {"test": {"test/cat": 2}, "train": {"train/cat": 2}}
    assert manifest.leaks() == [("test/cat/2.png", "train/cat/2.png")]
    assert manifest.paths("test") == ["test/cat/1.png", "test/cat/2.png"]
    with pytest.raises(ValueError, match="'dev'"):
        manifest.paths("dev")


def test_an_empty_folder_has_no_manifest(tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        Manifest.scan(tmp_path)


def test_a_hashed_split_has_the_share_asked_for():
    split_of = hashed_split(0.3)
    share = sum(split_of(f"{k}.png") == "test" for k in range(2000)) / 2000
    assert abs(share - 0.3) < 0.03
    with pytest.raises(ValueError, match="1.5"):
        hashed_split(1.5)


def test_a_hashed_split_of_names_that_are_no_text():
    assert hashed_split(0.5)(os.fsdecode(b"caf\xe9.png")) in ("train", "test")
