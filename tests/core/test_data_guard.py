"The data-free law: what is refused, what is allowed, and where it holds."

import asyncio
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image

from dfsbir.core.data_guard import DataFreeViolation, data_free, touch_training_data


@pytest.fixture
def image(tmp_path):
    "A training image."
    file = tmp_path / "train" / "a.png"
    file.parent.mkdir()
    Image.new("L", (4, 4)).save(file)
    return file


def read(file):
    return Image.open(file).size


def byte_of(file):
    with open(file, "rb") as stream:
        return stream.read(1)


@pytest.mark.parametrize("suffix", [".png", ".JPG", ".svg", ".npy", ".ndjson", ".tar.gz", ".h5"])
@pytest.mark.parametrize("name", [str, os.fsencode, lambda file: file])
def test_data_files_are_refused(tmp_path, suffix, name):
    file = tmp_path / f"a{suffix}"
    file.write_bytes(b"x")
    with data_free(), pytest.raises(DataFreeViolation, match="a" + suffix):
        byte_of(name(file))
    assert byte_of(name(file)) == b"x"


def test_ways_of_opening(image, tmp_path):
    "Pillow, NumPy mapped, the system's own call, a link of another name."
    np.save(tmp_path / "a.npy", np.zeros(3))
    (tmp_path / "link.png").symlink_to(image)
    with data_free():
        for way in (
            lambda: Image.open(image),
            lambda: np.load(tmp_path / "a.npy", mmap_mode="r"),
            lambda: os.open(image, os.O_RDONLY),
            lambda: Image.open(tmp_path / "link.png"),
            lambda: np.memmap(tmp_path / "a.npy", mode="r+"),
            lambda: os.open(image, os.O_RDWR),
            lambda: open(image, "a+b"),  # noqa: SIM115
        ):
            with pytest.raises(DataFreeViolation):
                way()


def test_writing_and_other_files_stay_open(tmp_path):
    with data_free():
        Image.new("L", (4, 4)).save(tmp_path / "sample.png")
        np.save(tmp_path / "sample.npy", np.zeros(3))
        with open(tmp_path / "more.npy", "ab") as stream:
            stream.write(b"x")
        os.close(os.open(tmp_path / "new.npy", os.O_RDWR | os.O_CREAT | os.O_EXCL))
        torch.save({"a": 1}, tmp_path / "w.pth")
        assert torch.load(tmp_path / "w.pth", weights_only=True) == {"a": 1}


def test_an_allowed_folder_is_read_and_recorded(image, tmp_path):
    other = tmp_path / "other.png"
    Image.new("L", (4, 4)).save(other)
    with data_free(allow=[image.parent]) as guard:
        read(image)
        with pytest.raises(DataFreeViolation):
            read(other)
    assert guard.read == {image.resolve()}
    with data_free() as guard:
        pass
    assert not guard.allow and not guard.read


def test_blocks_within_blocks_allow_what_all_allow(image):
    with data_free(), data_free(allow=[image.parent]), pytest.raises(DataFreeViolation):
        read(image)
    with data_free(allow=[image.parent]):
        with data_free(), pytest.raises(DataFreeViolation):
            read(image)
        read(image)


def test_the_law_ends_with_the_block_whatever_happens(image):
    with pytest.raises(KeyError), data_free():
        raise KeyError
    read(image)
    touch_training_data("anything")


def test_generated_images_obey_as_well():
    with data_free(), pytest.raises(DataFreeViolation, match="the toy set"):
        touch_training_data("the toy set")


# ---- contexts


def test_a_thread_that_ran_before_is_free(image):
    start, done = threading.Event(), threading.Event()
    with ThreadPoolExecutor(1) as pool:

        def reads():
            start.set()
            done.wait(10)
            return read(image)

        other = pool.submit(reads)
        start.wait(10)
        with data_free():
            done.set()
            assert other.result(10) == (4, 4)
            with pytest.raises(DataFreeViolation):
                read(image)


def test_threads_begun_inside_are_guarded_until_it_ends(image):
    with ThreadPoolExecutor(1) as pool:
        with data_free():
            with pytest.raises(DataFreeViolation):
                pool.submit(read, image).result(10)
            with pytest.raises(DataFreeViolation):
                pool.submit(touch_training_data, "x").result(10)
        assert pool.submit(read, image).result(10) == (4, 4)


@contextmanager
def guarded_elsewhere():
    "Inside this block another thread is in a guard."
    entered, leave = threading.Event(), threading.Event()

    def guarded():
        with data_free():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=guarded)
    thread.start()
    try:
        assert entered.wait(10)
        yield
    finally:
        leave.set()
        thread.join()


def test_threads_begun_elsewhere_meanwhile_are_free(image):
    "A page that shows photos starts its threads while a run trains in another one."
    with guarded_elsewhere(), ThreadPoolExecutor(1) as pool:
        assert pool.submit(read, image).result(10) == (4, 4)


def test_threads_of_threads_are_guarded(image):
    def read_in_another_thread():
        with ThreadPoolExecutor(1) as inner:
            inner.submit(read, image).result(10)

    with data_free(), ThreadPoolExecutor(1) as outer, pytest.raises(DataFreeViolation):
        outer.submit(read_in_another_thread).result(10)


def test_a_guarded_thread_guards_those_that_it_begins(image):
    "The guard is entered in a thread, and the main thread stays free."
    failures = []

    def work():
        with data_free(), ThreadPoolExecutor(1) as pool:
            failures.append(pool.submit(read, image).exception(10))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert isinstance(failures[0], DataFreeViolation)
    assert read(image) == (4, 4)


def test_a_guard_in_one_thread_leaves_the_main_thread_alone(image):
    with guarded_elsewhere():
        assert read(image) == (4, 4)


def test_tasks_of_one_thread_are_apart(image):
    async def both():
        entered, read_it = asyncio.Event(), asyncio.Event()

        async def guarded():
            with data_free():
                entered.set()
                await read_it.wait()
                with pytest.raises(DataFreeViolation):
                    read(image)

        task = asyncio.create_task(guarded())
        await entered.wait()
        assert read(image) == (4, 4)
        read_it.set()
        await task

    asyncio.run(both())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="only POSIX forks")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_workers_are_guarded(image):
    data = torch.utils.data.DataLoader(
        [image],
        collate_fn=lambda files: read(files[0]),
        num_workers=1,
        multiprocessing_context="fork",
    )
    with data_free(), pytest.raises(DataFreeViolation):
        next(iter(data))
