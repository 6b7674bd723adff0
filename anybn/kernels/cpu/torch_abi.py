"""torch's stable C interface for compiled code (torch/csrc/inductor/aoti_torch/c/shim.h, torch/csrc/stable/c/shim.h).

Handles are addresses of ``at::Tensor``, which is a pointer to what ``Tensor._cdata`` gives; 0 stands for none.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import ctypes

import llvmlite.binding as llvm
import numpy as np
from numba import carray, njit, types

from anybn.kernels.cpu.primitives import integers
from anybn.kernels.cpu.values import EXACT

# -- functions of torch's, under names of our own ---------------------------------------------------------------

_SYMBOLS: list[str] = []


def _function(name, *arguments, result=types.int32):
    _SYMBOLS.append(name)
    return types.ExternalFunction(f"anybn_{name}", result(*arguments))


_address, _int = types.int64, types.int32
_get_dim = _function("aoti_torch_get_dim", _address, _address)
_get_sizes = _function("aoti_torch_get_sizes", _address, _address)
_get_strides = _function("aoti_torch_get_strides", _address, _address)
_get_dtype = _function("aoti_torch_get_dtype", _address, _address)
_get_device_type = _function("aoti_torch_get_device_type", _address, _address)
_get_data_ptr = _function("aoti_torch_get_data_ptr", _address, _address)
_is_defined = _function("aoti_torch_is_defined", _address, _address)
_empty_strided = _function("aoti_torch_empty_strided", _address, _address, _address, _int, _int, _int, _address)
_grad_mode = _function("aoti_torch_grad_mode_is_enabled")
_get_num_threads = _function("torch_get_num_threads", _address)
# C++'s new and delete, of what the dispatcher is to free and what it has allocated.
_new = _function("_Znwm", _address, result=_address)
_free = _function("_ZdlPv", _address)
delete = _function("aoti_torch_delete_tensor_object", _address)
new_handle = _function("aoti_torch_new_tensor_handle", _address, _address)
new_undefined = _function("aoti_torch_new_uninitialized_tensor", _address)
copy = _function("aoti_torch_copy_", _address, _address, _int)
delete_list = _function("torch_delete_list", _address)
call_dispatcher = _function("aoti_torch_call_dispatcher", _address, _address, _address)


def declare(library: ctypes.CDLL) -> bool:
    """Whether torch's library has all of them; then compiled code finds them."""
    if not all(hasattr(library, name) for name in _SYMBOLS):
        return False
    for name in _SYMBOLS:
        llvm.add_symbol(f"anybn_{name}", ctypes.cast(library[name], ctypes.c_void_p).value)
    return True


@njit(**EXACT)
def grad_mode():
    return (_grad_mode() & 1) != 0  # a bool leaves the rest of the register as it was


@njit(**EXACT)
def num_threads():
    found = np.zeros(1, np.int64)
    _get_num_threads(found.ctypes.data)
    return found[0]


# -- what a tensor is ------------------------------------------------------------------------------------------

#: The words of a layout: torch's number of the dtype, how many axes, their sizes, their strides; the rest is 0.
MOST_AXES = 5
DTYPE, NDIM, SIZES = range(3)
STRIDES = SIZES + MOST_AXES
LAYOUT = STRIDES + MOST_AXES


@njit(**EXACT)
def dtype_of(handle):
    found = np.zeros(1, np.int64)
    _get_dtype(handle, found.ctypes.data)
    return found[0]


@njit(**EXACT)
def data_of(handle):
    """The address of its values on the host; 0 if there is none."""
    found = np.zeros(2, np.int64)
    _get_device_type(handle, found.ctypes.data)
    _get_data_ptr(handle, found[1:].ctypes.data)
    return found[1] if found[0] == 0 else 0


@njit(**EXACT)
def describe(handle, layout):
    """Whether the tensor has a layout, which is filled in."""
    found = np.zeros(3, np.int64)
    if (
        _get_dim(handle, found.ctypes.data) != 0
        or found[0] > MOST_AXES
        or _get_sizes(handle, found[1:].ctypes.data) != 0
        or _get_strides(handle, found[2:].ctypes.data) != 0
    ):
        return False
    ndim = found[0]
    sizes, strides = carray(integers(found[1]), (ndim,)), carray(integers(found[2]), (ndim,))
    for i in range(LAYOUT):
        layout[i] = 0
    layout[DTYPE], layout[NDIM] = dtype_of(handle), ndim
    for i in range(ndim):
        layout[SIZES + i], layout[STRIDES + i] = sizes[i], strides[i]
    return True


@njit(**EXACT)
def data_in(handle, layout):
    """The address of its values, if it has this layout; else 0."""
    own = np.empty(LAYOUT, np.int64)
    if not describe(handle, own):
        return 0
    for i in range(LAYOUT):
        if own[i] != layout[i]:
            return 0
    return data_of(handle)


@njit(**EXACT)
def data_in_order(handle, dtype, rows, columns):
    """The address of its values, if they are so many rows, 0 for a vector, one after the other; else 0."""
    own, last = np.empty(LAYOUT, np.int64), 1 if rows else 0
    if not describe(handle, own) or own[DTYPE] != dtype or own[NDIM] != last + 1:
        return 0
    if own[SIZES + last] != columns or (columns > 1 and own[STRIDES + last] != 1):
        return 0
    if rows and (own[SIZES] != rows or own[STRIDES] != columns):
        return 0
    return data_of(handle)


@njit(**EXACT)
def data_of_number(handle, dtype):
    """The address of the value of a tensor without axes; 0 for any other."""
    own = np.empty(LAYOUT, np.int64)
    return data_of(handle) if describe(handle, own) and own[NDIM] == 0 and own[DTYPE] == dtype else 0


@njit(**EXACT)
def defined(handle):
    """The handle, or 0 for one that no tensor is behind, which is dropped."""
    found = np.zeros(1, np.int64)
    if handle != 0:
        _is_defined(handle, found.ctypes.data)
        if found[0] == 0:
            delete(handle)
    return handle if found[0] else 0


# -- tensors that come and go ----------------------------------------------------------------------------------


@njit(**EXACT)
def new_in(layout, out):
    """Whether a tensor of this layout could be made, whose handle is then at the address out."""
    at = layout.ctypes.data
    return _empty_strided(layout[NDIM], at + 8 * SIZES, at + 8 * STRIDES, layout[DTYPE], 0, 0, out) == 0


@njit(**EXACT)
def new_in_order(dtype, rows, columns, out):
    layout = np.zeros(LAYOUT, np.int64)
    layout[DTYPE], layout[NDIM], last = dtype, 2 if rows else 1, 1 if rows else 0
    layout[SIZES], layout[STRIDES] = rows, columns
    layout[SIZES + last], layout[STRIDES + last] = columns, 1
    return new_in(layout, out)


@njit(**EXACT)
def drop(handle):
    if handle != 0:
        delete(handle)


@njit(**EXACT)
def take(optional):
    """The handle in what the dispatcher gives for ``Tensor?``."""
    if optional == 0:
        return 0
    handle = carray(integers(optional), (1,))[0]
    _free(optional)
    return handle


@njit(**EXACT)
def as_optional(handle):
    """What `take` takes it from."""
    if handle == 0:
        return 0
    place = _new(8)
    carray(integers(place), (1,))[0] = handle
    return place
