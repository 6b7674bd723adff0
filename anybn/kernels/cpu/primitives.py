"""What kernels need of the machine and Numba does not have: atomic steps, addresses, and other compiled code's.

Addresses are int64. Where several threads meet, they meet in arrays of int64, of which no step is taken but by these
functions.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import functools
import os
import sys
import time

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.compiler import compile_internal
from numba.core.targetconfig import ConfigStack
from numba.extending import intrinsic, overload

from anybn.kernels.cpu.threads import HAS_ENVIRONMENT

_VOID, _POINTER, _I32 = ir.VoidType(), ir.IntType(8).as_pointer(), ir.IntType(32)
#: What OpenMP calls on every thread.
_FUNCTION = ir.FunctionType(_VOID, [_POINTER])
#: ``GOMP_parallel(function, data, num_threads, flags)``
_PARALLEL = ir.FunctionType(_VOID, [_FUNCTION.as_pointer(), _POINTER, _I32, _I32])

sched_yield = types.ExternalFunction("sched_yield", types.int32()) if hasattr(os, "sched_yield") else njit(lambda: 0)


def by_types(choose=None, *, inline=False):
    """Makes a function for compiled code, which is what ``choose`` returns for the types of its arguments; a decorator.

    inline: whether Numba puts it into its caller, which finds a None, or its absence, only then.
    """
    if choose is None:
        return functools.partial(by_types, inline=inline)

    @functools.wraps(choose)
    def function(*_):
        raise NotImplementedError("for compiled code alone")

    overload(function, inline="always" if inline else "never")(choose)
    return function


def _element(context, builder, kind, array, index):
    return cgutils.get_item_pointer(context, builder, kind, context.make_array(kind)(context, builder, array), [index])


@intrinsic
def fetch_add(_, array, index, amount):
    """``array[index] += amount`` in one step that no other thread comes between; what it was before."""

    def generate(context, builder, signature, arguments):
        place = _element(context, builder, signature.args[0], *arguments[:2])
        return builder.atomic_rmw("add", place, arguments[2], "seq_cst")

    return types.int64(array, types.intp, types.int64), generate


@intrinsic
def swap_if(_, array, index, expected, new):
    """``array[index] = new`` in one such step, if it was as expected; whether it was."""

    def generate(context, builder, signature, arguments):
        place = _element(context, builder, signature.args[0], *arguments[:2])
        return builder.extract_value(builder.cmpxchg(place, *arguments[2:], "seq_cst", "seq_cst"), 1)

    return types.boolean(array, types.intp, types.int64, types.int64), generate


@intrinsic
def look(_, array, index):
    """``array[index]`` as another thread has left it, with all that it wrote before."""

    def generate(context, builder, signature, arguments):
        place = _element(context, builder, signature.args[0], *arguments)
        return builder.load_atomic(place, "seq_cst", align=8)

    return types.int64(array, types.intp), generate


def _as_pointer(context, builder, signature, arguments):
    return builder.inttoptr(arguments[-1], context.get_value_type(signature.return_type))


@intrinsic
def pointer(typing_context, like, address):
    """The address as a pointer to like's dtype."""
    return types.CPointer(like.dtype)(like, address), _as_pointer


def _pointer_to(kind):
    @intrinsic
    def made(_, address):
        return types.CPointer(kind)(types.int64), _as_pointer

    return made


#: The address as a pointer to int64, and to float64.
integers, doubles = _pointer_to(types.int64), _pointer_to(types.float64)


def address_of(symbol):
    """A function for compiled code that gives the address which `llvmlite.binding.add_symbol` gave this name."""

    @intrinsic
    def address(_):
        def generate(context, builder, signature, arguments):
            module = builder.module
            known = module.globals.get(symbol) or ir.GlobalVariable(module, ir.IntType(8), symbol)
            return builder.ptrtoint(known, ir.IntType(64))

        return types.int64(), generate

    return address


@intrinsic
def part_of_callers(_):
    """Has LLVM make the function that this stands in a part of its callers: a call costs seven words for each array."""

    def generate(context, builder, signature, arguments):
        builder.function.attributes.add("alwaysinline")
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def writes_apart(_, names):
    """Tells LLVM that these arguments of the function that this stands in, "a b", are arrays that share no memory with
    the others; and `part_of_callers`.

    So a loop takes lanes at once. LLVM would compare addresses before, which takes half as long as dx of 64 values.
    """
    if not isinstance(names, types.StringLiteral):
        return None  # Numba asks again, with the literal

    def generate(context, builder, signature, arguments):
        builder.function.attributes.add("alwaysinline")
        for name in names.literal_value.split():
            data = next(a for a in builder.function.args if a.name == f"arg.{name}.4")  # of what an array consists of
            data.add_attribute("noalias")
        return context.get_dummy_value()

    return types.void(names), generate


@intrinsic
def invoke(_, function, data):
    """``function(data)``, of addresses."""

    def generate(context, builder, signature, arguments):
        called = builder.inttoptr(arguments[0], _FUNCTION.as_pointer())
        builder.call(called, [builder.inttoptr(arguments[1], _POINTER)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def invoke_number(_, function):
    """The int that the function at this address gives."""

    def generate(context, builder, signature, arguments):
        called = builder.inttoptr(arguments[0], ir.FunctionType(_I32, []).as_pointer())
        return builder.sext(builder.call(called, []), ir.IntType(64))

    return types.int64(types.int64), generate


@intrinsic
def invoke_parallel(_, parallel, function, data):
    """``parallel(function, data, 0, 0)``, of the address of OpenMP's entry, on as many threads as it thinks right."""

    def generate(context, builder, signature, arguments):
        entry = builder.inttoptr(arguments[0], _PARALLEL.as_pointer())
        called = builder.inttoptr(arguments[1], _FUNCTION.as_pointer())
        zero = ir.Constant(_I32, 0)
        builder.call(entry, [called, builder.inttoptr(arguments[2], _POINTER), zero, zero])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


if sys.platform.startswith("linux"):
    _clock_gettime = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.int64))

    @njit
    def nanoseconds():
        """Of a clock that goes on."""
        now = np.empty(2, np.int64)
        _clock_gettime(time.CLOCK_MONOTONIC, now.ctypes.data)
        return now[0] * 1_000_000_000 + now[1]

else:
    nanoseconds = njit(lambda: 0)  # only OpenMP's threads are timed: see `openmp`


def _of_environment(name):
    """``name(place)``, one of C's functions for a thread's floating-point environment: its rounding, and whether small
    numbers are flushed to 0."""

    @intrinsic
    def made(_, array, index):
        def generate(context, builder, signature, arguments):
            if HAS_ENVIRONMENT:
                place = builder.bitcast(_element(context, builder, signature.args[0], *arguments), _POINTER)
                called = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_I32, [_POINTER]), name)
                builder.call(called, [place])
            return context.get_dummy_value()

        return types.void(array, types.intp), generate

    return made


#: The environment into an array, from an index on; and the thread gets what is written there.
save_environment, restore_environment = _of_environment("fegetenv"), _of_environment("fesetenv")


@intrinsic
def outlined(_, called, arguments):
    """Addresses of a function and of data with which `invoke` makes it ``called(*arguments)``; what it raises is lost.

    Last comes how many bytes the data are. They lie on the stack of the function that this stands in, and end with it.
    Both functions become one library: Numba would optimize one of its own, and again what it is linked to.
    """
    argument_types = tuple(arguments.types)

    def generate(context, builder, signature, values):
        flags = ConfigStack().top().copy()
        flags.no_compile = flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True
        library, source = context.active_code_library, called.dispatcher.py_func
        compiled = compile_internal(
            context.typing_context, context, library, source, argument_types, types.none, flags, locals={}
        )
        target = context.declare_function(builder.module, compiled.fndesc)
        data = cgutils.alloca_once_value(builder, values[1])
        name = f"{compiled.fndesc.mangled_name}.outlined"
        function = ir.Function(builder.module, _FUNCTION, builder.module.get_unique_name(name))
        function.linkage = "internal"
        inside = ir.IRBuilder(function.append_basic_block("entry"))
        packed = inside.load(inside.bitcast(function.args[0], data.type))
        given = cgutils.unpack_tuple(inside, packed, len(argument_types))
        context.call_conv.call_function(inside, target, types.none, compiled.fndesc.argtypes, given)
        inside.ret_void()
        i64 = ir.IntType(64)
        size = ir.Constant(i64, context.get_abi_sizeof(data.type.pointee))
        found = [builder.ptrtoint(function, i64), builder.ptrtoint(data, i64), size]
        return context.make_tuple(builder, signature.return_type, found)

    return types.UniTuple(types.int64, 3)(called, arguments), generate
