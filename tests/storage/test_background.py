"""Background threads: prefetched items in order, tasks, errors, and Ctrl-C, which waits for the running task."""

import signal
import threading
import time
from functools import partial
from typing import Any

import pytest

from batchverify.storage.background import QUEUE_LENGTH, BackgroundWorker, prefetch


def test_items_come_in_order_and_few_are_made_early():
    made = []

    def items():
        for number in range(100):
            made.append(number)
            yield number

    prefetched: Any = prefetch(items())
    assert [next(prefetched) for _ in range(3)] == [0, 1, 2]
    prefetched.close()
    assert len(made) <= 3 + QUEUE_LENGTH + 1
    assert list(prefetch(iter(range(50)))) == list(range(50))


def test_an_error_is_raised_after_the_items_before_it():
    def items():
        yield 1
        raise ValueError("two")

    prefetched = prefetch(items())
    assert next(prefetched) == 1
    with pytest.raises(ValueError, match="two"):
        next(prefetched)


def test_tasks_run_in_order_in_another_thread():
    done = []

    def note(number):
        done.append((number, threading.get_ident()))

    with BackgroundWorker() as worker:
        for number in range(20):
            worker(partial(note, number))
    assert [number for number, _ in done] == list(range(20))
    assert {thread for _, thread in done}.isdisjoint({threading.get_ident()})


def test_after_an_error_no_further_task_runs():
    done = []

    def fail():
        time.sleep(0.05)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"), BackgroundWorker() as worker:
        for work in (lambda: done.append(1), fail, lambda: done.append(2), lambda: done.append(3)):
            worker(work)
    assert done == [1]


def test_if_the_block_raises_waiting_tasks_are_dropped_and_the_running_one_finishes():
    done, begun = [], threading.Event()

    def slow():
        begun.set()
        time.sleep(0.2)
        done.append("slow")

    with pytest.raises(KeyError), BackgroundWorker() as worker:
        worker(slow)
        worker(lambda: done.append("waited"))
        begun.wait(5)
        raise KeyError
    assert done == ["slow"]


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_at_the_end_waits_for_the_running_task(times):
    main, done, begun = threading.get_ident(), [], threading.Event()

    def slow():
        begun.set()
        time.sleep(0.5)
        done.append("slow")

    def press():
        begun.wait(5)
        # By then the block is over and its end waits.
        time.sleep(0.1)
        for _ in range(times):
            # A real signal: it interrupts the main thread's waiting.
            signal.pthread_kill(main, signal.SIGINT)
            time.sleep(0.1)

    presser = threading.Thread(target=press)
    with pytest.raises(KeyboardInterrupt):
        presser.start()
        with BackgroundWorker() as worker:
            worker(slow)
            worker(lambda: done.append("waited"))
    presser.join()
    assert done == ["slow"]
