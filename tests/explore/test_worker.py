"The worker: the latest job of each owner, delivered on the owner's loop."

import asyncio
import threading

import pytest

from dfsbir.explore.worker import Worker, error_words


def test_worker_keeps_the_latest_of_each_owner():
    worker, gate, done = Worker(pause=0.0), threading.Event(), []
    worker.submit("a", gate.wait, lambda result, error: done.append("gate"))
    while not worker.busy:
        pass
    for i in range(50):
        worker.submit("a", lambda i=i: i, lambda result, error: done.append(result))
    worker.submit("b", lambda: 1 / 0, lambda result, error: done.append(type(error)))
    assert done == []  # submit returns at once, though the thread is held
    gate.set()
    worker.wait()
    assert done == ["gate", 49, ZeroDivisionError]


def test_worker_delivers_on_the_loop_of_the_owner():
    worker, threads = Worker(pause=0.0), []

    def deliver(result, error):
        threads.append((result, threading.get_ident()))

    async def kernel():
        worker.submit("a", threading.get_ident, deliver)
        ticks = 0
        while not threads:
            await asyncio.sleep(0.001)
            ticks += 1
        return ticks

    assert asyncio.run(kernel()) >= 1
    ((worked, delivered),) = threads
    assert delivered == threading.get_ident() != worked


@pytest.mark.filterwarnings("ignore:a result could not be shown")
def test_worker_survives_a_closed_loop_and_a_failing_delivery():
    worker, done = Worker(pause=0.0), []

    async def leave():
        worker.submit("a", lambda: 1, lambda result, error: done.append("lost"))

    asyncio.run(leave())
    worker.submit("b", lambda: 2, lambda result, error: 1 / 0)
    worker.submit("c", lambda: 3, lambda result, error: done.append(result))
    worker.wait()
    assert done[-1] == 3
    worker.submit("d", threading.Event().wait, print)
    with pytest.raises(TimeoutError):
        worker.wait(0.05)


def test_a_job_reports_its_progress_on_the_loop_of_the_owner():
    worker, said = Worker(pause=0.0), []

    def job():
        worker.call(lambda text: said.append((text, threading.get_ident())), "half way")
        return "done"

    async def kernel():
        worker.submit("a", job, lambda result, error: said.append((result, None)))
        while len(said) < 2:
            await asyncio.sleep(0.001)

    asyncio.run(kernel())
    assert said == [("half way", threading.get_ident()), ("done", None)]


def test_errors_in_words():
    assert error_words(ValueError("no sample")) == "no sample"
    assert error_words(KeyError("photo")) == "KeyError: 'photo'"  # the key alone says nothing
    assert error_words(MemoryError()) == "MemoryError"
