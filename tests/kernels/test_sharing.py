"""Kernels shared by threads, of torch and of our own: every number once, failures after everybody has stopped."""

import threading

import numpy as np
import pytest

import anybn

sharing = pytest.importorskip("anybn.kernels.cpu.sharing", reason="numba: not installed, pip install 'anybn[fast]'")

from numba import types  # noqa: E402
from numba.core.caching import NullCache  # noqa: E402

from anybn.kernels.cpu import openmp  # noqa: E402
from anybn.kernels.cpu.primitives import fetch_add, look, sched_yield  # noqa: E402
from anybn.kernels.cpu.values import KERNEL  # noqa: E402

pthread_self = types.ExternalFunction("pthread_self", types.int64())


def shared(kernel):
    """Not kept on disk, where only changes to the package are noticed."""
    made = sharing.shared(**KERNEL)(kernel)
    made._cache = NullCache()
    return made


@shared
def count(tickets, done, claims):
    first, last = sharing.begin(tickets)
    while first < last:
        for number in range(first, last):
            done[number] += 1
        fetch_add(claims, 0, 1)
        first, last = sharing.proceed(tickets, first, last)


@shared
def meet(tickets, arrived, threads):
    """Each number waits for all, so each needs a thread; not for ever."""
    first, last = sharing.begin(tickets)
    while first < last:
        threads[first] = pthread_self()
        fetch_add(arrived, 0, 1)
        for _ in range(10_000_000):
            if look(arrived, 0) >= len(threads):
                break
            sched_yield()
        first, last = sharing.proceed(tickets, first, last)


@shared
def fail(tickets, done, caller, caller_fails, begun):
    """Either the caller or the others fail, when the other side is in the middle of something."""
    fails = (pthread_self() == caller) == caller_fails
    first, last = sharing.begin(tickets)
    while first < last:
        fetch_add(begun, int(fails), 1)
        while look(begun, int(not fails)) == 0:
            sched_yield()
        if fails:
            raise MemoryError
        fetch_add(done, 0, 1)
        first, last = sharing.proceed(tickets, first, last)


@pytest.fixture(params=["torch's", "own"])
def team(request, monkeypatch):
    """How to set the number of threads, of each kind."""
    before = anybn.get_num_threads()
    if request.param == "own":
        monkeypatch.setattr(openmp, "team", lambda: None)
        monkeypatch.setattr(sharing, "get_num_threads", lambda: chosen)
        chosen = before

        def choose(count):
            nonlocal chosen
            chosen = count

        yield choose
        return
    torch = pytest.importorskip("torch", reason="torch: not installed")
    if openmp.team() is None:
        pytest.skip("torch has no OpenMP threads that can be shared here")
    monkeypatch.setattr(sharing, "REST", 0)
    sharing.team[sharing.CROWDED_UNTIL] = 0
    before_torch = torch.get_num_threads()

    def choose(count):
        torch.set_num_threads(count)
        anybn.set_num_threads(count)

    yield choose
    torch.set_num_threads(before_torch)
    anybn.set_num_threads(before)


@pytest.mark.parametrize(("numbers", "step"), [(1, 1), (7, 1), (100, 3), (5, 9)])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_number_once(team, threads, numbers, step):
    team(threads)
    for _ in range(50):
        done, claims = np.zeros(numbers, int), np.zeros(1, int)
        sharing.share(count, numbers, step, done, claims)
        assert (done == 1).all()
        assert claims[0] == -(-numbers // step)


def test_others_help(team):
    team(3)
    arrived, threads = np.zeros(1, int), np.zeros(3, int)
    sharing.share(meet, 3, 1, arrived, threads)
    assert len(set(threads.tolist())) == 3
    assert threading.get_ident() in threads


def test_a_team_of_more_than_are_wanted():
    torch = pytest.importorskip("torch", reason="torch: not installed")
    before = torch.get_num_threads(), anybn.get_num_threads()
    try:
        torch.set_num_threads(5)
        anybn.set_num_threads(2)
        for _ in range(50):
            threads = np.zeros(100, int)
            sharing.share(meet, 100, 1, np.full(1, 100), threads)
            assert len(set(threads.tolist())) <= 2
    finally:
        torch.set_num_threads(before[0])
        anybn.set_num_threads(before[1])


@pytest.mark.parametrize("caller_fails", [True, False])
def test_a_failure_comes_after_everybody_has_stopped(team, caller_fails):
    team(2)
    for _ in range(20):
        done, begun = np.zeros(1, int), np.zeros(2, int)
        with pytest.raises(MemoryError, match="no memory left"):
            sharing.share(fail, 1000, 1, done, threading.get_ident(), caller_fails, begun)
        assert done[0] == 999
    done, claims = np.zeros(4, int), np.zeros(1, int)
    sharing.share(count, 4, 1, done, claims)  # they are still there
    assert (done == 1).all()


def test_a_crowded_team_is_left_alone(team, monkeypatch):
    """For as long as it waited, twenty times; then it is asked again."""
    team(2)
    now = 1_000
    monkeypatch.setattr(sharing.time, "monotonic_ns", lambda: now)
    monkeypatch.setattr(sharing, "REST", 20)
    taken = []

    def kernel(tickets, waits):
        taken.append(bool(tickets[sharing.OPENMP]))
        tickets[sharing.WAITED] = waits

    for waits in (sharing.CROWDED, 10 * sharing.CROWDED, 0):
        sharing.share(kernel, 4, 1, waits)
    now += 200 * sharing.CROWDED
    sharing.share(kernel, 4, 1, 0)
    assert taken == ([True, True, False, True] if sharing.openmp.team() else [False] * 4)


@pytest.mark.parametrize("crowded", [False, True])
def test_in_a_parallel_region_the_caller_works_alone(monkeypatch, crowded):
    monkeypatch.setattr(sharing, "get_num_threads", lambda: 2)
    monkeypatch.setattr(openmp, "team", lambda: openmp.Team(lambda: 1, np.zeros(2, np.int64)))
    monkeypatch.setattr(sharing, "team", np.array((0, 2**62 if crowded else 0)))
    assert sharing.hands() == sharing.ALONE


def test_callers_at_the_same_time(team):
    team(3)
    results = []

    def call():
        for _ in range(100):
            done, claims = np.zeros(20, int), np.zeros(1, int)
            sharing.share(count, 20, 1, done, claims)
            results.append((done == 1).all())

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(results) == 400
    assert all(results)
