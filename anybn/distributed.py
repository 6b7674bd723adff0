"""Groups of processes or devices whose batches count as one: what ``group=`` takes.

| group | members | arrays |
|---|---|---|
| a torch.distributed process group, or `TorchGroup()`: the default one | processes | torch: CPU (gloo), CUDA (NCCL) |
| an mpi4py communicator | processes | NumPy, torch on the CPU; CuPy where MPI is built for CUDA |
| a ``cupy.cuda.nccl.NcclCommunicator`` | processes | CuPy; written to its documentation, not yet run on GPUs |
| a name, or a tuple of names, of axes | devices | JAX, inside ``shard_map``, ``pmap`` or ``vmap`` |
| any object with ``all_reduce_sum(array) -> array`` | | what it can sum |

An object of the last kind gets an array that it may not write to and returns the sum over all members, in the array's
library, dtype and shape, the same bits on every member. With the attributes ``rank`` and ``size`` (this member's
number, from 0, and how many there are) statistics take one sum, two of more than 64 members, and errors name members;
without, two sums and no names, and `anybn.recalibrate` refuses it. Arrays are beside x. Where there is no x, an object
may bring a pair of methods: ``from_numpy(values)`` makes an array that it sums of float64 values, ``to_numpy(array)``
brings the sum back. Without them it gets an array beside the state.

Whatever goes wrong on one member before its statistics are exchanged (a shape, a dtype, a mask, memory) is its own
error there and `MemberError` on all others, at once, without a collective more than usual: the member that fails takes
part and says so. What cannot be told so: an error between two calls, in the caller's own code; one in the backward
pass; an interrupt; a member that calls a layer of another number of channels, or with another array library; a member
that dies. Then the others wait as long as their engine does, or get its error, or gloo ends them. States are as before
in any case.

>>> import numpy as np, anybn
>>> class Alone:  # a group of one
...     rank, size = 0, 1
...     def all_reduce_sum(self, array):
...         return array
>>> x = np.array([[1.0, 5.0], [3.0, 9.0]])
>>> bool(np.all(anybn.BatchNorm(2, group=Alone())(x) == anybn.BatchNorm(2)(x)))
True
"""

from anybn.groups.engines import AxisGroup, Group, MPIGroup, NcclGroup, TorchGroup, as_group

__all__ = ["AxisGroup", "Group", "MPIGroup", "NcclGroup", "TorchGroup", "as_group"]
