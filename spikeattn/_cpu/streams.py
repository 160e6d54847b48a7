"""Stores that pass the caches by, for results that no cache could keep until somebody reads them.

A common store of a line reads the line from memory first: a third of what the LIF neuron moves. Passing by is faster
only where stores and arithmetic take turns often, and what is read next is asked for early (`prefetch`).
"""

import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from spikeattn._cpu.compiler import as_pointer, inline

CHUNK = 512  # elements of a turn, where arithmetic is short
_LINE = 64  # bytes
_LEAST = 16 << 20  # bytes of a result

_INT32, _INT64, _BYTES = ir.IntType(32), ir.IntType(64), ir.IntType(8).as_pointer()
_VECTOR = ir.VectorType(ir.FloatType(), 8)


def streams(result: Tensor, row: int) -> bool:
    """Whether to write ``result``, in rows of ``row`` elements, past the caches.

    Not in 16 bits, where arithmetic takes longer than memory.
    """
    whole_lines = row * result.itemsize % _LINE == 0 and result.data_ptr() % _LINE == 0
    return result.dtype == torch.float32 and result.nbytes >= _LEAST and whole_lines


@inline
def stream(target, first, row):
    """Copy ``row``, float32 and whole lines, to ``target[first:]``, past the caches.

    Other threads see it after the next atomic operation of this one.
    """
    _stream(target.ctypes.data + first * target.itemsize, row.ctypes.data, row.nbytes)


@inline
def prefetch(source, first, size):
    """Have ``source[first : first + size]`` brought into the L2 cache; the address is never an error."""
    _prefetch(source.ctypes.data + first * source.itemsize, size * source.itemsize)


@intrinsic
def _stream(context, target, source, nbytes):
    def codegen(context, builder, signature, args):
        target, source = (as_pointer(builder, address, _VECTOR.as_pointer()) for address in args[:2])
        size = _VECTOR.count * 4
        passing_by = builder.module.add_metadata([_INT32(1)])
        with cgutils.for_range(builder, builder.udiv(args[2], _INT64(size))) as loop:
            value = builder.load(builder.gep(source, [loop.index]), align=4)
            store = builder.store(value, builder.gep(target, [loop.index]), align=size)
            store.set_metadata("nontemporal", passing_by)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def _prefetch(context, source, nbytes):
    def codegen(context, builder, signature, args):
        kind = ir.FunctionType(ir.VoidType(), [_BYTES, _INT32, _INT32, _INT32])
        ask = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        first = as_pointer(builder, args[0], _BYTES)
        lines = builder.udiv(builder.add(args[1], _INT64(_LINE - 1)), _INT64(_LINE))
        with cgutils.for_range(builder, lines) as loop:
            line = builder.gep(first, [builder.mul(loop.index, _INT64(_LINE))])
            builder.call(ask, [line, _INT32(0), _INT32(2), _INT32(1)])  # to read, into L2, data
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen
