"""Threads, forks, and the interpreter's end."""

import os
import sys
import textwrap

import pytest

import anybn
from safety import survives

# -- threads ---------------------------------------------------------------------------------------------------------


#: Calls that several threads share, by compiled kernels and by NumPy alone; and what they give.
SHARED = """
    import numpy as np, anybn

    x = np.random.default_rng(0).normal(size=(64, 1 << 14)).astype("f4")
    mask = np.ones(64, bool)

    def compiled():
        return anybn.batch_norm(x, anybn.BatchNormState(1 << 14), training=True)

    def masked():
        return anybn.batch_norm(x, anybn.BatchNormState(1 << 14), training=True, mask=mask)

    def right():
        x64 = x.astype("f8")
        expected = (x64 - x64.mean(0)) / np.sqrt(x64.var(0) + 1e-5)
        return all(np.abs(call() - expected).max() < 1e-5 for call in (compiled, masked))
"""


def with_calls(code):
    return textwrap.dedent(SHARED) + textwrap.dedent(code)


@pytest.mark.skipif(sys.platform != "linux", reason="limits threads as Linux does")
def test_no_threads_to_be_had():
    """The caller works alone."""
    pytest.importorskip("numba", reason="numba: not installed")
    survives(
        with_calls("""
        import os, resource, threading
        from anybn.kernels.cpu import pool
        anybn.set_num_threads(2)
        assert right()  # what is compiled, and read from disk, is
        if os.getuid() == 0:  # whom the limit does not hold for
            os.setuid(65534)
        helpers = pool._helpers  # which are there yet, and look at it
        pool._renew()  # as in a forked child: there are none
        resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
        anybn.set_num_threads(4)
        try:
            threading.Thread(target=print).start()
        except RuntimeError:
            assert right() and right()
        else:
            raise AssertionError("there is no limit")
        """)
    )


@pytest.mark.parametrize("when", ["at exit", "after the main thread has ended", "first at exit"])
def test_work_while_the_interpreter_ends(when):
    code = {
        "at exit": "import atexit; atexit.register(lambda: print(right())); right()",
        "after the main thread has ended": (
            "import threading\n"
            "def wait_and_work():\n"
            "    threading.main_thread().join()\n"
            "    print(right())\n"
            "threading.Thread(target=wait_and_work).start()"
        ),
        "first at exit": "import atexit; atexit.register(lambda: print(right()))",
    }[when]
    assert survives(with_calls(f"anybn.set_num_threads(3)\n{code}")) == "True\n"


@pytest.mark.parametrize("first", [True, False])
def test_calls_while_objects_die_with_the_interpreter(first):
    """Python may have let go of what a first call needs: what counts is that it ends."""
    survives(
        with_calls(f"""
        class Owner:
            def __del__(self):
                try:
                    print(right())
                except ImportError as error:
                    assert "Python is likely shutting down" in str(error)
        anybn.set_num_threads(3)
        if not {first}:
            right()
        owner = Owner()
        """)
    )


@pytest.mark.parametrize("pause", [0, 0.1], ids=["awake", "asleep"])
@pytest.mark.parametrize("torch", ["", "import torch"])
def test_the_interpreter_ends_while_threads_wait(torch, pause):
    if torch:
        pytest.importorskip("torch", reason="torch: not installed")
    survives(with_calls(f"{torch}\nimport time\nanybn.set_num_threads(3)\nassert right()\ntime.sleep({pause})"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.parametrize("imports", ["", "import torch; torch.ones(1 << 20).mul(2)"])
@pytest.mark.parametrize("before", ["", "right()"])
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_forked_children_work_on_threads_of_their_own(imports, before):
    if imports:
        pytest.importorskip("torch", reason="torch: not installed")
    survives(
        with_calls(f"""
        import os, warnings
        warnings.simplefilter("ignore")
        {imports}
        anybn.set_num_threads(3)
        {before}
        child = os.fork()
        if child == 0:
            os._exit(not (right() and right()))
        assert right()
        assert os.waitpid(child, 0)[1] == 0
        """)
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_imported_in_a_forked_child(torch):
    """What torch did before the fork, nobody has seen."""
    survives(
        """
        import os, torch
        torch.ones(1 << 20).mul(2)
        child = os.fork()
        if child == 0:
            import numpy as np, anybn
            y = anybn.batch_norm(np.ones((64, 1 << 14), "f4"), anybn.BatchNormState(1 << 14), training=True)
            os._exit(bool(y.any()))
        assert os.waitpid(child, 0)[1] == 0
        """
    )


def test_torch_says_how_many_threads(torch, monkeypatch):
    before, before_torch = anybn.get_num_threads(), torch.get_num_threads()
    try:
        anybn.set_num_threads(4)
        torch.set_num_threads(1)  # as in a DataLoader's workers
        assert anybn.get_num_threads() == 1
        torch.set_num_threads(3)
        assert anybn.get_num_threads() == 3
        anybn.set_num_threads(2)
        assert anybn.get_num_threads() == 2
    finally:
        torch.set_num_threads(before_torch)
        anybn.set_num_threads(before)


def test_inside_a_parallel_region_the_caller_works_alone(torch):
    openmp = pytest.importorskip("anybn.kernels.cpu.openmp")
    if openmp.team() is None:
        pytest.skip("torch has no OpenMP threads that can be shared here")
    survives(
        with_calls("""
        import ctypes, torch
        from anybn.kernels.cpu import openmp
        torch.set_num_threads(3)
        expected, found, team = compiled(), [], openmp.team()

        @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
        def region(_):
            found.append((team.in_parallel(), np.array_equal(compiled(), expected)))

        ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)(int(team.entries[0]))(
            ctypes.cast(region, ctypes.c_void_p), None, 3, 0
        )
        assert found == [(1, True)] * 3, found
        """)
    )


@pytest.mark.parametrize("kind", ["torch's", "own", "NumPy alone"])
def test_small_numbers_are_flushed_by_all_threads_or_none(torch, kind):
    if not torch.set_flush_denormal(False):
        pytest.skip("the processor cannot")
    counts = survives(f"""
        import numpy as np, torch, anybn
        from anybn.backends import numpy as backend
        from anybn.kernels.cpu import chunked, openmp

        x = np.full((64, 1 << 14), 1e-39, "f4")  # in float32, a number with fewer digits
        state = anybn.BatchNormState(1 << 14, eps=1e-30)
        if {kind!r} == "own":
            openmp.team = lambda: None
        if {kind!r} == "NumPy alone":
            backend.kernels = lambda: chunked
        torch.set_num_threads(2)
        torch.ones(1 << 20).mul(2)
        for flush in (False, True, False):
            anybn.set_num_threads(2)
            anybn.batch_norm(x, state)  # threads that were there before
            torch.set_flush_denormal(flush)
            found = set()
            for threads in (1, 2) * 20:
                anybn.set_num_threads(threads)
                y = anybn.batch_norm(x, state)
                found.add(int((y.view("i4") != 0).sum()) / x.size)
            print(*found)
        torch.set_flush_denormal(True)
        anybn.batch_norm(x, state)
        torch.set_flush_denormal(False)
        assert (torch.full((1 << 20,), 1e-39) * 1).all()  # torch's threads are as they were
    """)
    assert counts == "1.0\n0.0\n1.0\n"


# -- compiling -------------------------------------------------------------------------------------------------------


def test_without_compiled_kernels():
    pytest.importorskip("numba", reason="numba: not installed")
    assert survives(with_calls("print(right())"), NUMBA_DISABLE_JIT="1") == "True\n"


def test_float16_for_a_processor_that_does_not_convert_it():
    pytest.importorskip("numba", reason="numba: not installed")
    code = """
        import numpy as np, anybn
        x = np.random.default_rng(0).normal(size=(16, 4)).astype("f2")
        y = anybn.batch_norm(x, anybn.BatchNormState(4), training=True)
        x = x.astype("f8")
        expected = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
        print(np.abs(y - expected).max() < 2e-3)
    """
    assert survives(code, NUMBA_CPU_NAME="generic") == "True\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_fork_while_another_thread_compiles(tmp_path):
    pytest.importorskip("numba", reason="numba: not installed")
    survives(
        with_calls("""
        import os, threading, time
        from numba.core.compiler_lock import global_compiler_lock
        compiling = threading.Thread(target=right)
        compiling.start()
        while compiling.is_alive() and not (taken := not global_compiler_lock._lock.acquire(blocking=False)):
            global_compiler_lock._lock.release()
            time.sleep(0.001)
        assert taken
        child = os.fork()
        if child == 0:
            os._exit(not right())
        assert os.waitpid(child, 0)[1] == 0
        compiling.join()
        assert right()
        """),
        NUMBA_CACHE_DIR=str(tmp_path),
    )
