"""``python -m anybn bench`` and what benchmarks/speed.py measures with: checks, medians, table and drawing."""

import numpy as np
import pytest

import anybn
from anybn.cli import comparison, timing
from anybn.cli import main as cli

bench = pytest.importorskip("anybn.cli.bench", exc_type=ImportError)

SHAPES = {comparison.FIRST: (6, 5, 4, 3), comparison.LAST: (2, 5, 3, 4, 3), comparison.ROWS: (9, 7)}
SMALL = [comparison.Case(op, layout, shape) for op in comparison.OPS for layout, shape in SHAPES.items()]


@pytest.fixture(autouse=True)
def gradients_and_threads():
    threads = anybn.get_num_threads()
    with comparison.without_grad():
        yield
    anybn.set_num_threads(threads)


def test_cases_are_every_op_on_every_layout():
    cases = comparison.cases()
    assert len(cases) == len({*cases}) == 4 * (2 * len(comparison.IMAGES) + len(comparison.TABLES)) + 1
    assert comparison.cases(["call"]) == [comparison.Case("call", comparison.ROWS, comparison.TINY)]
    assert {case.shape for case in comparison.cases(["backward"], [comparison.LAST])} == {*comparison.IMAGES}
    assert {case.dtype for case in comparison.cases(dtype="float64")} == {"float64"}


def test_layouts_lie_in_memory_as_they_say():
    for layout, shape in SHAPES.items():
        x = comparison.Data.of(comparison.Case("forward", layout, shape)).x
        assert x.shape == shape
        assert (np.moveaxis(x, 1, -1) if layout == comparison.LAST else x).flags.c_contiguous


def test_torch_sees_the_same_memory(torch):
    data = comparison.Data.of(comparison.Case("forward", comparison.LAST, (2, 5, 4, 3), "bfloat16"))
    x = comparison.to_torch(data.x)
    assert x.dtype == torch.bfloat16
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert x.data_ptr() == data.x.ctypes.data


@pytest.mark.parametrize("case", SMALL, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_right_results_pass(case, dtype):
    case = case._replace(dtype=dtype)
    data = comparison.Data.of(case)
    comparison.check(case, data, comparison.anybns(case, data))


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_wrong_results_do_not(case):
    data = comparison.Data.of(case)
    for name, run in comparison.anybns(case, data).items():
        right = run() if isinstance(run(), tuple) else (run(),)
        for i, array in enumerate(right):
            for wrong in (array + 4 * abs(array).max() * 2.0**-23, array * np.nan, array * 2):
                result = tuple(wrong if i == j else a for j, a in enumerate(right))
                with pytest.raises(comparison.WrongResult, match=f"of anybn on {name}"):
                    comparison.check(case, data, {name: lambda result=result: result})


def test_wrong_dtypes_do_not():
    case = comparison.Case("forward", comparison.ROWS, (9, 7), "float64")
    data = comparison.Data.of(case)
    narrow = comparison.anybn_on_numpy(case, data)().astype(np.float32)
    with pytest.raises(comparison.WrongResult, match="is float32"):
        comparison.check(case, data, {"numpy": lambda: narrow})


def test_a_wrong_value_in_the_last_channel_is_found():
    case = comparison.Case("forward", comparison.FIRST, (2, 3, 1024, 1024))  # more than one block of channels
    data = comparison.Data.of(case)
    y = comparison.anybn_on_numpy(case, data)()
    comparison.check(case, data, {"numpy": lambda: y})
    y[-1, -1, -1, -1] += 1e-3
    with pytest.raises(comparison.WrongResult, match="channels from 2"):
        comparison.check(case, data, {"numpy": lambda: y})


def test_nothing_is_timed_before_the_check(monkeypatch):
    monkeypatch.setattr(comparison, "anybn_on_numpy", lambda case, data: lambda: data.x)
    monkeypatch.setattr(timing, "interleaved", lambda *_: pytest.fail("timed"))
    with pytest.raises(comparison.WrongResult):
        comparison.measure(SMALL[0], rounds=1, seconds=0)


def test_every_contestant_runs_equally_often(monkeypatch):
    calls = []
    runs = {name: lambda name=name: calls.append(name) for name in "abc"}
    monkeypatch.setattr(timing, "repeats_of", lambda _: 2)
    timings = timing.interleaved(runs, rounds=5, seconds=0)
    assert [calls.count(name) for name in "abc"] == [5 * 3] * 3  # one that is not timed, and two
    assert len({"".join(calls[i : i + 9]) for i in range(0, 45, 9)}) > 1
    assert {*timings} == {*"abc"}


def test_each_call_follows_directly_upon_its_operation():
    calls = []
    assert timing.time_of(lambda: calls.append("call"), 2, lambda: calls.append("before")) >= 0
    assert calls == ["before", "call"] * 3


@pytest.mark.parametrize("op", comparison.OPS)
@pytest.mark.parametrize("layout", comparison.LAYOUTS)
def test_the_operations_before_write_what_is_there(op, layout):
    case = comparison.Case(op, layout, SHAPES[layout])
    data = comparison.Data.of(case)
    before = [a.copy() for a in data]
    with comparison.without_grad():
        runs = {**comparison.anybns(case, data), **comparison.torch_modules(case, data)}
        for operation in comparison.operations_before(data.dy if op == "backward" else data.x, runs).values():
            operation()
    assert all(np.array_equal(a, b) for a, b in zip(before, data, strict=True))


@pytest.mark.parametrize("layout", comparison.LAYOUTS)
@pytest.mark.parametrize("op", ["forward", "evaluation", "add + relu"])
def test_numpy_alone_is_a_batch_norm(op, layout):
    case = comparison.Case(op, layout, SHAPES[layout])
    data = comparison.Data.of(case)
    found, ours = comparison.obvious(case, data)["numpy alone"](), comparison.anybn_on_numpy(case, data)()
    assert np.allclose(found, ours, rtol=1e-4, atol=1e-4)  # every operation rounds; with a step left out it is 0.1


def test_timing_is_median_and_spread():
    assert timing.summary([4.0, 1.0, 3.0, 2.0, 5.0]) == (3.0, 2 / 3)


def test_the_faster_of_torch_s_ways_counts(torch, monkeypatch):
    times = {
        "numpy": 1.0,
        "torch": 1.0,
        "numpy alone": 1.0,
        "copy": 1.0,
        "fresh copy": 1.0,
        "torch.nn": 3.0,
        "torch.nn in place": 2.0,
    }

    def interleaved(runs, rounds, seconds, before):
        assert {*runs} == {*times} == {*before}
        return {name: timing.Timing(times[name], 0.0) for name in runs}

    monkeypatch.setattr(timing, "interleaved", interleaved)
    case = comparison.Case("add + relu", comparison.ROWS, (9, 7))
    assert comparison.measure(case, rounds=1, seconds=0).timings["torch.nn"] == (2.0, 0.0)


def test_a_busy_machine_is_tried_again(monkeypatch):
    busy = iter([1.0, 0.5, 0.7, 0.0])
    monkeypatch.setattr(timing, "watched", lambda *_: timing.Measured({}, next(busy)))
    monkeypatch.setattr(timing.time, "sleep", lambda _: None)
    assert comparison.measure(SMALL[0], rounds=1, seconds=0, attempts=3).busy == 0.5
    assert comparison.measure(SMALL[0], rounds=1, seconds=0, attempts=3).busy == 0.0


# -- the command -----------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    real = bench.measure
    chosen = [comparison.Case("forward", layout, SHAPES[layout]) for layout in (comparison.FIRST, comparison.ROWS)]
    monkeypatch.setattr(bench, "cases", lambda *_: chosen)
    monkeypatch.setattr(bench, "measure", lambda case, **_: real(case, rounds=1, seconds=0))


@pytest.mark.parametrize("with_torch", [True, False])
def test_bench_prints_a_table_and_draws(with_torch, small, tmp_path, capsys, monkeypatch):
    if with_torch:
        pytest.importorskip("torch")
    monkeypatch.setattr(comparison, "has_torch", lambda: with_torch)
    path = tmp_path / "bars.png"
    assert cli.main(["bench", f"--png={path}"]) == 0
    header, *rows = capsys.readouterr().out.partition("\n\n")[0].splitlines()
    assert ("torch.nn" in header) == with_torch
    assert [row.partition(")")[0] + ")" for row in rows] == [
        str(SHAPES[comparison.FIRST]),
        str(SHAPES[comparison.ROWS]),
    ]
    assert all(row.count(" us ") + row.count(" ms ") >= 2 for row in rows)
    assert path.read_bytes().startswith(b"\x89PNG\r\n")


def test_bench_says_when_the_machine_is_busy(small, tmp_path, capsys, monkeypatch):
    for busy, said in ((0.0, False), (0.9, True)):
        monkeypatch.setattr(bench, "run", lambda _, busy=busy: ({}, busy))
        monkeypatch.setattr(bench, "table_of", lambda _: [("shape",)])
        assert cli.main(["bench", f"--png={tmp_path / 'a.png'}"]) == 0
        assert ("other processes used up to" in capsys.readouterr().out) == said


def test_bench_fails_on_a_wrong_result(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(comparison, "anybn_on_numpy", lambda case, data: lambda: 2 * data.x)
    assert cli.main(["bench", f"--png={tmp_path / 'a.png'}"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "y of anybn on numpy is float32 and" in err
    assert not (tmp_path / "a.png").exists()


def test_bench_refuses_a_folder_that_is_not_there(capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", "--png=no/such/folder/a.png"])
    assert "no folder" in capsys.readouterr().err
