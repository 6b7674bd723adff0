"""Computing Dask arrays a second time, in place of holding every chunk until it is needed again.

``(x - x.mean()).compute()`` holds all chunks of x in memory: each is needed for the mean and again when the mean is
known (dask/dask#874). `reread` copies the part of the graph that makes x, to run after the mean has been found.
dask.graph_manipulation has ``bind`` for this, but it leaves references inside of Task objects as they were (dask
2026.8, arrays that have been rechunked). Delete this file when ``bind`` replaces these.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import dask.array
from dask._task_spec import Alias, DataNode, GraphNode, Task, TaskRef, convert_legacy_graph
from dask.base import clone_key, flatten, tokenize
from dask.highlevelgraph import HighLevelGraph, MaterializedLayer

Array = Any

#: Begins the names of layers that hold results of C values, which both readings use.
SHARED = "anybn-shared-"


def shared(a: Array) -> Array:
    """a, as a layer of its own that `reread` does not compute a second time."""
    if a.name.startswith(SHARED):
        return a
    return a.map_blocks(_same, name=SHARED + a.name, dtype=a.dtype, meta=a._meta)


def is_of_shared(a: Array) -> bool:
    """Whether a is made from something `shared`, so that it has to be computed first."""
    return any(name.startswith(SHARED) for name in a.dask.layers)


def reread(parents: list[Array | None], *arrays: Array | None) -> list[Array | None]:
    """The arrays, to be computed anew once the parents have been; what is `shared` or in memory serves both times.

    Reading twice costs time, never memory. In a chain of L batch norms each pass finds the earlier statistics there, so
    what is under the chain is read L + 1 times, not 2**L. Arrays that took long to make can be persisted or stored
    before, as ever in Dask. What the chunks will be used with belongs to the parents: scheduled later than they, it
    would have all of them wait in memory.
    """
    given, before = ([a for a in group if a is not None] for group in (arrays, parents))
    merged = HighLevelGraph.merge(*(a.dask for a in before + given))
    graph: dict[Any, GraphNode] = convert_legacy_graph(merged.to_dict())
    token = tokenize(*(a.name for a in before), *(a.name for a in given))
    clones = _clones(graph, [key for a in given for key in flatten(a.__dask_keys__())], token)
    after = f"after-{token}"
    awaited = [TaskRef(key) for a in before for key in flatten(a.__dask_keys__())]
    tasks: dict[Any, GraphNode] = {after: Task(after, _nothing, *awaited)}
    for key, clone in clones.items():
        node = graph[key]
        if node.dependencies & clones.keys():
            tasks[clone] = node.substitute(clones, key=clone)
        else:
            sources = tuple(node.dependencies)
            tasks[clone] = Task(clone, partial(_when, node, sources), TaskRef(after), *map(TaskRef, sources))

    layers = {**merged.layers, token: MaterializedLayer(tasks)}
    dependencies = {**merged.dependencies, token: set(merged.layers)}
    result: list[Array | None] = []
    for i, a in enumerate(arrays):
        if a is None:
            result.append(None)
            continue
        name = f"again-{token}-{i}"
        aliases = {
            (name, *key[1:]): Alias((name, *key[1:]), clones.get(key, key)) for key in flatten(a.__dask_keys__())
        }
        graph_of_a = HighLevelGraph(
            {**layers, name: MaterializedLayer(aliases)}, {**dependencies, name: {token, *merged.layers}}
        )
        result.append(dask.array.Array(graph_of_a, name, a.chunks, meta=a._meta))
    return result


def _clones(graph: dict[Any, GraphNode], keys: list[Any], token: str) -> dict[Any, Any]:
    """key -> its copy's, of everything that has to be computed for keys and is neither at hand nor shared."""
    clones: dict[Any, Any] = {}
    while keys:
        key = keys.pop()
        node = graph.get(key)
        if key in clones or node is None or isinstance(node, DataNode):
            continue
        if isinstance(node, Alias) and node.target not in graph:  # persisted on a cluster
            continue
        if str(key[0] if isinstance(key, tuple) else key).startswith(SHARED):
            continue
        clones[key] = clone_key(key, token)
        keys.extend(node.dependencies)
    return clones


def _when(node: GraphNode, sources: tuple[Any, ...], _: Any, *values: Any) -> Any:
    """What node makes of its sources; the argument between is there to be waited for."""
    return node(dict(zip(sources, values, strict=True)))


def _nothing(*_: Any) -> None:
    pass


def _same(a: Any) -> Any:
    return a
