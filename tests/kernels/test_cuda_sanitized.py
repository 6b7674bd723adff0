"""The kernels in the simulator under ThreadSanitizer and AddressSanitizer: in a cluster, in groups, in two passes.

ThreadSanitizer is told what orders memory on a GPU, and nothing else: so it sees a barrier that is missing even where
no order of threads shows it, and a relaxed one where memory has to be ordered.
"""

from __future__ import annotations

import pytest
from cuda_cpu import sanitized
from cuda_cpu.simulator import needs_compiler

needs_compiler()
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("sanitizer", sanitized.LIBRARIES)
def test_nothing_is_found(sanitizer: str) -> None:
    done = sanitized.run(sanitizer)
    assert done.returncode == 0, done.stderr[:5000]
    assert done.stdout == "all launches have run\n"
    assert "Sanitizer" not in done.stderr


#: What is taken out of batchnorm.cu.
FAULTS = {
    "if (cluster > 1) cluster_sync();\n  for": "the barrier of the cluster before its sums are read",
    "group_sync(c.barriers + BARRIERS_APART * blockIdx.x, round + 1);": "the barrier of a group",
    "__syncthreads();\n  apply_part<Op>(part, Kept": "the barrier after the coefficients, of the second pass",
}


@pytest.mark.parametrize("fault", FAULTS, ids=FAULTS.get)
def test_a_missing_barrier_is_a_race(fault: str) -> None:
    done = sanitized.run("thread", fault)
    assert done.returncode == sanitized.STATUS, done.stdout + done.stderr
    assert "data race" in done.stderr
