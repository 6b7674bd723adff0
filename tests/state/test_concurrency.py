"""Many threads, forks and interrupts: no update is lost, and nothing is half done."""

import multiprocessing
import os
import signal
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import anybn
from anybn.conformance import inputs


def train(state, x, steps):
    for _ in range(steps):
        anybn.batch_norm(x, state, training=True)


def test_threads_that_train_one_state_lose_no_update():
    """Each batch alone; the cumulative average of equal batches is that batch, whatever the order."""
    x = inputs.normal((16, 4)) + 5
    state, alone = anybn.BatchNormState(4, momentum=None), anybn.BatchNormState(4, momentum=None)
    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(train, state, x, 100) for _ in range(4)]:
            future.result()
    train(alone, x, 400)
    assert state.num_batches_tracked == 400
    assert inputs.state_values(state) == inputs.state_values(alone)


def test_threads_of_two_libraries(target):
    x = inputs.exact((8, 4)).astype(np.float32)
    state = anybn.BatchNormState(4)
    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(train, state, a, 20) for a in (x, target.array(x))]:
            future.result()
    assert state.num_batches_tracked == 40


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_fork_while_another_thread_trains():
    state = anybn.BatchNormState(4)
    x = inputs.normal((16, 4))
    stop = threading.Event()

    def keep_training():
        while not stop.is_set():
            anybn.batch_norm(x, state, training=True)

    thread = threading.Thread(target=keep_training)
    thread.start()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # the very thing that is tested
            warnings.simplefilter("ignore", RuntimeWarning)  # JAX's about fork
            children = [multiprocessing.get_context("fork").Process(target=train, args=(state, x, 5)) for _ in range(5)]
            for child in children:
                child.start()
    finally:
        stop.set()
        thread.join()
    for child in children:
        child.join(20)
        assert child.exitcode == 0


@pytest.mark.skipif(sys.platform == "win32", reason="needs setitimer")
def test_interrupts_at_any_point_leave_a_whole_state():
    x = inputs.normal((64, 4))
    state = anybn.BatchNormState(4, momentum=None)

    class Interrupt(Exception):
        pass

    def raise_interrupt(*_):
        raise Interrupt

    previous = signal.signal(signal.SIGALRM, raise_interrupt)
    finished = 0
    try:
        for microseconds in range(20, 600, 3):
            before = state._arrays
            try:
                signal.setitimer(signal.ITIMER_REAL, microseconds * 1e-6)
                anybn.batch_norm(x, state, training=True)
                signal.setitimer(signal.ITIMER_REAL, 0)
                finished += 1
            except Interrupt:
                after = state._arrays
                assert after is before or after.num_batches_tracked == before.num_batches_tracked + 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    tracked = state.num_batches_tracked
    assert tracked >= finished
    expected = anybn.BatchNormState(4, momentum=None)
    train(expected, x, tracked)
    assert inputs.state_values(state) == inputs.state_values(expected)
