"""Forks at any moment, while other threads call and compile: every child's calls end, and are right.

    python tests/stress/fork_storm.py [--cases N | --seconds S] [--seed N]

A child that has not ended after a minute has failed.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import warnings
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from anybn.kernels.cpu import values
from stress import calls, program

PATIENCE = 60


def work(random: Random) -> None:
    calls.choose_threads(random)
    call = calls.trained(random)
    call.train()
    assert calls.values(call.state) == call.after
    assert calls.is_right(call)


def compile_something() -> None:
    """Anew, and not from disk."""
    kernel, a = type(values.update_running)(values.update_running.py_func), np.ones(3)
    kernel(a, None, a, 5, 1, 0.1, False, a.copy(), a.copy())


def forked(random: Random) -> str:
    outcome = random.choice(["calling", "calling", "compiling"])
    seed, ended = random.random(), threading.Event()

    def keep_working() -> None:
        other = Random(seed)
        while not ended.is_set():
            compile_something() if outcome == "compiling" else work(other)

    threads = [threading.Thread(target=keep_working, daemon=True) for _ in range(random.choice([1, 2]))]
    for thread in threads:
        thread.start()
    time.sleep(random.uniform(0, 0.1))
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if outcome == "compiling":
                compile_something()
            work(random)
            status = 0
        finally:
            os._exit(status)
    ended.set()
    end = time.monotonic() + PATIENCE
    while not (found := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.kill(child, 9)
            os.waitpid(child, 0)
            raise AssertionError(f"the child hangs: its parent was {outcome}")
        time.sleep(1e-3)
    for thread in threads:
        thread.join()
    assert found[1] == 0, f"the child failed, with status {found[1]}: its parent was {outcome}"
    work(random)
    return outcome


def main() -> int:
    warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)
    return program.run("forks", __doc__, forked, 200)


if __name__ == "__main__":
    sys.exit(main())
