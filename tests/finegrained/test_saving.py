"""An encoder is one file."""

import pytest
import torch

from dfsbir.core.checkpoint import save_state
from dfsbir.finegrained.evaluation import embed_pair
from dfsbir.finegrained.saving import load_fine, save_fine


@pytest.mark.parametrize("distance", ("euclidean", "higher-order"))
def test_an_encoder_is_kept(tmp_path, tiny_encoder, toy, distance):
    encoder = tiny_encoder(**{"distance.kind": distance}).eval()
    save_fine(tmp_path / "e.safetensors", encoder, epoch=3)
    again = load_fine(tmp_path / "e.safetensors")
    assert again.card == encoder.card and not again.training
    for a, b in zip(embed_pair(encoder, *toy), embed_pair(again, *toy)):
        assert torch.equal(a, b)


def test_another_file_is_refused(tmp_path):
    save_state(tmp_path / "other.safetensors", {"a": torch.ones(2)})
    with pytest.raises(ValueError, match=r"other\.safetensors"):
        load_fine(tmp_path / "other.safetensors")
