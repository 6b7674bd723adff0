"""What the benchmarks measure: anybn, torch's modules and plain copies on the same data, and the check of results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Any, NamedTuple, Self

import numpy as np

import anybn
from anybn._settings import DTYPES, Activation
from anybn.backends.registry import backend_for
from anybn.cli.timing import Measured, Run, quietest
from anybn.conformance import inputs, oracle

OPS = ("forward", "backward", "evaluation", "add + relu", "call")
FIRST, LAST, ROWS = "channels first", "channels last", "(N, C)"
LAYOUTS = (FIRST, LAST, ROWS)
IMAGES = (
    (32, 64, 56, 56),
    (32, 128, 28, 28),
    (32, 256, 14, 14),
    (32, 512, 7, 7),
    (8, 3, 224, 224),
    (16, 64, 112, 112),
    (4, 32, 16, 56, 56),
)
TABLES = ((256, 1024), (8192, 256), (64, 512), (100_000, 40))
TINY = (8, 16)

#: The largest error allowed, in eps of the dtype.
BARS = {name: 0.51 if dtype.itemsize == 2 else 2.0 for name, dtype in DTYPES.items()}


class WrongResult(Exception):
    """A result beyond the accuracy bar, which is not worth timing."""


# -- cases -----------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """What is computed, and on what: shape is (N, C, *spatial) in every layout."""

    op: str
    layout: str
    shape: tuple[int, ...]
    dtype: str = "float32"

    def __str__(self) -> str:
        return f"{self.op}, {self.layout}, {self.shape}, {self.dtype}"


def cases(ops: Sequence[str] = OPS, layouts: Sequence[str] = LAYOUTS, dtype: str = "float32") -> list[Case]:
    """Every op on every layout and shape; ``call`` is one training forward of a tiny batch, which is (N, C)."""
    shapes = {FIRST: IMAGES, LAST: IMAGES, ROWS: TABLES}
    return [
        Case(op, layout, shape, dtype)
        for op in ops
        for layout in layouts
        for shape in (shapes[layout] if op != "call" else (TINY,) if layout == ROWS else ())
    ]


class Data(NamedTuple):
    """NumPy arrays of shape (N, C, *spatial), lying in memory as the case's layout has it, and of shape (C,)."""

    x: np.ndarray
    dy: np.ndarray
    residual: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    running_mean: np.ndarray
    running_var: np.ndarray

    @classmethod
    def of(cls, case: Case) -> Self:
        def array(seed: int) -> np.ndarray:
            values = inputs.cast(inputs.normal(case.shape, seed), case.dtype)
            if case.layout != LAST:
                return values
            return np.moveaxis(np.ascontiguousarray(np.moveaxis(values, 1, -1)), -1, 1)

        rng = np.random.default_rng(3)
        channels, dtype = case.shape[1], parameter_dtype(case)
        weight, running_var = rng.uniform(0.5, 2, (2, channels))
        bias, running_mean = rng.standard_normal((2, channels))
        return cls(array(0), array(1), array(2), weight.astype(dtype), bias.astype(dtype), running_mean, running_var)

    def channels(self, which: slice) -> Data:
        return Data(*(a[:, which] if a.ndim > 1 else a[which] for a in self))


def parameter_dtype(case: Case) -> str:
    """Of weight and bias."""
    return "float64" if case.dtype == "float64" else "float32"


# -- contestants -----------------------------------------------------------------------------------------------


def as_users_have_it(case: Case, a: np.ndarray) -> np.ndarray:
    """(N, C, *spatial) -> (N, *spatial, C) where the channels are last in memory."""
    return np.moveaxis(a, 1, -1) if case.layout == LAST else a


def anybn_on_numpy(case: Case, data: Data) -> Run:
    x, dy, residual = (as_users_have_it(case, a) for a in data[:3])
    activation: Activation = "relu" if case.op == "add + relu" else None
    axis = -1 if case.layout == LAST else 1
    bn = anybn.BatchNorm(case.shape[1], axis=axis, activation=activation, dtype=parameter_dtype(case))
    for name in ("weight", "bias", "running_mean", "running_var"):
        setattr(bn.state, name, getattr(data, name))
    bn.train(case.op != "evaluation")
    if case.op == "backward":
        _, pullback = bn.vjp(x)
        return lambda: pullback(dy)[:3]
    if case.op == "add + relu":
        return lambda: bn(x, residual=residual)
    return lambda: bn(x)


def to_torch(a: np.ndarray) -> Any:
    """A tensor on a's own memory; with channels last in memory that is torch's memory format of this name."""
    import torch

    if a.dtype.name == "bfloat16":
        return torch.from_numpy(a.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(a)


def torch_gradients(bn: Callable[[Any], Any], x: Any, weight: Any, bias: Any, dy: Any) -> Run:
    import torch

    wanted = [a.requires_grad_() for a in (x, weight, bias)]
    with torch.enable_grad():
        y = bn(x)
    return lambda: torch.autograd.grad(y, wanted, dy, retain_graph=True)


def torch_module(case: Case, data: Data, convert: Callable[[Any], Any] = lambda module: module) -> Any:
    """torch's module, converted before anything is loaded: its own running statistics are float32."""
    import torch

    kind = {2: torch.nn.BatchNorm1d, 4: torch.nn.BatchNorm2d, 5: torch.nn.BatchNorm3d}[len(case.shape)]
    bn = convert(kind(case.shape[1], dtype=getattr(torch, parameter_dtype(case)))).train(case.op != "evaluation")
    named = {name: torch.tensor(getattr(data, name)) for name in ("weight", "bias", "running_mean", "running_var")}
    bn.load_state_dict(named, strict=False)
    return bn


def anybn_on_torch(case: Case, data: Data) -> Run:
    """torch's module after `anybn.torch.convert`."""
    x, dy, residual = map(to_torch, data[:3])
    bn = torch_module(case, data, anybn.torch.convert)
    if case.op == "backward":
        return torch_gradients(bn, x, bn.weight, bn.bias, dy)
    if case.op == "add + relu":
        return lambda: bn(x, residual, "relu")
    return lambda: bn(x)


def torch_modules(case: Case, data: Data) -> dict[str, Run]:
    """torch's own module, where torch is installed; for bn + add + relu in two ways."""
    if not has_torch():
        return {}
    x, dy, residual = map(to_torch, data[:3])
    bn = torch_module(case, data)
    if case.op == "backward":
        return {"torch.nn": torch_gradients(bn, x, bn.weight, bn.bias, dy)}
    if case.op == "add + relu":
        return {
            "torch.nn": lambda: (bn(x) + residual).relu_(),
            "torch.nn in place": lambda: bn(x).add_(residual).relu_(),
        }
    return {"torch.nn": lambda: bn(x)}


def copies(data: Data) -> dict[str, Run]:
    """Of x: into memory that is there already, and into fresh memory as a new y needs it; on one thread."""
    memory = data.x.copy(order="K")
    return {"copy": lambda: np.copyto(memory, data.x), "fresh copy": lambda: data.x.copy(order="K")}


def obvious(case: Case, data: Data) -> dict[str, Run]:
    """What somebody writes with NumPy who has no library for it, as ``numpy alone``; not with 16 bits."""
    if case.dtype not in ("float32", "float64") or case.op == "backward":
        return {}
    x, residual = as_users_have_it(case, data.x), as_users_have_it(case, data.residual)
    axis = x.ndim - 1 if case.layout == LAST else 1
    axes = tuple(i for i in range(x.ndim) if i != axis)
    shape = tuple(size if i == axis else 1 for i, size in enumerate(x.shape))
    weight, bias, *running = (a.reshape(shape).astype(x.dtype) for a in data[3:])

    def normalized(mean: np.ndarray, var: np.ndarray) -> np.ndarray:
        return (x - mean) / np.sqrt(var + 1e-5) * weight + bias

    def train() -> np.ndarray:
        mean, var = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
        running[0] = 0.9 * running[0] + 0.1 * mean
        running[1] = 0.9 * running[1] + 0.1 * var
        y = normalized(mean, var)
        return np.maximum(y + residual, 0) if case.op == "add + relu" else y

    return {"numpy alone": (lambda: normalized(*running)) if case.op == "evaluation" else train}


def operations_before(array: np.ndarray, runs: Iterable[str]) -> dict[str, Run]:
    """For each of the runs, an operation of its library that writes the array which the run reads, x or dy, as a layer
    before it does in a net: torch's threads are awake after it, and the values are in the caches as far as they fit."""
    values = array.copy(order="K")

    def by_numpy() -> None:
        np.copyto(array, values)

    found: dict[str, Run] = dict.fromkeys(runs, by_numpy)
    if has_torch():
        import torch

        written, source = to_torch(array), to_torch(values)
        found |= {name: lambda: torch.mul(source, 1.0, out=written) for name in found if name.startswith("torch")}
    return found


def has_torch() -> bool:
    return find_spec("torch") is not None


def use_threads(count: int) -> None:
    """The same number for anybn and torch."""
    anybn.set_num_threads(count)
    if has_torch():
        import torch

        torch.set_num_threads(count)


def anybns(case: Case, data: Data) -> dict[str, Run]:
    """By the library whose arrays they take."""
    runs = {"numpy": anybn_on_numpy(case, data)}
    return runs | {"torch": anybn_on_torch(case, data)} if has_torch() else runs


def without_grad() -> AbstractContextManager[Any]:
    """Nothing is recorded but where a backward pass needs it."""
    if not has_torch():
        return nullcontext()
    import torch

    return torch.no_grad()


# -- checks ----------------------------------------------------------------------------------------------------


def check(case: Case, data: Data, runs: Mapping[str, Run]) -> None:
    """Raise WrongResult unless each of the runs returns the right y, or the right gradients of x, weight and bias."""
    results = {name: in_numpy(case, name, run()) for name, run in runs.items()}
    block = max(1, 2**20 * case.shape[1] // data.x.size)  # long doubles of all channels would fill the memory
    for start in range(0, case.shape[1], block):
        which = slice(start, start + block)
        expected = [*reference(case, data.channels(which))]
        for name, arrays in results.items():
            for array, (what, values, dtype, size) in zip(arrays, expected, strict=True):
                part = array[:, which] if array.ndim > 1 else array[which]
                error = oracle.error(part, values, dtype, size)
                if array.dtype.name != dtype or not error <= BARS[dtype]:
                    where = f"{array.dtype} and {error:.3g} eps off in the {block} channels from {start}"
                    raise WrongResult(f"{case}: {what} of anybn on {name} is {where}; the bar is {BARS[dtype]}")


def in_numpy(case: Case, library: str, result: Any) -> list[np.ndarray]:
    arrays = [backend_for(a).to_numpy(a) for a in (result if isinstance(result, tuple) else (result,))]
    if library == "numpy" and case.layout == LAST:
        return [np.moveaxis(arrays[0], -1, 1), *arrays[1:]]
    return arrays


def reference(case: Case, data: Data) -> Iterator[tuple[str, np.ndarray, str, Any]]:
    """(name, values in long double, dtype, the size by which an error is judged) of each result.

    Nothing is wider than float64, so there an error is judged by the size of what was added up.
    """
    wide, dtype = case.dtype != "float64", parameter_dtype(case)
    mean: Any = data.running_mean
    var, count = data.running_var, None
    if case.op != "evaluation":
        statistics = oracle.statistics(data.x)
        mean, var, count = statistics.mean, statistics.var(), statistics.count
    if case.op == "backward":
        grads = oracle.gradients(data.dy, data.x, mean, var, count=count, weight=data.weight)
        yield "dx", grads.x, case.dtype, 1 if wide else np.maximum(1, grads.x_size * (1 + abs(data.dy)))
        yield "dweight", grads.weight, dtype, 1 if wide else grads.weight_size
        yield "dbias", grads.bias, dtype, 1 if wide else grads.bias_size
    else:
        fused = case.op == "add + relu"
        residual = data.residual if fused else None
        y = oracle.normalize(
            data.x, mean, var, weight=data.weight, bias=data.bias, residual=residual, relu=fused
        )  # fmt: skip
        yield "y", y, case.dtype, 1 if wide else np.abs(data.weight).max() * 5 + np.abs(data.bias).max()


# -- measuring -------------------------------------------------------------------------------------------------


def measure(
    case: Case,
    *,
    rounds: int,
    seconds: float,
    attempts: int = 1,
    rested: bool = False,
    others: Callable[[Case, Data], Mapping[str, Run]] = lambda *_: {},
) -> Measured:
    """Of anybn (``numpy``, ``torch``), torch's module (``torch.nn``), the copies and others; the results come first.

    Each call follows directly upon an operation of its library, unless they are rested: see `operations_before`.
    Raises WrongResult. There are at least so many rounds, and as many as start within so many seconds. On a busy
    machine it is tried again, and the quietest attempt counts.
    """
    with without_grad():
        data = Data.of(case)
        ours = anybns(case, data)
        check(case, data, ours)
        runs = {**ours, **torch_modules(case, data), **obvious(case, data), **others(case, data), **copies(data)}
        before = {} if rested else operations_before(data.dy if case.op == "backward" else data.x, runs)
        measured = quietest(runs, rounds, seconds, attempts, before)
    if in_place := measured.timings.pop("torch.nn in place", None):
        measured.timings["torch.nn"] = min(measured.timings["torch.nn"], in_place)
    return measured
