"""That the simulator, on which the tests of the kernels rest, sees what is wrong with a kernel."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cuda_cpu.simulator import H200, SCHEDULES, Grouped, Guarded, Module, SimulatorError, gpu, needs_compiler

from anybn.kernels.cuda import launch as _cuda
from anybn.kernels.cuda.plan import Launch

needs_compiler()


def run(
    body: str, schedule: int = 0, shared_bytes: int = 1024, block: int = 64, cluster: int = 1, **how: Any
) -> np.ndarray:
    """64 floats that a kernel with this body has written to, after ones."""
    source = "struct Call { float* p; };\n__global__ void kernel(const Call c) { float* p = c.p; " + body + " }"
    out = Guarded(np.ones(64, np.float32))
    arguments = np.array(out.pointer, np.uint64)
    launch = Launch("kernel", (cluster, 1), (block, 1), shared_bytes, cluster)._replace(**how)
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


NOBODY_COMES = r"divergent barrier: threads wait at .*a barrier of blocks"


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_barrier_of_blocks_in_global_memory(schedule: int) -> None:
    """In a cooperative launch; in any other, the blocks may come one after the other."""
    body = """
        unsigned long long* barrier = reinterpret_cast<unsigned long long*>(p + 62);
        if (threadIdx.x == 0) {
          p[blockIdx.x] = 10 * blockIdx.x;
          arrive(barrier);
          await(barrier, {blocks});
          p[8 + blockIdx.x] = p[3 - blockIdx.x];
        }
    """
    zero = "if (threadIdx.x == 0 && blockIdx.x == 0) p[62] = p[63] = 0; __syncthreads();"
    grid = {"grid": (4, 1), "cooperative": True}
    if schedule == 0:  # where the first block is the first to run
        found = run(zero + body.replace("{blocks}", "4"), schedule, **grid)
        assert found[8:12].tolist() == [30, 20, 10, 0]
        with pytest.raises(SimulatorError, match=NOBODY_COMES):
            run(zero + body.replace("{blocks}", "4"), schedule, grid=(4, 1))
    with pytest.raises(SimulatorError, match=NOBODY_COMES):
        run(body.replace("{blocks}", "1ull << 63"), schedule, **grid)


@pytest.mark.parametrize(("block", "shared_bytes"), [(2048, 0), (48, 0), (64, 228 * 1024)])
def test_launches_that_no_gpu_takes(block: int, shared_bytes: int) -> None:
    with pytest.raises(SimulatorError, match="no GPU takes"):
        run("", block=block, shared_bytes=shared_bytes)


#: What is taken out of batchnorm.cu, of the kernel of a cluster of two and of that of groups, and what it is.
OF_CLUSTERS = {
    "__syncthreads();\n  if (span == 1)": "a barrier after the sums",
    "__syncthreads();\n  if (cluster > 1) cluster_arrive": "a barrier after the coefficients",
    "if (cluster > 1) cluster_sync();\n  for": "the barrier of the cluster before its sums are read",
    "if (cluster > 1) cluster_wait();  // the others": "the barrier of the cluster before a block ends",
}
OF_GROUPS = {
    "group_sync(c.barriers + BARRIERS_APART * blockIdx.x, round + 1);": "the barrier of a group",
    "__syncthreads();\n  if (threadIdx.x == 0 && threadIdx.y == 0) {\n    arrive": "a barrier before a block counts",
    "await(barrier, static_cast<unsigned long long>(times * gridDim.y));": "the wait for the others of a group",
    "__syncthreads();\n}\n\n/// Groups of gridDim.y": "a barrier after the first thread has waited",
    "__syncthreads();\n    for (int t = thread; t < channels; t += threads) {\n      const": "a barrier after the sums",
    "__syncthreads();\n    apply_part<Op>(part, kept": "a barrier after the coefficients",
    "__syncthreads();\n}\n\n/// A block's shared memory": "a barrier after the columns of a channel",
    "if (threadIdx.x == 0) c.barriers[BARRIERS_APART * blockIdx.x] = 0;": "the start of a barrier at 0",
}


def without(fault: str) -> str:
    source = _cuda.source()
    assert source.count(fault) == 1
    return source.replace(fault, fault.partition(";")[2])


@pytest.mark.parametrize("fault", OF_CLUSTERS, ids=OF_CLUSTERS.get)
def test_barriers_of_a_cluster_are_needed(fault: str) -> None:
    broken = Module(["train<float, 1, false, 2>"], without(fault))

    def on_two_blocks(launch: Launch, record: bytearray, schedule: int) -> None:
        """The launch, on clusters of two."""
        kernel = launch.kernel[: launch.kernel.rindex(",")] + ", 2>"
        grid = launch.grid[0] // launch.cluster * 2, 1
        two = launch._replace(kernel=kernel, grid=grid, cluster=2)
        broken.run(two, np.frombuffer(record, np.uint8), schedule)

    assert not all(unharmed(gpu(H200), on_two_blocks, (7, 4, 251))), "no schedule has shown the fault"


@pytest.mark.parametrize("fault", OF_GROUPS, ids=OF_GROUPS.get)
def test_barriers_of_a_group_are_needed(fault: str) -> None:
    broken = Module(["clear_barriers", "train_group<float, 4, true>"], without(fault))
    device = gpu(Grouped(multiprocessors=3, shared_bytes=60 * 1024, capability=(8, 0)))

    def run_broken(launch: Launch, record: bytearray, schedule: int) -> None:
        broken.run(launch, np.frombuffer(record, np.uint8), schedule)

    found = [good for shape in ((601, 20, 1), (371, 4, 49)) for good in unharmed(device, run_broken, shape)]
    assert not all(found), "no schedule has shown the fault"


def unharmed(right: _cuda.Gpu, run: Any, shape: tuple[int, int, int]) -> list[bool]:
    """Whether y is right under each schedule, with broken kernels."""
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    results = []
    for schedule in range(20):  # most of them shuffled: some faults show in few orders
        y, statistics = np.full_like(x, np.nan), np.full((3, shape[1]), np.nan)
        mean, var, m2 = (row.ctypes.data for row in statistics)
        fields = {"x": x.ctypes.data, "y": y.ctypes.data, "mean": mean, "var": var, "m2": m2, "eps": 1e-5}
        _cuda.call("train", right, x.shape, "float32", **fields)
        expected = y.copy()
        wrong = right._replace(launch=lambda launch, record, s=schedule: run(launch, record, s))
        y.fill(np.nan)
        try:
            _cuda.call("train", wrong, x.shape, "float32", **fields)
        except SimulatorError:
            y.fill(np.nan)
        results.append(np.array_equal(y, expected))
    return results
