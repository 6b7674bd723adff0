"""Batch norm of an array several times larger than the memory it may use, and what memory it took.

    python benchmarks/out_of_core.py                       # 3 GiB, 450 MiB for a process; two minutes, 9 GiB of disk
    python benchmarks/out_of_core.py --gigabytes 10 --limit 600

Three ways, each in processes of its own: NumPy on memory-mapped files with ``out=``, Dask on threads, and Dask on a
LocalCluster of two workers. The first two run under RLIMIT_DATA, which makes allocating more an error; the workers have
``memory_limit``, past which dask.distributed stops them. About 240 MiB of that is what NumPy, Dask and Numba reserve by
being imported. Training forward and, on Dask, backward; y and dx go to files.
Every result is checked before anything is written to benchmarks/results/out_of_core.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import re
import resource
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

import anybn

HERE = Path(__file__).parent
CHANNELS, SIDE, SAMPLES = 64, 32, 32  # of a chunk: 8 MiB
CHUNK = (SAMPLES, CHANNELS, SIDE, SIDE)
MEAN, STD = 1e3, 3.0


def create(path: Path, chunks: int) -> tuple[np.ndarray, np.ndarray]:
    """Fill a file with chunks; the mean and variance of the channels, from deviations from MEAN in float64."""
    total, squares = np.zeros(CHANNELS), np.zeros(CHANNELS)
    with path.open("wb") as file:
        for i in range(chunks):
            rng = np.random.default_rng(i)
            x = (rng.standard_normal(CHUNK, dtype=np.float32) * STD + MEAN + i / chunks).astype(np.float32)
            file.write(x.tobytes())
            deviation = x.astype(np.float64) - MEAN
            total += deviation.sum((0, 2, 3))
            squares += (deviation**2).sum((0, 2, 3))
    count = chunks * SAMPLES * SIDE * SIDE
    return MEAN + total / count, squares / count - (total / count) ** 2


def read(path: Path, i: int) -> np.ndarray:
    return np.fromfile(path, np.float32, int(np.prod(CHUNK)), offset=i * int(np.prod(CHUNK)) * 4).reshape(CHUNK)


def write(y: np.ndarray, path: Path, block_info: dict) -> np.ndarray:
    descriptor = os.open(path, os.O_WRONLY)
    os.pwrite(descriptor, np.ascontiguousarray(y).data, block_info[0]["chunk-location"][0] * y.nbytes)
    os.close(descriptor)
    return np.zeros((1, 1, 1, 1), np.int8)


def lazy(path: Path, chunks: int):
    """The file as a Dask array, read chunk by chunk."""
    import dask.array as da

    def load(block_info: dict) -> np.ndarray:
        return read(path, block_info[None]["chunk-location"][0])

    sizes = ((SAMPLES,) * chunks, *((size,) for size in CHUNK[1:]))
    return da.map_blocks(load, chunks=sizes, dtype=np.float32, meta=np.empty((0,) * 4, np.float32))


def stored(y, path: Path):
    """A lazy array that writes y to the file when it is computed."""
    return y.map_blocks(write, path, chunks=(1, 1, 1, 1), dtype=np.int8, meta=np.empty((0,) * 4, np.int8)).sum()


def forward_and_backward(files: dict[str, Path], chunks: int, compute) -> dict[str, float]:
    """Seconds, by what was computed."""
    x, dy = lazy(files["x"], chunks), lazy(files["x"], chunks) - np.float32(MEAN)
    state, seconds = anybn.BatchNormState(CHANNELS), {}
    y, pullback = anybn.batch_norm_vjp(x, state, training=True)
    for name, array in (("forward", y), ("backward", pullback(dy).x)):
        start = time.perf_counter()
        compute(stored(array, files[name]))
        seconds[name] = time.perf_counter() - start
    return seconds


def memmap(files: dict[str, Path], chunks: int) -> dict[str, float]:
    shape = (chunks * SAMPLES, *CHUNK[1:])
    x = np.memmap(files["x"], np.float32, "r", shape=shape)
    y = np.memmap(files["forward"], np.float32, "r+", shape=shape)
    start = time.perf_counter()
    anybn.batch_norm(x, anybn.BatchNormState(CHANNELS), training=True, out=y)
    return {"forward": time.perf_counter() - start}


def threads(files: dict[str, Path], chunks: int) -> dict[str, float]:
    return forward_and_backward(files, chunks, lambda a: a.compute(scheduler="threads", num_workers=2))


def limited(way, files: dict[str, Path], chunks: int, limit: int, queue) -> None:
    """In a process of its own: the way's seconds, and the peak of its own memory, files that it maps left out."""
    resource.setrlimit(resource.RLIMIT_DATA, (limit << 20, limit << 20))
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            anonymous = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
            peak[0] = max(peak[0], int(anonymous[1]))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        queue.put((way(files, chunks), peak[0] / 1024))
    except BaseException as error:
        queue.put((error, 0))
    finally:
        done.set()
        watcher.join()


def in_a_process(way, files: dict[str, Path], chunks: int, limit: int) -> tuple[dict[str, float], float]:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=limited, args=(way, files, chunks, limit, queue))
    process.start()
    process.join()
    seconds, peak = queue.get(timeout=10)  # without an answer, it died of more than it could report
    if isinstance(seconds, BaseException):
        raise seconds
    return seconds, peak


def peak_of_process() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def on_a_cluster(files: dict[str, Path], chunks: int, limit: int) -> tuple[dict[str, float], float]:
    """Peak of the larger worker, all of its resident memory."""
    from distributed import Client, LocalCluster

    options = {"n_workers": 2, "threads_per_worker": 1, "memory_limit": f"{limit}MiB", "dashboard_address": ":0"}
    with LocalCluster(**options) as cluster, Client(cluster) as client:
        workers = set(client.scheduler_info()["workers"])
        seconds = forward_and_backward(files, chunks, lambda a: client.compute(a).result())
        peaks = client.run(peak_of_process)
        assert set(peaks) == workers, "a worker ran out of memory and was replaced"
        return seconds, max(peaks.values())


def check(files: dict[str, Path], chunks: int, mean: np.ndarray, var: np.ndarray, names) -> float:
    """The largest error in eps of float32 over some chunks; of dx, in units of 1 / sqrt(var + eps) * |dy|."""

    def along(a):
        return a.reshape(1, -1, 1, 1)

    worst, rstd = 0.0, along(1 / np.sqrt(var + 1e-5))
    # dy = x - MEAN has the sums that the moments of x give: sum(dy) and sum(dy * xhat) per value.
    of_dy, of_dy_xhat = along(mean - MEAN), along(var) * rstd
    for i in {0, 1, chunks // 2, chunks - 1}:
        x = read(files["x"], i).astype(np.float64)
        xhat = (x - along(mean)) * rstd
        expected = {"forward": xhat, "backward": rstd * (x - MEAN - of_dy - xhat * of_dy_xhat)}
        for name in names:
            size = (
                np.maximum(1, np.abs(expected[name])) if name == "forward" else np.maximum(1, rstd * np.abs(x - MEAN))
            )
            error = np.abs(read(files[name], i) - expected[name]) / size
            worst = max(worst, float(error.max()) / 2.0**-23)
    assert worst <= 0.6, f"{worst} eps"  # one rounding, and what these formulas lose in float64
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=3.0, help="size of x")
    parser.add_argument("--limit", type=int, default=450, help="MiB that a process may use")
    arguments = parser.parse_args()
    chunks = round(arguments.gigabytes * 2**30 / (4 * np.prod(CHUNK)))
    size, limit = chunks * int(np.prod(CHUNK)) * 4 / 2**20, arguments.limit
    ways = {
        "NumPy, memmap": (lambda files: in_a_process(memmap, files, chunks, limit), limit),
        "Dask, 2 threads": (lambda files: in_a_process(threads, files, chunks, limit), limit),
        "Dask, LocalCluster of 2": (lambda files: on_a_cluster(files, chunks, limit), 2 * limit),
    }
    assert size >= 3 * 2 * limit, "x should be at least three times what all processes of a way may use"
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / name for name in ("x", "forward", "backward")}
        mean, var = create(files["x"], chunks)
        for name, (way, total) in ways.items():
            for result in ("forward", "backward"):
                with files[result].open("wb") as file:
                    file.truncate(files["x"].stat().st_size)
            seconds, peak = way(files)
            row = {
                "way": name,
                "array_mib": round(size),
                "limit_mib": total,
                "peak_mib_of_a_process": round(peak),
                "seconds": {k: round(v, 1) for k, v in seconds.items()},
                "error_eps": round(check(files, chunks, mean, var, seconds), 2),
            }
            rows.append(row)
            print(row, flush=True)
    packages = ("numpy", "dask", "distributed", "numba")
    result = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs",
        "versions": {"anybn": anybn.__version__, "python": platform.python_version()}
        | {name: version(name) for name in packages},
        "rows": rows,
    }
    (HERE / "results" / "out_of_core.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
