"""What programs have in common: a bounded number of cases or seconds, a seed, a line that tells what came of them."""

from __future__ import annotations

import argparse
import faulthandler
import itertools
import time
import traceback
from collections import Counter
from collections.abc import Callable
from random import Random


def run(name: str, description: str, case: Callable[[Random], str], cases: int) -> int:
    """Calls ``case(random)`` for each; what it returns is counted, what it raises is a failure. The exit status.

    A case depends on the seed and its number alone.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--cases", type=int, default=cases)
    parser.add_argument("--seconds", type=float, help="in place of a number of cases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first case")
    options = parser.parse_args()
    faulthandler.enable()
    start, tally, failures = time.monotonic(), Counter(), 0
    numbers = itertools.count(options.first) if options.seconds else range(options.first, options.first + options.cases)
    for number in numbers:
        if options.seconds and time.monotonic() - start > options.seconds:
            break
        try:
            tally[case(Random(f"{options.seed} {number}"))] += 1
        except Exception:
            failures += 1
            print(f"case {number} with seed {options.seed}:\n{traceback.format_exc()}", flush=True)
    counts = ", ".join(f"{n} {outcome}" for outcome, n in tally.most_common())
    total, seconds = tally.total() + failures, time.monotonic() - start
    print(f"{name}: {total} cases with seed {options.seed}: {counts}, {failures} failed, {seconds:.0f} s")
    return failures > 0
