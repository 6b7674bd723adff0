"""Kernels shared by threads: every number once, failures after everybody has stopped, an interpreter that ends."""

import subprocess
import sys
import threading

import numpy as np
import pytest

import anybn

sharing = pytest.importorskip("anybn.kernels.cpu.sharing", reason="numba: not installed, pip install 'anybn[fast]'")


@pytest.fixture(autouse=True)
def threads_as_before():
    before = anybn.get_num_threads()
    yield
    anybn.set_num_threads(before)


def counting(tickets, offers, seen, done, of_thread):
    """A kernel in Python: what it does to its numbers, it does under the interpreter's lock."""
    first, last = sharing.begin(tickets, offers, seen)
    while first < last:
        for number in range(first, last):
            done[number] += 1
        of_thread.append(threading.get_ident())
        first, last = sharing.proceed(tickets, offers, seen, last - first)


@pytest.mark.parametrize(("count", "step"), [(1, 1), (7, 1), (100, 3), (5, 9)])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_number_once(threads, count, step):
    anybn.set_num_threads(threads)
    for _ in range(50):
        done, of_thread = np.zeros(count, int), []
        sharing.share(counting, count, step, done, of_thread)
        assert (done == 1).all()
        assert len(of_thread) == -(-count // step)


def test_helpers_help():
    anybn.set_num_threads(3)
    arrived = threading.Barrier(3, timeout=30)

    def kernel(tickets, offers, seen):
        first, last = sharing.begin(tickets, offers, seen)
        while first < last:
            arrived.wait()  # for three threads, each with one number
            first, last = sharing.proceed(tickets, offers, seen, last - first)

    sharing.share(kernel, 3, 1)


@pytest.mark.parametrize("who", ["caller", "helper"])
def test_a_failure_comes_after_everybody_has_stopped(who):
    anybn.set_num_threads(2)
    ended, begun = [], threading.Event()

    def kernel(tickets, offers, seen):
        fails = (seen == sharing.CALLER) == (who == "caller")
        first, last = sharing.begin(tickets, offers, seen)
        while first < last:
            if fails:
                begun.wait(30)  # until the other one is in the middle of something
                raise MemoryError(who)
            begun.set()
            ended.append(first)
            first, last = sharing.proceed(tickets, offers, seen, last - first)

    with pytest.raises(MemoryError, match=who):
        sharing.share(kernel, 10_000, 1)
    count = len(ended)
    done = np.zeros(4, int)
    sharing.share(counting, 4, 1, done, [])  # the helper lives
    assert (done == 1).all()
    assert len(ended) == count


def test_callers_at_the_same_time_share_helpers():
    anybn.set_num_threads(3)
    results = []

    def call():
        for _ in range(100):
            done = np.zeros(20, int)
            sharing.share(counting, 20, 1, done, [])
            results.append((done == 1).all())

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(results) == 400
    assert all(results)


@pytest.mark.parametrize("pause", [0, 0.1], ids=["awake", "asleep"])
def test_the_interpreter_ends_while_helpers_are(pause):
    code = (
        "import time, numpy as np, anybn; anybn.set_num_threads(3)\n"
        "anybn.batch_norm(np.ones((4, 1 << 18), 'float32'), anybn.BatchNormState(1 << 18), training=True)\n"
        f"time.sleep({pause})\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (run.returncode, run.stderr) == (0, "")
