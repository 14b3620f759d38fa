"""The compiler settings for the stages' functions on a CPU, and a type of eight float32 for SIMD operations.

Arrays are flat, with offsets; wherever an array is taken, an address in memory (an integer) is accepted too.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

from harness import jit
from harness.jit import OPTIONS

compiled = njit(**OPTIONS)
inlined = njit(forceinline=True, **OPTIONS)


def _sources() -> np.ndarray:
    """The first argument of every cached function: its type contains the hash of all files of compiled code."""
    files = [Path(jit.__file__), *sorted(Path(__file__).parent.glob("*.py"))]
    return np.zeros(1, [(hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest(), "i1")])


SOURCES = _sources()


class Lanes(types.Type):
    """Eight float32 in one register, or in as many as the machine needs for them."""

    def __init__(self):
        super().__init__(name="Lanes")


_lanes = Lanes()
_VECTOR, _INTEGERS = ir.VectorType(ir.FloatType(), 8), ir.VectorType(ir.IntType(32), 8)


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager, type_):
        super().__init__(manager, type_, _VECTOR)


def _element(context, builder, array_type, array, index):
    """The address of an element of an array, or of the memory at an integer address."""
    if isinstance(array_type, types.Array):
        data = context.make_array(array_type)(context, builder, array).data
    else:
        data = builder.inttoptr(array, ir.FloatType().as_pointer())
    return builder.gep(data, [index])


@intrinsic
def load(typing, array, index):
    """The eight numbers of an array (or at an address) starting at an index."""

    def code(context, builder, signature, args):
        at = _element(context, builder, signature.args[0], *args)
        return builder.load(builder.bitcast(at, _VECTOR.as_pointer()), align=4)

    return _lanes(array, types.intp), code


@intrinsic
def store(typing, array, index, value):
    def code(context, builder, signature, args):
        at = _element(context, builder, signature.args[0], *args[:2])
        builder.store(args[2], builder.bitcast(at, _VECTOR.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, _lanes), code


@intrinsic
def poke(typing, address, index, value):
    """Write one number to the memory at an address."""

    def code(context, builder, signature, args):
        builder.store(args[2], _element(context, builder, signature.args[0], *args[:2]))
        return context.get_dummy_value()

    return types.void(address, types.intp, types.float32), code


@intrinsic
def peek(typing, address, index):
    def code(context, builder, signature, args):
        return builder.load(_element(context, builder, signature.args[0], *args))

    return types.float32(address, types.intp), code


@intrinsic
def splat(typing, value):
    def code(context, builder, signature, args):
        one = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), args[0], ir.Constant(ir.IntType(32), 0))
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), 8), [0] * 8)
        return builder.shuffle_vector(one, ir.Constant(_VECTOR, ir.Undefined), zeros)

    return _lanes(types.float32), code


def _binary(operation):
    @intrinsic
    def apply(typing, a, b):
        return _lanes(_lanes, _lanes), lambda _, builder, __, args: operation(builder, *args)

    return apply


add = _binary(lambda builder, a, b: builder.fadd(a, b))
sub = _binary(lambda builder, a, b: builder.fsub(a, b))
mul = _binary(lambda builder, a, b: builder.fmul(a, b))
div = _binary(lambda builder, a, b: builder.fdiv(a, b))
least = _binary(lambda builder, a, b: builder.select(builder.fcmp_ordered("<", a, b), a, b))
most = _binary(lambda builder, a, b: builder.select(builder.fcmp_ordered(">", a, b), a, b))


@intrinsic
def fma(typing, a, b, c):
    """a b + c, as one instruction where the machine has it."""

    def code(context, builder, signature, args):
        return builder.fadd(builder.fmul(args[0], args[1], flags=["contract"]), args[2], flags=["contract"])

    return _lanes(_lanes, _lanes, _lanes), code


@intrinsic
def root(typing, a):
    def code(context, builder, signature, args):
        made = ir.FunctionType(_VECTOR, [_VECTOR])
        return builder.call(cgutils.get_or_insert_function(builder.module, made, "llvm.sqrt.v8f32"), args)

    return _lanes(_lanes), code


@intrinsic
def total(typing, a):
    """The sum of the eight."""

    def code(context, builder, signature, args):
        made = ir.FunctionType(ir.FloatType(), [ir.FloatType(), _VECTOR])
        function = cgutils.get_or_insert_function(builder.module, made, "llvm.vector.reduce.fadd.v8f32")
        return builder.call(function, [ir.Constant(ir.FloatType(), 0.0), args[0]], fastmath=["reassoc"])

    return types.float32(_lanes), code


@intrinsic
def power_of_two(typing, a):
    """2 to the power of a whole number, given as that number + 1.5 x 2^23."""

    def code(context, builder, signature, args):
        bits = builder.shl(builder.bitcast(args[0], _INTEGERS), ir.Constant(_INTEGERS, [23] * 8))
        return builder.bitcast(builder.add(bits, ir.Constant(_INTEGERS, [0x3F800000] * 8)), _VECTOR)

    return _lanes(_lanes), code
