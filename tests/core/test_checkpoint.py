"Files that are whole or absent, states in files, and foreign checkpoints."

import argparse
import os
import stat
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dfsbir.core.checkpoint import (
    UnsafeCheckpoint,
    load_state,
    load_weights,
    read_card,
    require_writable,
    save_state,
    shared_prefix,
    write_atomic,
)

CARD = {"classes": ["car", "cat"], "seed": 3}


def state():
    return {
        "weights": {"b": torch.arange(3.0), "a": torch.ones(2, 2)},
        "step": 7,
        "names": ["x", None, True],
        "pair": (1, 2.5),
    }


# ---- atomic writes


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    file = tmp_path / "new folder" / "a.txt"
    with write_atomic(file) as temporary:
        temporary.write_text("old")
    with pytest.raises(ZeroDivisionError), write_atomic(file) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert file.read_text() == "old"
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no file modes")
def test_a_written_file_has_the_usual_permissions(tmp_path):
    "Others may read it as far as the user's umask lets them, unlike a file of tempfile's."
    with write_atomic(tmp_path / "a.txt") as temporary:
        temporary.write_text("a")
    (tmp_path / "b.txt").write_text("b")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a.txt", "b.txt")}
    assert len(modes) == 1


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        require_writable(tmp_path / "file")
    with pytest.raises(OSError, match="1000000000000 MB"):
        require_writable(tmp_path, need_bytes=10**18)
    assert require_writable(tmp_path / "new").is_dir()


# ---- states in files


def test_equal_states_are_equal_files(tmp_path):
    "The same bytes every time, so that a checksum tells whether weights have changed."
    files = [tmp_path / f"{i}.safetensors" for i in range(12)]
    for file in files:
        save_state(file, state(), CARD)
    assert len({file.read_bytes() for file in files}) == 1


def test_a_state_comes_back_as_it_was(tmp_path):
    file = tmp_path / "s.safetensors"
    save_state(file, state(), CARD)
    found = load_state(file)
    assert torch.equal(found["weights"].pop("b"), torch.arange(3.0))
    assert torch.equal(found["weights"].pop("a"), torch.ones(2, 2))
    assert found == {"weights": {}, "step": 7, "names": ["x", None, True], "pair": (1, 2.5)}
    assert read_card(file) == CARD


def test_keys_that_look_like_paths(tmp_path):
    file = tmp_path / "s.safetensors"
    save_state(file, {"a.b": torch.zeros(2), "a": {"b": torch.ones(2)}})
    found = load_state(file)
    assert torch.equal(found["a.b"], torch.zeros(2))
    assert torch.equal(found["a"]["b"], torch.ones(2))


def test_a_state_of_something_else_names_where_it_is(tmp_path):
    with pytest.raises(TypeError, match=r"a\.1"):
        save_state(tmp_path / "s.safetensors", {"a": [1, object()]})
    assert not list(tmp_path.iterdir())


def test_a_loaded_state_does_not_follow_the_file(tmp_path):
    "Tensors are copies: writing the file anew, in place too, does not change them."
    file = tmp_path / "s.safetensors"
    save_state(file, {"a": torch.zeros(1000)})
    found = load_state(file)
    data = file.read_bytes()
    file.write_bytes(data[:-4000] + b"\x01" * 4000)
    assert torch.equal(found["a"], torch.zeros(1000))


def test_another_programs_file_has_no_card_and_no_state(tmp_path):
    file = tmp_path / "plain.safetensors"
    save_file({"a": torch.ones(2)}, file, {"format": "pt"})
    assert read_card(file) == {}
    with pytest.raises(UnsafeCheckpoint, match="load_weights"):
        load_state(file)
    assert set(load_weights(file)) == {"a"}


@pytest.mark.parametrize("read", [read_card, load_state, load_weights])
def test_a_damaged_or_absent_file_is_named(tmp_path, read):
    with pytest.raises(FileNotFoundError, match="gone"):
        read(tmp_path / "gone.safetensors")
    save_state(tmp_path / "cut.safetensors", state())
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "cut.safetensors").read_bytes()[:-5])
    with pytest.raises(UnsafeCheckpoint, match="cut"):
        read(tmp_path / "cut.safetensors")


# ---- other people's checkpoints

WEIGHTS = {"conv.weight": torch.ones(2), "fc.bias": torch.zeros(3)}


def wrapped(prefix):
    return {prefix + name: value for name, value in WEIGHTS.items()}


FOREIGN = {
    "flat": WEIGHTS,
    "torchvision": {
        "model": WEIGHTS,
        "optimizer": {"state": {}},
        "args": argparse.Namespace(lr=0.1, device=torch.device("cpu"), output=Path("x")),
        "epoch": 3,
    },
    "timm": {
        "state_dict": wrapped("module."),
        "metric": np.float64(0.8),
        "best": [np.float32(1), np.int64(2), np.bool_(True)],
        "history": np.arange(3),
        "args": argparse.Namespace(drop=np.float64(0.1)),
    },
    "average alone": {"ema_state_dict": wrapped("module."), "epoch": 1},
    "torchvision's average": {"model_ema": {**wrapped("module."), "n_averaged": torch.tensor(5)}},
    "compiled and parallel": wrapped("_orig_mod.module."),
    "parallel and compiled": wrapped("module._orig_mod."),
    "an attribute of any name": {"state_dict": wrapped("my_net.backbone.")},
    "lightning with class weights": {
        "state_dict": {**wrapped("model."), "criterion.weight": torch.ones(3)},
        "hyper_parameters": {"lr": 0.1},
    },
    "a loss with weights": {**wrapped("net."), "loss_fn.centers": torch.ones(3, 3)},
    "ordered": {"state_dict": OrderedDict(WEIGHTS)},
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_weights_are_found_where_people_put_them(tmp_path, kind):
    torch.save(FOREIGN[kind], tmp_path / "w.pth")
    found = load_weights(tmp_path / "w.pth")
    assert set(found) == set(WEIGHTS)
    assert all(torch.equal(found[name], WEIGHTS[name]) for name in WEIGHTS)


def test_weights_of_a_state_of_ours(tmp_path):
    save_state(tmp_path / "s.safetensors", {"model": WEIGHTS, "step": 3})
    assert set(load_weights(tmp_path / "s.safetensors")) == set(WEIGHTS)


@pytest.mark.parametrize(
    "names, prefix",
    [
        (["a.b.c", "a.b.d"], "a.b."),
        (["a.b.c", "a.d"], "a."),
        (["a.b", "c.d"], ""),
        (["ab.c", "a.c"], ""),
        (["a.weight"], "a."),
        (["weight"], ""),
        ([], ""),
    ],
)
def test_shared_prefix(names, prefix):
    assert shared_prefix(names) == prefix


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm",)


def test_a_file_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": WEIGHTS, "extra": Harmful()}, "bad.pth")
    with pytest.raises(UnsafeCheckpoint, match="mkdir") as error:
        load_weights("bad.pth")
    assert not (tmp_path / "harm").exists()
    assert "\x1b" not in str(error.value), "no codes of a terminal"


def test_the_allow_list_is_ours_alone(tmp_path):
    "It holds while we read, not for the user's own torch.load afterwards."
    torch.save(FOREIGN["timm"], tmp_path / "w.pth")
    load_weights(tmp_path / "w.pth")
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


@pytest.mark.parametrize(
    "content", [{"epoch": 3}, [1, 2], torch.ones(3), {"state_dict": {}}, {"n_averaged": WEIGHTS}]
)
def test_a_file_without_weights_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(UnsafeCheckpoint, match="no weights"):
        load_weights(tmp_path / "w.pth")


def test_weights_that_are_nan_are_named(tmp_path):
    weights = {f"layer{i}.weight": torch.tensor([1.0, torch.nan]) for i in range(7)}
    for suffix, save in ((".pth", torch.save), (".safetensors", save_file)):
        save({**weights, "count": torch.tensor(3)}, tmp_path / f"w{suffix}")
        with pytest.raises(UnsafeCheckpoint, match=r"(?s)7 of 8.*layer0\.weight"):
            load_weights(tmp_path / f"w{suffix}")
    masks = {**WEIGHTS, "mask": torch.tensor([0.0, -torch.inf])}  # text encoders store such masks
    torch.save(masks, tmp_path / "w.pth")
    assert set(load_weights(tmp_path / "w.pth")) == set(masks)
