"What goes into the buffer comes out; balance and age; uniform samples; resuming; faults."

import pytest
import torch

from dfsbir.core.checkpoint import load_state, save_state
from dfsbir.inversion.buffer import ReplayBuffer


def test_the_buffer_gives_back_what_it_took(random_pairs):
    buffer, batch = ReplayBuffer(10), random_pairs([0, 1, 2, 0, 1])
    buffer.add(batch)
    got = buffer.sample(64)
    assert len(buffer) == 5 and got.photo.dtype == torch.float32
    half_a_step = 0.5 / 255 + 1e-6
    for photo, sketch, label in zip(got.photo, got.sketch, got.label):
        i = (batch.photo - photo).flatten(1).abs().amax(1).argmin()
        assert (batch.photo[i] - photo).abs().max() <= half_a_step
        assert (batch.sketch[i] - sketch).abs().max() <= half_a_step
        assert batch.label[i] == label


def test_classes_stay_balanced_and_the_oldest_leave(random_pairs):
    buffer, first = ReplayBuffer(12), random_pairs([0] * 12)
    buffer.add(first)
    for _ in range(3):
        buffer.add(random_pairs([1, 2]))
    assert torch.bincount(buffer.all().label).tolist() == [6, 3, 3]
    kept = (buffer.all().photo[buffer.all().label == 0] * 255).round()
    newest = (first.photo[6:] * 255).round()
    assert torch.equal(kept.sort(0).values, newest.sort(0).values)


def test_a_flood_of_one_class_displaces_the_largest(random_pairs):
    buffer = ReplayBuffer(12)
    buffer.add(random_pairs([0] * 6 + [1] * 3 + [2] * 3))
    buffer.add(random_pairs([1] * 40))
    counts = torch.bincount(buffer.all().label)
    assert len(buffer) == 12 and counts.max() - counts.min() <= 2


def test_sampling_resumes(random_pairs, tmp_path):
    a = ReplayBuffer(8, seed=5)
    a.add(random_pairs(list(range(8))))
    a.sample(3)
    save_state(tmp_path / "buffer.safetensors", a.state_dict())
    b = ReplayBuffer(8)
    b.load_state_dict(load_state(tmp_path / "buffer.safetensors"))
    for _ in range(3):
        x, y = a.sample(5), b.sample(5)
        assert torch.equal(x.photo, y.photo) and torch.equal(x.sketch, y.sketch)
        assert torch.equal(x.label, y.label)
        more = random_pairs([1, 3, 3])
        a.add(more)
        b.add(more)


def test_sampling_is_uniform(random_pairs):
    buffer = ReplayBuffer(8, seed=5)
    buffer.add(random_pairs([0, 1, 2, 3, 3, 3, 4, 5]))
    count = torch.bincount(buffer.sample(4000).label, minlength=6) / 4000
    share = torch.bincount(buffer.all().label, minlength=6) / len(buffer)
    assert (count - share).abs().max() < 0.04


def test_faults_are_named(random_pairs):
    with pytest.raises(ValueError, match="capacity=0"):
        ReplayBuffer(0)
    buffer = ReplayBuffer(4)
    with pytest.raises(ValueError, match="empty"):
        buffer.sample(2)
    buffer.add(random_pairs([0]))
    with pytest.raises(ValueError, match=r"\(3, 7, 7\)"):
        buffer.add(random_pairs([0], size=7))
