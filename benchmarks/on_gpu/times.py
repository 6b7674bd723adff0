"""Times of kernels beside torch's and a copy, of calls, and of a network."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from on_gpu import machine
from on_gpu.machine import BAR, EPS, Time, call, place, synchronize, timed, where, write

from anybn.kernels.cuda.plan import Launch

#: "step" is of bn + add + relu, by modules. With a mask, torch's time is that without one: it has none.
OPS = ("train", "backward", "evaluate", "step", "masked-train", "masked-backward")
#: Batch norms of ResNet-50 on 64 images, one of its smallest, and a matrix; the first few already say most.
SHAPES: tuple[tuple[int, ...], ...] = (
    (64, 256, 56, 56),
    (64, 512, 28, 28),
    (64, 64, 112, 112),
    (64, 2048, 7, 7),
    (64, 1024, 14, 14),
    (64, 128, 28, 28),
    (64, 512, 7, 7),
    (65536, 1024),
)


def measure_copy() -> None:
    """Of 1 GB within the device: bytes read and written per second, which nothing here can exceed by much."""
    import torch

    source = torch.randn(1 << (10 if machine.options.rehearse else 28), device=place())
    target = torch.empty_like(source)
    found = timed([lambda: target.copy_(source)] * 4)
    rate = 2 * source.nbytes / found.us / 1e6
    write({**where(), "op": "copy", "bytes": 2 * source.nbytes, "us": found.us, "spread": found.spread})
    print(f"copy: {rate:.2f} TB/s ({found.spread:.1%} spread), {where()}")


def time_calls() -> None:
    """Of a module's call on a tensor that computes in no time, in torch and in anybn, which are timed in turns."""
    import torch

    import anybn.torch

    count = 2 if machine.options.rehearse else 300
    x = torch.randn((8, 16), device=place())
    modules = {"torch": torch.nn.BatchNorm1d(16).to(place()), "anybn": anybn.torch.BatchNorm1d(16).to(place())}
    for training, recorded in itertools.product((True, False), repeat=2):
        given = x.clone().requires_grad_(recorded)
        times: dict[str, list[float]] = {name: [] for name in modules}
        for _, (name, module) in itertools.product(range(7), modules.items()):
            module.train(training)
            synchronize()
            start = time.perf_counter()
            with torch.set_grad_enabled(recorded):
                for _ in range(count):
                    y = module(given)
                    if recorded:
                        y.backward(x)
            synchronize()
            times[name].append((time.perf_counter() - start) / count * 1e6)
        ours, theirs = (times[name][1:] for name in ("anybn", "torch"))
        middle, other = statistics.median(ours), statistics.median(theirs)
        what = ("training" if training else "evaluation") + (" and backward" if recorded else "")
        spread = round((max(ours) - min(ours)) / middle, 4)
        row = {"op": f"call: {what}", "shape": [8, 16], "dtype": "float32", "us": middle, "spread": spread}
        write({**where(), **row, "torch_us": other})
        print(f"calls: (8, 16), {what}: {middle:.1f} us, torch {other:.1f} us")


@dataclasses.dataclass(frozen=True)
class Case:
    op: str
    dtype: str
    layout: str
    shape: tuple[int, ...]  # as a user has it, channels second

    @property
    def memory_shape(self) -> tuple[int, int, int]:
        n, channels, *spatial = self.shape
        length = math.prod(spatial)
        return (n, channels, length) if self.layout == "nchw" else (n * length, channels, 1)

    @property
    def least_bytes(self) -> int:
        """Every array read and written once: x and y; dy, x and dx; of bn + add + relu and its backward, x, the
        residual and y, then dy, x, y, dx and the residual's gradient."""
        import torch

        arrays = {"train": 2, "evaluate": 2, "backward": 3, "step": 8}[self.op.removeprefix("masked-")]
        return arrays * math.prod(self.shape) * getattr(torch, self.dtype).itemsize


def cases() -> Iterator[Case]:
    shapes = SHAPES
    if machine.options.rehearse:
        shapes = ((4, 6, 8, 8), (33, 10))
    for shape, op, dtype, layout in itertools.product(
        shapes, machine.options.op, machine.options.dtype, machine.options.layout
    ):
        if op.startswith("masked") and shape in SHAPES[1:-1]:  # a few say enough
            continue
        if len(shape) == 4 or layout == "nhwc":
            yield Case(op, dtype, layout if len(shape) == 4 else "nc", shape)


class Arrays(NamedTuple):
    xs: list[Any]
    dy: Any
    residual: Any
    y: Any
    weight: Any
    bias: Any


def arrays_of(case: Case) -> Arrays:
    """x as often as it takes for all of them not to fit the L2 cache."""
    import torch

    dtype, channels = getattr(torch, case.dtype), case.shape[1]
    cache = 1024 if machine.options.rehearse else torch.cuda.get_device_properties(0).L2_cache_size
    copies = max(2, min(32, 3 * cache // (math.prod(case.shape) * dtype.itemsize) + 1))

    def values(mean: float) -> Any:
        a = (torch.randn(case.shape, device=place()) + mean).to(dtype)
        return a.to(memory_format=torch.channels_last) if case.layout == "nhwc" else a

    xs = [values(1.0) for _ in range(copies)]
    weight, bias = torch.rand(channels, device=place()) + 0.5, torch.randn(channels, device=place())
    return Arrays(xs, values(0.0), values(0.0), torch.empty_like(xs[0]), weight, bias)


def along(a: Any, x: Any) -> Any:
    return a.double().view([1, -1, *[1] * (x.ndim - 2)])


def error_of(found: Any, expected: Any) -> float:
    import torch

    worst = ((found.double() - expected).abs() / expected.abs().clamp(min=1)).max()
    return float(worst) / torch.finfo(found.dtype).eps


def kernels_alone(case: Case) -> tuple[Callable[[Any], Any], Callable[[Any], Any], float, str, Arrays]:
    """Of training, evaluation or backward: ours and torch's, by x; our error, our launches, and what they work on."""
    import torch
    import torch.nn.functional as F

    a, op = arrays_of(case), case.op.removeprefix("masked-")
    x, shape, channels, launched = a.xs[0], case.memory_shape, case.shape[1], list[Launch]()
    mean, var, m2, running_mean, running_var = torch.ones((5, channels), dtype=torch.float64, device=place())
    narrow = running_mean.float(), running_var.float()
    running = {"running_mean": running_mean, "running_var": running_var}
    running |= {f"new_{name}": buffer for name, buffer in running.items()}
    known, keep, count = {"mean": mean, "var": var, "eps": EPS}, 1.0, x.numel() // channels
    if op != case.op:
        shown = torch.rand((x.shape[0], 1, *x.shape[2:]), device=place()) < 0.7
        keep, count = shown.double(), shown.sum()
        known |= {"shown": shown, "shown_count": count, "first_shown": shown.view(torch.uint8).argmax()}

    def forward(x: Any) -> None:
        fields = {"x": x, "y": a.y, "weight": a.weight, "bias": a.bias, **known}
        if op == "evaluate":
            call("evaluate", shape, launched, **fields)
        else:
            call("train", shape, launched, m2=m2, momentum=0.1, ddof=1, **fields, **running)

    axes = tuple(i for i in range(x.ndim) if i != 1)
    xhat = x.double()
    true_mean = mean if op == "evaluate" else (xhat * keep).sum(axes) / count
    xhat = (xhat - along(true_mean, x)) * keep
    true_var = var if op == "evaluate" else xhat.square().sum(axes) / count
    rstd = along((true_var + EPS).rsqrt(), x)
    xhat *= rstd
    forward(x)
    if op != "backward":
        expected = (xhat * along(a.weight, x) + along(a.bias, x)) * keep
        batch = op == "train"
        theirs = lambda x: F.batch_norm(x, *narrow, a.weight, a.bias, batch, 0.1, EPS)  # noqa: E731
        return forward, theirs, error_of(a.y, expected), names_of(launched), a

    dweight, dbias = torch.empty_like(a.weight), torch.empty_like(a.bias)
    fields = {"dy": a.dy, "y": a.y, "weight": a.weight, "dweight": dweight, "dbias": dbias, "training": 1, **known}
    launched.clear()

    def backward(x: Any) -> None:  # other copies of x have other statistics, on which the time does not depend
        call("backward", shape, launched, x=x, **fields)

    backward(x)
    g = a.dy.double() * keep
    g = (g - g.sum(axes, keepdim=True) / count - xhat * (g * xhat).sum(axes, keepdim=True) / count) * keep
    expected = g * rstd * along(a.weight, x)
    _, saved_mean, saved_rstd, reserve = torch.ops.aten._batch_norm_with_update(x, a.weight, a.bias, *narrow, 0.1, EPS)

    def their_backward(x: Any) -> Any:
        saved = saved_mean, saved_rstd, True, EPS, [True] * 3, reserve
        return torch.ops.aten.batch_norm_backward(a.dy, x, a.weight, *narrow, *saved)

    return backward, their_backward, error_of(a.y, expected), names_of(launched), a


def names_of(launched: Sequence[Launch]) -> str:
    return " + ".join(
        f"{one.kernel} {one.grid[0]}x{one.grid[1]} of {math.prod(one.block)}, {one.shared_bytes >> 10} KB"
        for one in launched
    )


def step_of_module(case: Case) -> tuple[Callable[[Any], Any], Callable[[Any], Any], float, str, Arrays]:
    """Forward and backward of bn + add + relu, by modules."""
    import torch
    import torch.nn.functional as F

    import anybn.torch

    a, channels = arrays_of(case), case.shape[1]
    module = torch.nn.BatchNorm2d if len(case.shape) == 4 else torch.nn.BatchNorm1d
    theirs = module(channels, device=place())
    ours = getattr(anybn.torch, module.__name__)(channels, device=place(), activation="relu")
    residual = a.residual.requires_grad_()

    def step(forward: Callable[[Any], Any], own: torch.nn.Module, x: Any) -> Any:
        x = x.detach().requires_grad_()
        y = forward(x)
        return y, torch.autograd.grad(y, (x, residual, own.weight, own.bias), a.dy)

    our_step = lambda x: step(lambda x: ours(x, residual), ours, x)  # noqa: E731
    their_step = lambda x: step(lambda x: F.relu(theirs(x) + residual), theirs, x)  # noqa: E731
    y, (_, dresidual, _, _) = our_step(a.xs[0])
    with torch.no_grad():
        axes = tuple(i for i in range(y.ndim) if i != 1)
        x = a.xs[0].double()
        var, mean = torch.var_mean(x, axes, correction=0)
        expected = ((x - along(mean, x)) * along((var + EPS).rsqrt(), x) + residual.double()).relu()
        error = error_of(y, expected)
        if not torch.equal(dresidual, torch.where(y > 0, a.dy, 0)):
            error = math.nan
    return our_step, their_step, error, "modules", a


def measured(case: Case) -> dict[str, Any]:
    """The fields of a row that depend on the case."""
    import torch

    if case.op == "step":
        ours, theirs, error, launched, a = step_of_module(case)
    else:
        with torch.no_grad():
            ours, theirs, error, launched, a = kernels_alone(case)
    with contextlib.nullcontext() if case.op == "step" else torch.no_grad():
        found, other = (timed([functools.partial(of, x) for x in a.xs]) for of in (ours, theirs))
        with torch.no_grad():
            copy = timed([lambda x=x: a.y.copy_(x) for x in a.xs])
    return {
        "kernel": launched,
        "bytes": case.least_bytes,
        "us": found.us,
        "spread": found.spread,
        "torch_us": other.us,
        "torch_spread": other.spread,
        "copy_us": copy.us,
        "error_eps": round(error, 4),
    }


def bench() -> None:
    import torch

    here, wrong = where(), []
    for case in cases():
        try:
            row = {**here, **dataclasses.asdict(case), **measured(case)}
        except Exception as error:
            wrong.append(f"{case}: {type(error).__name__}: {error}")
            if len(wrong) > 5:
                break
            continue
        if not row["error_eps"] <= BAR[case.dtype]:  # NaN is wrong as well
            wrong.append(f"{case}: {row['error_eps']} eps by {row['kernel']}")
            continue
        write(row)
        print(
            f"{case.op:16}{case.dtype:9}{case.layout:5}{case.shape!s:20}{row['us']:8.1f} us"
            f" torch {row['torch_us']:8.1f}  copy {row['copy_us']:8.1f}  error {row['error_eps']:.2f}  {row['kernel']}",
            flush=True,
        )
        if not machine.options.rehearse:
            torch.cuda.empty_cache()
    assert not wrong, "; ".join(wrong)


def network_step(model: Any, x: Any, target: Any, half: bool) -> None:
    import torch

    model.zero_grad(set_to_none=True)
    with torch.autocast("cuda", torch.bfloat16, enabled=half, cache_enabled=False):
        loss = torch.nn.functional.cross_entropy(model(x), target)
    loss.backward()


def time_network() -> None:
    """A training step of torchvision's ResNet-50 on 64 images, its batch norms torch's or anybn's: forward and
    backward, queued by Python and replayed from a graph."""
    import torch

    import anybn.torch

    if machine.options.rehearse:
        return
    import torchvision

    for dtype, layout, kind in (
        ("bfloat16", "nhwc", torch.channels_last),
        ("bfloat16", "nchw", torch.contiguous_format),
        ("float32", "nchw", torch.contiguous_format),
    ):
        x = torch.randn((64, 3, 224, 224), device="cuda").to(memory_format=kind)
        target = torch.randint(1000, (64,), device="cuda")
        times: dict[str, list[Time]] = {}
        for name in ("torch", "anybn"):
            model = torchvision.models.resnet50().cuda().to(memory_format=kind)
            if name == "anybn":
                model = anybn.torch.convert(model)
            step = functools.partial(network_step, model, x, target, dtype == "bfloat16")
            eager = []
            for i in range(13):
                torch.cuda.synchronize()
                start = time.perf_counter()
                step()
                torch.cuda.synchronize()
                if i > 2:
                    eager.append((time.perf_counter() - start) * 1e6)
            middle = statistics.median(eager)
            times[name] = [Time(middle, (max(eager) - min(eager)) / middle), timed([step] * 2)]
            del model, step
            torch.cuda.empty_cache()
        for i, how in enumerate(("queued by Python", "replayed")):
            ours, theirs = times["anybn"][i], times["torch"][i]
            row = {"op": f"resnet50 step, {how}", "dtype": dtype, "layout": layout, "shape": list(x.shape)}
            times_of = {"us": ours.us, "spread": ours.spread, "torch_us": theirs.us, "torch_spread": theirs.spread}
            write({**where(), **row, **times_of})
