"""The engines that sum arrays over a group; see `anybn.distributed`."""

from __future__ import annotations

import atexit
import functools
import time
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np

from anybn.core.call import Array, dtype_name, root_module


@runtime_checkable
class Group(Protocol):
    """What anybn asks of a group. ``rank`` and ``size`` are wanted too, see `anybn.distributed`."""

    def all_reduce_sum(self, array: Array) -> Array:
        """The sum of the members' arrays, on every member; collective: all members call it, in the same order."""


class TorchGroup:
    """A ``torch.distributed`` process group; None is the default one, which need not exist yet.

    Members wait for one another as long as the process group's timeout says; its errors come through as they are.
    """

    library: ClassVar[str] = "torch"
    kind: ClassVar[str] = "a torch.distributed process group"

    def __init__(self, process_group: Any = None):
        self.process_group = process_group
        #: of a group that comes from a file: the ranks that it had
        self.lost: list[int] | None = None

    @property
    def handle(self) -> Any:
        """What lives as long as the connections do."""
        import torch.distributed

        if self.lost is not None:
            raise RuntimeError(
                f"group comes from a file, which holds no connections: it was of torch, of the ranks {self.lost}; "
                "give the layer a group of this process, or None"
            )
        if self.process_group is not None:
            return self.process_group
        if not torch.distributed.is_initialized():
            raise RuntimeError(
                "group is torch's default process group and there is none: call init_process_group first"
            )
        return torch.distributed.group.WORLD

    @property
    def rank(self) -> int:
        """This process's number in the group."""
        return int(self.handle.rank())

    @property
    def size(self) -> int:
        """How many processes there are."""
        return int(self.handle.size())

    def all_reduce_sum(self, array: Array) -> Array:
        """See `Group`."""
        import torch.distributed

        handle = self.handle
        _pause_at_exit()
        total = array.detach().clone()
        torch.distributed.all_reduce(total, group=handle)
        return total

    def from_numpy(self, values: np.ndarray) -> Array:
        """A tensor where the engine sums: on the CPU for gloo, on the current CUDA device for NCCL."""
        import torch.distributed

        on_host = torch.distributed.get_backend(self.handle) != "nccl"
        return torch.from_numpy(values).to("cpu" if on_host else f"cuda:{torch.cuda.current_device()}")

    def to_numpy(self, array: Array) -> np.ndarray:
        """The values of what `from_numpy` made, or of a sum of it."""
        return array.numpy(force=True)

    def __deepcopy__(self, memo: dict[int, Any]) -> TorchGroup:
        """A copy of a model talks to the same processes."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        lost = self.lost
        if self.process_group is not None:
            import torch.distributed

            lost = torch.distributed.get_process_group_ranks(self.process_group)
        return {"process_group": None, "lost": lost}

    def __repr__(self) -> str:
        return (
            f"TorchGroup({self.process_group or ''})" if self.lost is None else f"TorchGroup(ranks {self.lost}, lost)"
        )


@functools.cache
def _pause_at_exit() -> None:
    """Threads of torch's that still hold what a collective had when Python ends abort the process.

    They need the interpreter's lock to let go of a tensor or of backward's context (pytorch/pytorch#190489), and get it
    while this waits. DistributedDataParallel's collectives are helped too.
    """
    atexit.register(time.sleep, 0.1)


class MPIGroup:
    """An mpi4py communicator.

    Start programs with ``mpiexec -n 2 python -m mpi4py train.py``: then an exception that nobody catches ends all
    members. With ``python train.py``, the others wait for ever for a member that has failed outside of a call.
    """

    def __init__(self, communicator: Any):
        self.communicator = communicator
        self.rank, self.size = int(communicator.Get_rank()), int(communicator.Get_size())
        key = _mpi_key()
        if communicator.Get_attr(key) is None:
            communicator.Set_attr(key, _Handle())
        self.handle = communicator.Get_attr(key)

    def all_reduce_sum(self, array: Array) -> Array:
        """See `Group`."""
        from mpi4py import MPI

        total = array.detach().clone() if hasattr(array, "detach") else array.copy()  # torch has no copy()
        if root_module(type(array)) == "cupy":  # MPI knows nothing of streams
            import cupy

            cupy.cuda.get_current_stream().synchronize()
        self.communicator.Allreduce(MPI.IN_PLACE, total)
        return total

    def from_numpy(self, values: np.ndarray) -> Array:
        """What MPI sums as it is."""
        return values

    def to_numpy(self, array: Array) -> np.ndarray:
        """The values of what `from_numpy` made, or of a sum of it."""
        return np.asarray(array)


class _Handle:
    """Lives as long as the communicator that it is an attribute of."""


@functools.cache
def _mpi_key() -> int:
    from mpi4py import MPI

    return int(MPI.Comm.Create_keyval())


class NcclGroup:
    """A ``cupy.cuda.nccl.NcclCommunicator``, on CuPy's current stream. Not yet run on GPUs."""

    library: ClassVar[str] = "cupy"
    kind: ClassVar[str] = "a CuPy NcclCommunicator"

    def __init__(self, communicator: Any):
        self.handle = self.communicator = communicator
        self.rank, self.size = int(communicator.rank_id()), int(communicator.size())

    def all_reduce_sum(self, array: Array) -> Array:
        """See `Group`."""
        import cupy
        from cupy.cuda import nccl

        with array.device:
            total = cupy.array(array, order="C")
            dtype = {"float64": nccl.NCCL_FLOAT64, "float32": nccl.NCCL_FLOAT32}[dtype_name(total.dtype)]
            where = total.data.ptr
            stream = cupy.cuda.get_current_stream().ptr
            self.communicator.allReduce(where, where, total.size, dtype, nccl.NCCL_SUM, stream)
            return total

    def from_numpy(self, values: np.ndarray) -> Array:
        """A CuPy array on the current device."""
        import cupy

        return cupy.asarray(values)

    def to_numpy(self, array: Array) -> np.ndarray:
        """The values of what `from_numpy` made, or of a sum of it."""
        import cupy

        return cupy.asnumpy(array)


class AxisGroup:
    """The devices, or the batch elements of ``vmap``, along named axes of JAX; within the function that has them."""

    library: ClassVar[str] = "jax"

    def __init__(self, name: Any):
        self.name = name
        self.kind = f"the name of a JAX axis, {name!r}"

    @property
    def rank(self) -> Any:
        """This member's number, which JAX traces."""
        import jax

        return jax.lax.axis_index(self.name)

    @property
    def size(self) -> int:
        """How many members there are."""
        import jax

        return int(jax.lax.psum(1, self.name))

    def all_reduce_sum(self, array: Array) -> Array:
        """See `Group`."""
        import jax

        return jax.lax.psum(array, self.name)


def as_group(group: Any) -> Any:
    """The group that this is, or stands for; TypeError if it is none.

    >>> import anybn
    >>> anybn.distributed.as_group("devices").name
    'devices'
    """
    if isinstance(group, Group):
        return group
    if isinstance(group, str) or (isinstance(group, tuple) and group and all(isinstance(a, str) for a in group)):
        return AxisGroup(group)
    root = root_module(type(group))
    if root == "torch" and hasattr(group, "allreduce"):
        return TorchGroup(group)
    if root == "mpi4py" and hasattr(group, "Allreduce"):
        return MPIGroup(group)
    if root.startswith("cupy") and hasattr(group, "allReduce"):
        return NcclGroup(group)
    raise TypeError(
        f"group is {group!r}, a {type(group).__name__}; it must be a torch.distributed process group that this process "
        "is a member of, an mpi4py communicator, a CuPy NcclCommunicator, the name of a JAX axis, or an object with "
        "all_reduce_sum(array) -> array"
    )
