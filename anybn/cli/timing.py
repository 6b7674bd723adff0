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

#: How long a contestant runs before it is timed. The threads of OpenMP that torch's turn leaves behind spin for 7.5 ms,
#: on CPUs that the next one needs, then fall asleep, and torch needs a while to wake them.
SETTLE = 0.01

Run = Callable[[], Any]


class Timing(NamedTuple):
    """Seconds; spread is the distance between the quartiles relative to the median."""

    median: float
    spread: float


class Measured(NamedTuple):
    timings: dict[str, Timing]
    busy: float
    """How many CPUs other processes used meanwhile; 0 where the system does not tell."""


def quietest(runs: Mapping[str, Run], rounds: int, seconds: float, settle: float, attempts: int) -> Measured:
    """On a busy machine it is tried again, and the quietest attempt counts."""
    best = watched(runs, rounds, seconds, settle)
    for _ in range(attempts - 1):
        if best.busy <= QUIET:
            break
        time.sleep(5)
        best = min(best, watched(runs, rounds, seconds, settle), key=lambda measured: measured.busy)
    return best


def watched(runs: Mapping[str, Run], rounds: int, seconds: float, settle: float) -> Measured:
    start, before = time.perf_counter(), seconds_of_others()
    timings = interleaved(runs, rounds, seconds, settle)
    return Measured(timings, (seconds_of_others() - before) / (time.perf_counter() - start))


def seconds_of_others() -> float:
    """CPU time of all other processes since the machine started, as far as the system tells."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _, _, *interrupts_and_steal = map(int, stat.read_text().split(maxsplit=9)[1:9])
    return (user + nice + system + sum(interrupts_and_steal)) / os.sysconf("SC_CLK_TCK") - time.process_time()


def interleaved(runs: Mapping[str, Run], rounds: int, seconds: float, settle: float) -> dict[str, Timing]:
    """Each one turn a round, in random order: whatever else the machine does then meets all of them alike."""
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
                times[names[i]].append(time_of(runs[names[i]], repeats[names[i]], settle))
    finally:
        if enabled:
            gc.enable()
    return {name: summary(values) for name, values in times.items()}


def summary(seconds: Sequence[float]) -> Timing:
    low, median, high = np.percentile(seconds, (25, 50, 75))
    return Timing(float(median), float((high - low) / median))


def time_of(run: Run, repeats: int, settle: float = 0) -> float:
    """The result of a call is freed before the next one, and freeing it counts.

    Calls that are not timed come first, for so many seconds, and at least one.
    """
    end = time.perf_counter() + settle
    run()
    while time.perf_counter() < end:
        run()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def repeats_of(run: Run) -> int:
    """So many calls that they take 0.2 ms, which the clock and what ran before disturb little."""
    return max(1, math.ceil(2e-4 / min(time_of(run, 1) for _ in range(3))))


def duration(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"
