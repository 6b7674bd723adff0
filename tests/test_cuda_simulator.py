"""That the simulator, on which the tests of the kernels rest, sees what is wrong with a kernel."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_cpu.simulator import H200, SCHEDULES, Guarded, Module, SimulatorError, gpu, needs_compiler

from anybn.backends import _cuda
from anybn.backends._cuda_plan import Launch

needs_compiler()


def run(body: str, schedule: int = 0, shared_bytes: int = 1024, block: int = 64, cluster: int = 1) -> np.ndarray:
    """64 floats that a kernel with this body has written to, after ones."""
    source = "struct Call { float* p; };\n__global__ void kernel(const Call c) { float* p = c.p; " + body + " }"
    out = Guarded(np.ones(64, np.float32))
    arguments = np.array(out.pointer, np.uint64)
    launch = Launch("kernel", (cluster, 1), (block, 1), shared_bytes, cluster)
    Module(["kernel"], source).run(launch, arguments, schedule)
    out.check()
    return out.array


REVERSED = """
    float* shared = reinterpret_cast<float*>(shared_memory());
    shared[threadIdx.x] = threadIdx.x;
    {barrier}
    p[threadIdx.x] = shared[63 - threadIdx.x];
"""


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_barrier_orders_threads(schedule: int) -> None:
    assert run(REVERSED.format(barrier="__syncthreads();"), schedule).tolist() == list(range(63, -1, -1))


def test_a_missing_barrier_shows_in_the_result() -> None:
    results = [run(REVERSED.format(barrier=""), schedule) for schedule in SCHEDULES]
    assert all(np.isnan(result).any() for result in results)  # shared memory is NaN before it is written


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_barrier_that_not_all_threads_reach(schedule: int) -> None:
    with pytest.raises(SimulatorError, match=r"divergent barrier: threads wait at .*__syncthreads"):
        run("if (threadIdx.x < 40) __syncthreads();", schedule)


def test_writing_beyond_shared_memory() -> None:
    with pytest.raises(SimulatorError, match="beyond its shared memory"):
        run("reinterpret_cast<float*>(shared_memory())[threadIdx.x] = 1;", shared_bytes=63 * 4)


def test_writing_outside_of_an_array() -> None:
    with pytest.raises(AssertionError, match="outside of an array"):
        run("p[threadIdx.x + 1] = 1;")


def test_a_misaligned_vector() -> None:
    pair = "struct alignas(8) Pair { float a, b; }; *reinterpret_cast<Pair*>(p + OFFSET) = {2, 3};"
    assert run(pair.replace("OFFSET", "2"))[2:4].tolist() == [2, 3]
    with pytest.raises(SimulatorError, match="misaligned"):
        run(pair.replace("OFFSET", "1"))


def test_shuffles_and_shared_memory_of_a_cluster() -> None:
    body = """
        double* shared = reinterpret_cast<double*>(shared_memory());
        double lane = __shfl_xor_sync(~0u, double(threadIdx.x), 1);
        if (threadIdx.x == 0) shared[0] = lane + 10 * blockIdx.x;
        cluster_sync();
        if (blockIdx.x == 1 && threadIdx.x < 4) p[threadIdx.x] = of_rank(shared, threadIdx.x);
        cluster_sync();
    """
    for schedule in SCHEDULES:
        assert run(body, schedule, cluster=4)[:5].tolist() == [1, 11, 21, 31, 1]


@pytest.mark.parametrize(("block", "shared_bytes"), [(2048, 0), (48, 0), (64, 228 * 1024)])
def test_launches_that_no_gpu_takes(block: int, shared_bytes: int) -> None:
    with pytest.raises(SimulatorError, match="no GPU takes"):
        run("", block=block, shared_bytes=shared_bytes)


#: What is taken out of batchnorm.cu, and how the simulator answers.
FAULTS = {
    "__syncthreads();\n  for (int t = thread; t < columns; t += threads) {\n    for (int w": "a barrier after the sums",
    "__syncthreads();\n  if (part.has_channel()) normalize_part(part, kept": "a barrier after the coefficients",
    "if (cluster > 1) cluster_sync();\n  for": "the barrier of the cluster before its sums are read",
    "if (cluster > 1) cluster_sync();  // the others": "the barrier of the cluster before a block ends",
}


@pytest.mark.parametrize("fault", FAULTS, ids=FAULTS.get)
def test_barriers_of_the_kernels_are_needed(fault: str) -> None:
    source = _cuda.SOURCE.read_text()
    assert fault in source
    broken = Module(["train<float, 1, false, 2>"], source.replace(fault, fault.partition(";")[2]))
    x = np.random.default_rng(0).standard_normal((33, 4, 49)).astype(np.float32)
    results = []
    for schedule in SCHEDULES:
        y, statistics = np.full_like(x, np.nan), np.full((3, 4), np.nan)
        mean, var, m2 = (row.ctypes.data for row in statistics)
        fields = {"x": x.ctypes.data, "y": y.ctypes.data, "mean": mean, "var": var, "m2": m2, "eps": 1e-5}
        right = gpu(H200)
        _cuda.call("train", right, x.shape, "float32", **fields)
        expected = y.copy()
        wrong = right._replace(launch=lambda launch, record, s=schedule: broken.run(two_blocks(launch), record, s))
        _cuda.call("train", wrong, x.shape, "float32", **fields)
        results.append(np.array_equal(y, expected))
    assert not all(results), "no schedule has shown the fault"


def two_blocks(launch: Launch) -> Launch:
    """The launch, on clusters of two."""
    kernel = launch.kernel[: launch.kernel.rindex(",")] + ", 2>"
    return launch._replace(kernel=kernel, grid=(launch.grid[0] // launch.cluster * 2, 1), cluster=2)
