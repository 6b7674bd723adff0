"""Ctrl-C at any moment of a call: its state is as before or as after, nothing is written later, the next call is right.

    python tests/stress/interrupt_storm.py [--cases N | --seconds S] [--seed N] [--compile]

Calls are of NumPy arrays, with a mask and without, and of torch modules, on threads of torch and of our own. With
``--compile``, a case is a process that compiles everything anew and is interrupted then, which takes a minute.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parents[1]))

from stress import calls, program

_FIRST_CALLS = """
import signal, sys, numpy as np
x = np.random.default_rng(0).normal(size=(256, 64)).astype("f4")
x[0, 0] = 0
signal.setitimer(signal.ITIMER_REAL, {delay})
signal.signal(signal.SIGALRM, signal.default_int_handler)
for _ in range(3):
    try:
        import anybn
        y = anybn.batch_norm(x, anybn.BatchNormState(64), training=True)
    except KeyboardInterrupt:
        print("interrupted")
        continue
signal.setitimer(signal.ITIMER_REAL, 0)
import anybn
y, pullback = anybn.batch_norm_vjp(x, anybn.BatchNormState(64), training=True)
x = x.astype("f8")
assert np.abs(y - (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)).max() < 1e-5
assert np.isfinite(pullback(y).x).all()
"""


def first_calls(random: Random) -> str:
    with tempfile.TemporaryDirectory() as cache:
        code = _FIRST_CALLS.format(delay=random.uniform(0.3, 20))
        environment = os.environ | {"NUMBA_CACHE_DIR": cache}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=900, env=environment
        )
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    return "interrupted" if done.stdout else "whole"


def interrupted(random: Random) -> str:
    calls.choose_threads(random)
    call = calls.trained(random)
    start = time.perf_counter()
    call.train()
    calls.reset(call.state)
    delay = random.uniform(0, 1.2) * (time.perf_counter() - start)
    call.out[...] = float("nan")
    outcome = "whole"
    try:
        signal.setitimer(signal.ITIMER_REAL, max(delay, 1e-6))
        call.train()
        signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        outcome = "interrupted"
        signal.setitimer(signal.ITIMER_REAL, 0)
        written = call.out.tobytes()
        time.sleep(2e-3)
        assert call.out.tobytes() == written, "something was written after the call had ended"
    found = calls.values(call.state)
    assert found in (call.before, call.after), "the state is half of one and half of the other"
    calls.reset(call.state)
    call.train()
    assert calls.values(call.state) == call.after
    assert calls.is_right(call)
    return outcome


def main() -> int:
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    if "--compile" in sys.argv:
        sys.argv.remove("--compile")
        return program.run("first calls", __doc__, first_calls, 10)
    return program.run("interrupts", __doc__, interrupted, 1000)


if __name__ == "__main__":
    sys.exit(main())
