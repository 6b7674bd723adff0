"""One member of the groups: ``python -m groups.member ENGINE RANK FOLDER``, four of them; under MPI it knows its rank.

They are a group of four, and the first two a group of two, so that everything is started once. Each runs pytest on this
folder, and leaves what failed in which test in FOLDER.
"""

import datetime
import json
import os
import sys
import time
from pathlib import Path

import pytest

import anybn
from anybn.conformance import inputs
from groups import Member, images

MEMBERS = 4
#: Seconds that gloo waits, for the pair to compile what nobody has yet.
TIMEOUT = 100


def gloo(rank, folder):
    """(a group of the first two or None, a group of all)"""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=TIMEOUT)
    store = dist.FileStore(str(folder / "store"), MEMBERS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=MEMBERS, timeout=timeout)
    pair = dist.new_group([0, 1])
    return pair if rank < 2 else None, dist.group.WORLD


def mpi(rank, folder):
    from mpi4py import MPI

    pair = MPI.COMM_WORLD.Split(rank < 2)
    return pair if rank < 2 else None, MPI.COMM_WORLD


class Process:
    """The plugin that makes pytest run this member's part of the tests."""

    __name__ = "process"  # by which conftest finds it

    def __init__(self, engine, rank, pair, everybody, folder):
        self.engine, self.results, self.found = engine, folder / f"results-{rank}.json", {}
        self.members = {MEMBERS: Member(engine, rank, MEMBERS, everybody)}
        if pair is not None:
            self.members[2] = Member(engine, rank, 2, pair)

    def pytest_collection_modifyitems(self, items):
        """The pair's first: others would wait for it in between."""
        groups = {item: item.callspec.params["member"] for item in items if "member" in item.fixturenames}
        mine = [item for item, (engine, size) in groups.items() if engine == self.engine and size in self.members]
        items[:] = sorted(mine, key=lambda item: groups[item][1])

    def pytest_runtest_logstart(self, nodeid):
        """One that fails on a member may leave the others waiting, so its name is written before it starts."""
        self.write(nodeid, "it hung, or the process died")

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.write(report.nodeid, report.longreprtext)
        elif report.when == "call":
            self.write(report.nodeid, "")

    def write(self, nodeid, outcome):
        self.found[nodeid.rpartition("/")[2]] = outcome
        self.results.write_text(json.dumps(self.found))


def die(member, folder):
    """The last member dies between two steps; the others get the engine's error, and keep their state."""
    state = anybn.BatchNormState(8)
    x = member.array(member.part(images()))
    anybn.batch_norm(x, state, training=True, group=member.group)
    if member.rank == member.size - 1:
        os._exit(1)
    before, start = inputs.state_values(state), time.monotonic()
    try:
        anybn.batch_norm(x, state, training=True, group=member.group)
        found = "nothing was raised"
    except RuntimeError:  # all of torch's are
        found = "the engine's error"
    outcome = {"raised": found, "same": inputs.state_values(state) == before, "seconds": time.monotonic() - start}
    (folder / f"death-{member.rank}.json").write_text(json.dumps(outcome))
    os._exit(0)  # the connections are gone: there is nothing to leave in order


def main(engine, rank, folder):
    folder = Path(folder)
    if engine == "mpi":
        from mpi4py import MPI

        rank = MPI.COMM_WORLD.Get_rank()
    rank = int(rank)
    process = Process(engine, rank, *{"gloo": gloo, "mpi": mpi}[engine](rank, folder), folder)
    here = str(Path(__file__).parent)
    pytest.main(
        [here, "-q", "--no-summary", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib"],
        plugins=[process],
    )
    if engine == "gloo":  # under MPI, a process that dies takes all others with it
        die(process.members[MEMBERS], folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
