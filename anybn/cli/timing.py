"""Medians of interleaved runs, beside what other processes do meanwhile."""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

#: Above so many CPUs that other processes use, a measurement says little: a thread of OpenMP that has to wait for its
#: CPU holds up all others by tens of milliseconds.
QUIET = 0.1

Run = Callable[[], Any]
NOTHING: Mapping[str, Run] = {}


class Timing(NamedTuple):
    """Seconds; spread is the distance between the quartiles relative to the median."""

    median: float
    spread: float


class Measured(NamedTuple):
    timings: dict[str, Timing]
    busy: float
    """How many CPUs other processes used meanwhile; 0 where the system does not tell."""


def quietest(
    runs: Mapping[str, Run], rounds: int, seconds: float, attempts: int, before: Mapping[str, Run] = NOTHING
) -> Measured:
    """On a busy machine it is tried again, and the quietest attempt counts."""
    best = watched(runs, rounds, seconds, before)
    for _ in range(attempts - 1):
        if best.busy <= QUIET:
            break
        time.sleep(5)
        best = min(best, watched(runs, rounds, seconds, before), key=lambda measured: measured.busy)
    return best


def watched(runs: Mapping[str, Run], rounds: int, seconds: float, before: Mapping[str, Run] = NOTHING) -> Measured:
    start, of_others = time.perf_counter(), seconds_of_others()
    timings = interleaved(runs, rounds, seconds, before)
    return Measured(timings, (seconds_of_others() - of_others) / (time.perf_counter() - start))


def seconds_of_others() -> float:
    """CPU time of all other processes since the machine started, as far as the system tells."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _, _, *interrupts_and_steal = map(int, stat.read_text().split(maxsplit=9)[1:9])
    return (user + nice + system + sum(interrupts_and_steal)) / os.sysconf("SC_CLK_TCK") - time.process_time()


def interleaved(
    runs: Mapping[str, Run], rounds: int, seconds: float, before: Mapping[str, Run] = NOTHING
) -> dict[str, Timing]:
    """Each one turn a round, in random order: whatever else the machine does then meets all of them alike.

    ``before`` has what comes directly before each call of a contestant, if anything does.
    """
    rng = np.random.default_rng(0)
    names = [*runs]
    repeats = {name: repeats_of(run) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in names}
    enabled = gc.isenabled()
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        while len(times[names[0]]) < rounds or time.perf_counter() < end:
            for i in rng.permutation(len(names)):
                times[names[i]].append(time_of(runs[names[i]], repeats[names[i]], before.get(names[i])))
    finally:
        if enabled:
            gc.enable()
    return {name: summary(values) for name, values in times.items()}


def summary(seconds: Sequence[float]) -> Timing:
    low, median, high = np.percentile(seconds, (25, 50, 75))
    return Timing(float(median), float((high - low) / median))


def time_of(run: Run, repeats: int, before: Run | None = None) -> float:
    """Seconds of a call, after one that is not timed.

    Each call follows directly upon ``before``, which is not timed either: what a library leaves behind, threads that
    are awake among it, meets the call as it does in a program. The result of a call is freed before the next one, and
    freeing it counts.
    """
    if before is None:
        run()
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - start) / repeats
    before()
    run()
    total = 0.0
    for _ in range(repeats):
        before()
        start = time.perf_counter()
        run()
        total += time.perf_counter() - start
    return total / repeats


def repeats_of(run: Run) -> int:
    """So many calls that they take 0.2 ms, which the clock and what ran before disturb little."""
    return max(1, math.ceil(2e-4 / min(time_of(run, 1) for _ in range(3))))


def duration(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"
