"Modalities, pair batches and normalizers."

import pytest
import torch
import torch.nn.functional as F

from dfsbir.core.types import MODALITIES, Modality, Normalizer, PairBatch


def batch(n=4, targets=False):
    "A batch whose tensors are told apart by their values."
    photo, sketch = torch.rand(n, 3, 8, 8), torch.rand(n, 1, 6, 6)
    extra = (torch.rand(n, 5), torch.rand(n, 5)) if targets else ()
    return PairBatch(photo, sketch, torch.arange(n), *extra)


def test_modalities_are_strings():
    assert [f"{m}" for m in MODALITIES] == ["photo", "sketch"]
    assert [m.channels for m in MODALITIES] == [3, 1]
    with pytest.raises(ValueError, match="Photo"):
        Modality("Photo")


@pytest.mark.parametrize("targets", [False, True])
def test_batches_are_cut_and_joined(targets):
    whole = batch(6, targets)
    parts = [whole[:2], whole[torch.tensor([2, 3])], whole[torch.arange(6) > 3]]
    again = PairBatch.cat(parts)
    assert len(again) == 6
    for m in MODALITIES:
        assert torch.equal(again.of(m), whole.of(m))
        assert (again.target_of(m) is None) == (not targets)
    assert torch.equal(again.label, whole.label)


def test_a_batch_needs_equally_many_of_each():
    good = batch()
    with pytest.raises(ValueError, match="'sketch': 3"):
        PairBatch(good.photo, good.sketch[:3], good.label)
    with pytest.raises(ValueError, match="'photo_target': 2"):
        PairBatch(good.photo, good.sketch, good.label, torch.rand(2, 5))


def test_a_batch_moves_as_a_whole():
    moved = batch(targets=True).to("meta")
    assert moved.photo.device.type == moved.sketch_target.device.type == "meta"


# ---- normalizers


def test_normalizer_against_a_slow_loop():
    mean, std = (0.1, 0.5, 0.9), (0.5, 0.25, 2.0)
    x = torch.rand(2, 3, 8, 8)
    out = Normalizer(8, 3, mean, std)(x)
    for n in range(2):
        for c in range(3):
            torch.testing.assert_close(out[n, c], (x[n, c] - mean[c]) / std[c])


def test_normalizer_converts_channels_polarity_and_size():
    grey = torch.rand(2, 1, 16, 16)
    colour = Normalizer(16, 3, 0.0, 1.0)(grey)
    assert torch.equal(colour, grey.expand(-1, 3, -1, -1))
    photo = torch.rand(2, 3, 16, 16)
    luma = 0.299 * photo[:, :1] + 0.587 * photo[:, 1:2] + 0.114 * photo[:, 2:]
    torch.testing.assert_close(Normalizer(16, 1, 0.0, 1.0)(photo), luma)
    inverted = Normalizer(16, 1, 0.0, 1.0, dark_on_light=False)(grey)
    torch.testing.assert_close(inverted, 1 - grey)
    ramp = torch.linspace(0, 1, 16).expand(1, 1, 16, 16)
    small = Normalizer(8, 1, 0.0, 1.0)(ramp)
    inner = (slice(None), slice(None), slice(2, -2), slice(2, -2))
    torch.testing.assert_close(small[inner], F.avg_pool2d(ramp, 2)[inner])


def test_one_number_serves_all_channels_and_three_serve_a_grey_net():
    assert Normalizer(8, 3, 0.4, 0.2).card()["mean"] == pytest.approx([0.4] * 3)
    assert Normalizer(8, 1, (0.1, 0.2, 0.3), (1, 2, 3)).card()["std"] == [1]


def test_a_card_makes_the_normalizer_again():
    one = Normalizer(28, 1, 0.3, 0.2, dark_on_light=False)
    again = Normalizer(**one.card())
    x = torch.rand(2, 3, 40, 40)
    assert torch.equal(again(x), one(x))
    assert not one.state_dict(), "the input is described by the card, not by weights"


@pytest.mark.parametrize(
    "args, found",
    [
        ({"size": 0}, "size=0"),
        ({"channels": 2}, "channels=2"),
        ({"mean": (0.1, 0.2)}, "0.2"),
        ({"std": (1.0, 0.0, 1.0)}, "positive"),
        ({"std": float("nan")}, "nan"),
        ({"mean": float("inf")}, "inf"),
    ],
)
def test_a_normalizer_that_makes_no_sense_is_refused(args, found):
    with pytest.raises(ValueError, match=found):
        Normalizer(**{"size": 8, **args})


@pytest.mark.parametrize(
    "x", [torch.zeros(3, 8, 8), torch.zeros(1, 2, 8, 8), torch.zeros(1, 3, 8, 8).byte()]
)
def test_a_normalizer_refuses_what_is_not_an_image_batch(x):
    with pytest.raises(ValueError, match=str(x.dtype)):
        Normalizer(8)(x)


def test_half_precision_is_resized():
    "Under mixed precision images arrive in it."
    x = torch.rand(1, 1, 24, 24)
    found = Normalizer(12, 1)(x.bfloat16())
    torch.testing.assert_close(found, Normalizer(12, 1)(x), atol=0.02, rtol=0)
