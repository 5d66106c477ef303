"States in files. (Run folders: test_crossx.py and test_experiments.py; unsafe files: test_teachers.py.)"

import json

import torch
from safetensors.torch import save_file

from dfsbir.core.checkpoint import load_state, read_card, save_state
from dfsbir.core.device import fork_rng

STATE = {
    "weights": {"b": torch.arange(3.0), "a": torch.ones(2, 2)},
    "step": 7,
    "names": ["x", None, True],
    "pair": (1, 2.5),
}


def test_equal_states_are_equal_files(tmp_path):
    "The same bytes every time, so that a checksum tells whether weights have changed."
    files = [tmp_path / f"{i}.safetensors" for i in range(12)]
    for f in files:
        save_state(f, STATE, {"classes": ["car", "cat"], "seed": 3})
    assert len({f.read_bytes() for f in files}) == 1
    found = load_state(files[0])
    assert torch.equal(found["weights"].pop("b"), torch.arange(3.0)) and torch.equal(
        found["weights"].pop("a"), torch.ones(2, 2)
    )
    assert found == {
        "weights": {},
        "step": 7,
        "names": ["x", None, True],
        "pair": (1, 2.5),
    } and read_card(files[0]) == {"classes": ["car", "cat"], "seed": 3}


def test_keys_that_look_like_paths(tmp_path):
    state = {"a.b": torch.zeros(2), "a": {"b": torch.ones(2)}}
    save_state(tmp_path / "s.safetensors", state)
    found = load_state(tmp_path / "s.safetensors")
    assert torch.equal(found["a.b"], torch.zeros(2)) and torch.equal(found["a"]["b"], torch.ones(2))


def test_a_file_of_the_first_run_folders(tmp_path):
    "They kept skeleton and card as two entries."
    save_file(
        {"t.a": torch.ones(2)},
        tmp_path / "old.safetensors",
        {
            "skeleton": json.dumps({"dict": [["a", {"tensor": "t.a"}], ["n", {"value": 1}]]}),
            "card": json.dumps({"seed": 5}),
        },
    )
    found = load_state(tmp_path / "old.safetensors")
    assert (
        torch.equal(found["a"], torch.ones(2))
        and found["n"] == 1
        and read_card(tmp_path / "old.safetensors") == {"seed": 5}
    )


def test_another_programs_file_has_no_card(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "plain.safetensors", {"format": "pt"})
    assert read_card(tmp_path / "plain.safetensors") == {}


def test_random_numbers_of_ones_own_disturb_nobody():
    torch.manual_seed(1)
    wanted = torch.rand(4)
    torch.manual_seed(1)
    before = torch.rand(2)
    try:
        with fork_rng(7):
            own = torch.rand(3)
            raise KeyError
    except KeyError:
        pass
    assert torch.equal(torch.cat([before, torch.rand(2)]), wanted), "whatever happens inside"
    torch.manual_seed(7)
    assert torch.equal(own, torch.rand(3))
