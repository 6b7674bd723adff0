"""The tests of this folder, as pytest sees them: it starts the members, which run them, and reports what they found."""

import fcntl
import itertools
import json
import os
import sys

import pytest

from groups.member import MEMBERS
from groups.processes import finished, mpiexec


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "members(engine, sizes): of the groups that run a test, where not all of them do"
    )


def pytest_generate_tests(metafunc):
    """By every engine, in a group of two and one of four."""
    if "member" in metafunc.fixturenames:
        mark = metafunc.definition.get_closest_marker("members")
        engines, sizes = mark.args if mark and mark.args else ("gloo", "mpi"), (2, MEMBERS)
        groups = list(itertools.product(engines, mark.kwargs.get("sizes", sizes) if mark else sizes))
        metafunc.parametrize("member", groups, ids=[f"{engine}-{size}" for engine, size in groups], indirect=True)


@pytest.fixture
def member(request):
    """In a member, what it knows of itself; else, what the members found, and what they printed."""
    engine, size = request.param
    process = request.config.pluginmanager.get_plugin("process")
    return request.getfixturevalue(engine) if process is None else process.members[size]


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """A test that members run fails if it has failed on one of them."""
    if "member" not in pyfuncitem.fixturenames or pyfuncitem.config.pluginmanager.get_plugin("process"):
        return None
    _, size = pyfuncitem.callspec.params["member"]
    folder, printed = pyfuncitem.funcargs["member"]
    for rank in range(size):
        file = folder / f"results-{rank}.json"
        found = json.loads(file.read_text()) if file.exists() else {}
        outcome = found.get(pyfuncitem.nodeid.rpartition("/")[2], "it was not reached")
        if outcome:
            pytest.fail(f"member {rank}: {outcome}\n{printed}", pytrace=False)
    return True


@pytest.fixture(scope="session")
def gloo(tmp_path_factory):
    """The folder of what gloo's processes found, and what they printed."""
    pytest.importorskip("torch", reason="torch: not installed")
    member = [sys.executable, "-m", "groups.member", "gloo"]
    return once("gloo", tmp_path_factory, lambda folder: [[*member, str(rank), folder] for rank in range(MEMBERS)])


@pytest.fixture(scope="session")
def mpi(tmp_path_factory):
    """The same of MPI's."""
    command = [*mpiexec(MEMBERS), sys.executable, "-m", "groups.member", "mpi", "-1"]
    return once("mpi", tmp_path_factory, lambda folder: [[*command, folder]])


def once(engine, tmp_path_factory, commands):
    """Started by one of pytest's workers; the others wait for it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"groups-of-{engine}"
    folder.mkdir(exist_ok=True)
    printed = folder / "printed"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not printed.exists():
            printed.write_text(finished(commands(str(folder))))
    return folder, printed.read_text()
