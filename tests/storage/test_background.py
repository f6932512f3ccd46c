"""Work in a thread beside: order, errors, and Ctrl-C, which waits for what is being done."""

import signal
import threading
import time
from functools import partial
from typing import Any

import pytest

from batchverify.storage.background import AHEAD, Behind, ahead


def test_items_come_in_order_and_no_more_are_made_than_wanted():
    made = []

    def items():
        for number in range(100):
            made.append(number)
            yield number

    some: Any = ahead(items())
    assert [next(some) for _ in range(3)] == [0, 1, 2]
    some.close()
    assert len(made) <= 3 + AHEAD + 1
    assert list(ahead(iter(range(50)))) == list(range(50))


def test_an_error_of_making_comes_in_its_place():
    def items():
        yield 1
        raise ValueError("two")

    found = ahead(items())
    assert next(found) == 1
    with pytest.raises(ValueError, match="two"):
        next(found)


def test_all_is_done_in_order_in_another_thread():
    done = []

    def note(number):
        done.append((number, threading.get_ident()))

    with Behind() as behind:
        for number in range(20):
            behind(partial(note, number))
    assert [number for number, _ in done] == list(range(20))
    assert {thread for _, thread in done}.isdisjoint({threading.get_ident()})


def test_after_an_error_nothing_more_is_done():
    done = []

    def fail():
        time.sleep(0.05)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"), Behind() as behind:
        for work in (lambda: done.append(1), fail, lambda: done.append(2), lambda: done.append(3)):
            behind(work)
    assert done == [1]


def test_where_the_block_raises_what_waits_is_dropped_and_what_runs_is_finished():
    done, begun = [], threading.Event()

    def slow():
        begun.set()
        time.sleep(0.2)
        done.append("slow")

    with pytest.raises(KeyError), Behind() as behind:
        behind(slow)
        behind(lambda: done.append("waited"))
        begun.wait(5)
        raise KeyError
    assert done == ["slow"]


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_at_the_end_waits_for_what_is_being_done(times):
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
        with Behind() as behind:
            behind(slow)
            behind(lambda: done.append("waited"))
    presser.join()
    assert done == ["slow"]
