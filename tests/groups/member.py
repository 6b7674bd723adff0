"""One member of the groups: ``python -m groups.member ENGINE RANK FOLDER``, four of them; under MPI it knows its rank.

They are a group of four, and the first two a group of two, so that everything is started once. What failed in which
case is left in FOLDER.
"""

import datetime
import json
import os
import sys
import time
import traceback
from pathlib import Path

from compile_once import compile_once

import anybn
from anybn.conformance import inputs
from groups import CASES, Member, accuracy, cases_of, images, in_torch, population, trouble  # noqa: F401 cases come with them

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


def run_cases(member, folder):
    """All cases. One that fails on a member may leave the others waiting, so its name is written before it starts."""
    results = folder / f"results-{member.size}-{member.rank}.json"
    found = {}
    for name in cases_of(member.engine, member.size):
        function, options, *_ = CASES[name]
        found[name] = "it hung, or the process died"
        results.write_text(json.dumps(found))
        try:
            function(member, **options)
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
            results.write_text(json.dumps(found))
    results.write_text(json.dumps(found))


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
    compile_once()
    folder = Path(folder)
    if engine == "mpi":
        from mpi4py import MPI

        rank = MPI.COMM_WORLD.Get_rank()
    rank = int(rank)
    pair, everybody = {"gloo": gloo, "mpi": mpi}[engine](rank, folder)
    if pair is not None:
        run_cases(Member(engine, rank, 2, pair), folder)
    member = Member(engine, rank, MEMBERS, everybody)
    run_cases(member, folder)
    if engine == "gloo":  # under MPI, a process that dies takes all others with it
        die(member, folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
