"What goes in comes out; who leaves; memory or file; saved once, resumed exactly; faults."

import pytest
import torch
from inversion.counting import Counter
from inversion.loop_buffer import LoopBuffer

from dfsbir.core.checkpoint import load_state, save_state
from dfsbir.core.types import PairBatch
from dfsbir.inversion.buffer import ReplayBuffer, leaving_order


def pairs_with_targets(labels, classes=4, size=6):
    "Random pairs with posteriors."
    n = len(labels)
    images = torch.rand(n, 3, size, size), torch.rand(n, 1, size, size)
    targets = torch.rand(2, n, classes).softmax(2)
    return PairBatch(*images, torch.as_tensor(labels), *targets)


def assert_same_batch(a, b):
    for x, y in zip(vars(a).values(), vars(b).values(), strict=True):
        assert x is y is None or torch.equal(x, y)


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


@pytest.mark.parametrize("capacity", [60, None])
def test_samples_are_those_of_the_loop_as_long_as_nothing_leaves(capacity):
    ours, loop = ReplayBuffer(capacity, seed=3), LoopBuffer(60, seed=3)
    for _ in range(6):
        batch = pairs_with_targets(torch.randint(4, (10,)))
        ours.add(batch)
        loop.add(batch)
        assert_same_batch(ours.sample(7), loop.sample(7))


# ---- who leaves


def slow_leaving_order(label, age):
    "One pair after the other: the oldest of the largest class, of equal classes the lowest."
    left, order = list(range(len(label))), []
    while left:
        counts = torch.bincount(label[left])
        largest = counts.argmax()
        members = [i for i in left if label[i] == largest]
        order.append(min(members, key=lambda i: age[i]))
        left.remove(order[-1])
    return order


@pytest.mark.parametrize("n,classes", [(1, 1), (7, 1), (20, 3), (30, 9), (12, 40)])
def test_leaving_order_equals_the_slow_loop(n, classes):
    label, age = torch.randint(classes, (n,)), torch.randperm(1000)[:n]
    assert leaving_order(label, age).tolist() == slow_leaving_order(label, age)


def test_the_newest_of_each_class_stay_where_the_order_says():
    "Every pair's photo holds its number, so that the kept ones can be read off."
    torch.manual_seed(1)
    buffer, kept, ages = ReplayBuffer(13), torch.zeros(0, dtype=torch.long), []
    number = 0
    for n in (5, 8, 3, 20, 1, 7):
        label = torch.randint(4, (n,))
        ids = torch.arange(number, number + n)
        photo = (ids / 255).view(n, 1, 1, 1).expand(n, 3, 2, 2)
        buffer.add(PairBatch(photo, torch.rand(n, 1, 2, 2), label))
        ages = torch.cat([torch.as_tensor(ages, dtype=torch.long), label])
        kept = torch.cat([kept, ids])
        leave = slow_leaving_order(ages[kept], kept)[: max(0, len(kept) - 13)]
        stay = [i for i in range(len(kept)) if i not in leave]
        kept, number = kept[stay], number + n
        assert sorted(buffer.pairs.photo[:, 0, 0, 0].tolist()) == kept.tolist()
        assert torch.equal(ages[buffer.pairs.photo[:, 0, 0, 0].long()], buffer.pairs.label)


def test_classes_are_as_balanced_as_in_the_loop(random_pairs):
    torch.manual_seed(2)
    ours, loop = ReplayBuffer(40), LoopBuffer(40)
    for _ in range(30):
        batch = random_pairs(torch.randint(5, (8,)).clamp_max(3).tolist())
        ours.add(batch)
        loop.add(batch)
    counts = [torch.bincount(b.pairs.label, minlength=4) for b in (ours, loop)]
    assert (counts[0] - counts[1]).abs().max() <= 1 and counts[0].tolist() == [10, 10, 10, 10]


def test_a_batch_larger_than_the_buffer(random_pairs):
    buffer = ReplayBuffer(6)
    buffer.add(random_pairs([0] * 10 + [1] * 10 + [2] * 10))
    assert len(buffer) == 6 and torch.bincount(buffer.pairs.label).tolist() == [2, 2, 2]


def test_objects_without_a_class_leave_in_the_order_of_arrival(random_pairs):
    "Their labels are their numbers."
    buffer = ReplayBuffer(5)
    for start in range(0, 21, 3):
        buffer.add(random_pairs(list(range(start, start + 3))))
    assert sorted(buffer.pairs.label.tolist()) == [16, 17, 18, 19, 20]


def test_sampling_is_uniform(random_pairs):
    buffer = ReplayBuffer(8, seed=5)
    buffer.add(random_pairs([0, 1, 2, 3, 3, 3, 4, 5]))
    count = torch.bincount(buffer.sample(4000).label, minlength=6) / 4000
    share = torch.bincount(buffer.all().label, minlength=6) / len(buffer)
    assert (count - share).abs().max() < 0.04


# ---- where pairs are kept


def test_a_mapped_file_holds_what_memory_would(tmp_path):
    memory, file = ReplayBuffer(20, seed=1), ReplayBuffer(20, seed=1, folder=tmp_path, memory=1000)
    for _ in range(5):
        batch = pairs_with_targets(torch.randint(4, (7,)))
        memory.add(batch)
        file.add(batch)
        assert_same_batch(memory.sample(9), file.sample(9))
    assert file.table.in_file and not memory.table.in_file
    assert sum(p.is_dir() for p in tmp_path.iterdir()) == 1
    del file
    assert not list(tmp_path.iterdir())


def test_a_buffer_without_capacity_keeps_everything(random_pairs, tmp_path):
    "It moves to a file when it outgrows its memory."
    buffer = ReplayBuffer(None, folder=tmp_path, memory=20_000)
    photos = []
    for _ in range(12):
        batch = random_pairs([0, 1, 2, 0, 1, 2, 0, 1, 2, 3])
        photos.append((batch.photo * 255).round().byte())
        buffer.add(batch)
    assert len(buffer) == 120 and buffer.table.in_file
    assert torch.equal(buffer.pairs.photo, torch.cat(photos))


@pytest.mark.parametrize("full", [False, True])
def test_few_operations_at_any_batch_size(random_pairs, full):
    for n in (1, 16, 256):
        buffer = ReplayBuffer(2 * n)
        buffer.add(random_pairs([0] * (2 * n if full else 1)))
        batch = random_pairs([i % 7 for i in range(n)])
        with Counter() as add:
            buffer.add(batch)
        with Counter() as sample:
            buffer.sample(n)
        assert add.count < 110 and sample.count < 25


# ---- saving


def checkpoint(buffer, folder, path):
    "As a trainer does it: the pairs first, then the checkpoint that names their files."
    buffer.save(folder)
    save_state(path, buffer.state_dict())


@pytest.mark.parametrize("capacity", [30, None])
def test_resume_is_exact(capacity, tmp_path):
    a = ReplayBuffer(capacity, seed=5)
    for _ in range(4):
        for _ in range(3):
            a.add(pairs_with_targets(torch.randint(4, (7,))))
        a.sample(3)
        checkpoint(a, tmp_path / "pairs", tmp_path / "state.safetensors")
    b = ReplayBuffer(capacity, seed=99)
    b.load_state_dict(load_state(tmp_path / "state.safetensors"), tmp_path / "pairs")
    assert_same_batch(a.pairs, b.pairs)
    for _ in range(3):
        assert_same_batch(a.sample(5), b.sample(5))
        more = pairs_with_targets(torch.randint(4, (9,)))
        a.add(more)
        b.add(more)
    assert_same_batch(a.pairs, b.pairs)


def test_each_pair_is_written_once_and_the_checkpoint_is_small(random_pairs, tmp_path):
    buffer, names = ReplayBuffer(40), set()
    for _ in range(10):
        buffer.add(random_pairs([0, 1, 2, 3] * 3))
        checkpoint(buffer, tmp_path / "pairs", tmp_path / "state.safetensors")
        new = {p.name for p in (tmp_path / "pairs").iterdir()} - names
        assert len(new) == 1
        names |= new
        rows = load_state(tmp_path / "pairs" / new.pop())["rows"]
        assert len(rows) == 12
        before = [p.stat().st_mtime_ns for p in (tmp_path / "pairs").iterdir()]
        checkpoint(buffer, tmp_path / "pairs", tmp_path / "state.safetensors")  # nothing new
        assert set(before) >= {p.stat().st_mtime_ns for p in (tmp_path / "pairs").iterdir()}
    assert (tmp_path / "state.safetensors").stat().st_size < 10_000
    assert len(list((tmp_path / "pairs").iterdir())) == 4  # the others' pairs have all left


def test_a_run_killed_between_pairs_and_checkpoint_resumes_from_the_one_before(
    random_pairs, tmp_path
):
    buffer, state = ReplayBuffer(12), tmp_path / "state.safetensors"
    buffer.add(random_pairs([0, 1, 2] * 4))
    checkpoint(buffer, tmp_path / "pairs", state)
    expected = buffer.pairs.map(torch.clone)
    buffer.add(random_pairs([0, 1, 2] * 4))  # all earlier pairs leave
    buffer.save(tmp_path / "pairs")  # killed here
    resumed = ReplayBuffer(12)
    resumed.load_state_dict(load_state(state), tmp_path / "pairs")
    assert_same_batch(resumed.pairs, expected)
    for _ in range(3):
        resumed.add(random_pairs([0, 1, 2] * 4))
        checkpoint(resumed, tmp_path / "pairs", state)
    again = ReplayBuffer(12)
    again.load_state_dict(load_state(state), tmp_path / "pairs")
    assert_same_batch(again.pairs, resumed.pairs)
    assert len(list((tmp_path / "pairs").iterdir())) <= 2  # what was left over is gone


def test_an_empty_buffer_is_saved_and_loaded(random_pairs, tmp_path):
    a = ReplayBuffer(4, seed=7)
    checkpoint(a, tmp_path / "pairs", tmp_path / "state.safetensors")
    b = ReplayBuffer(4)
    b.load_state_dict(load_state(tmp_path / "state.safetensors"), tmp_path / "pairs")
    batch = random_pairs([0, 1])
    a.add(batch)
    b.add(batch)
    assert_same_batch(a.sample(5), b.sample(5))


def test_faults_are_named(random_pairs, tmp_path):
    with pytest.raises(ValueError, match="capacity=0"):
        ReplayBuffer(0)
    buffer = ReplayBuffer(4)
    with pytest.raises(ValueError, match="empty"):
        buffer.sample(2)
    buffer.add(random_pairs([0]))
    with pytest.raises(ValueError, match=r"\(3, 7, 7\)"):
        buffer.add(random_pairs([0], size=7))
    with pytest.raises(ValueError, match="save"):
        ReplayBuffer(4).load_state_dict(buffer.state_dict())
    buffer.save(tmp_path)
    with pytest.raises(ValueError, match="folder"):
        ReplayBuffer(4).load_state_dict(buffer.state_dict())
    for path in tmp_path.iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match="pairs-"):
        ReplayBuffer(4).load_state_dict(buffer.state_dict(), tmp_path)
