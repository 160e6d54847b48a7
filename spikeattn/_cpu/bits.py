"""Spikes as bits: rows of 0 and 1 packed into words and back, and products of them by counting bits."""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from spikeattn._cpu.compiler import inline

F = np.float32
U = np.uint64
WORD = 64

_STEP = 16  # elements that are compared together
# Of each type in `storage.ELEMENT` (float32, float16, bfloat16): how wide it is, and what 1 looks like.
_BITS_AND_ONE = {types.float32: (32, 0x3F800000), types.uint16: (16, 0x3C00), types.int16: (16, 0x3F80)}
_WORD_TYPE = ir.IntType(WORD)


@intrinsic
def count_bits(context, word):
    """How many bits of an unsigned 64-bit word are set."""

    def codegen(context, builder, signature, args):
        return builder.ctpop(args[0])

    return types.uint64(types.uint64), codegen


class _Lanes:
    """``x[first : first + count]`` in a vector register, as the integers that its bits are."""

    def __init__(self, context: Any, builder: Any, x_type: Any, x: Any, first: Any, count: int) -> None:
        bits, one = _BITS_AND_ONE[x_type.dtype]
        vector = ir.VectorType(ir.IntType(bits), count)
        integers = builder.bitcast(context.make_array(x_type)(context, builder, x).data, vector.element.as_pointer())
        self.pointer = builder.bitcast(builder.gep(integers, [first]), vector.as_pointer())
        self.zero, self.one, self.magnitude = (
            ir.Constant(vector, [number] * count) for number in (0, one, (1 << bits - 1) - 1)
        )


def _comparer(count: int) -> Any:
    """A function that packs ``count`` elements."""

    @intrinsic
    def compare(context, x, first):
        """Of ``x[first + e]``: bit e says that it is not 0, bit 32 + e that it is neither 0 nor 1."""

        def codegen(context, builder, signature, args):
            lanes = _Lanes(context, builder, signature.args[0], args[0], args[1], count)
            numbers = builder.load(lanes.pointer, align=1)
            fires = builder.icmp_unsigned("!=", builder.and_(numbers, lanes.magnitude), lanes.zero)
            odd = builder.xor(fires, builder.icmp_unsigned("==", numbers, lanes.one))
            low, high = (builder.zext(builder.bitcast(bits, ir.IntType(count)), _WORD_TYPE) for bits in (fires, odd))
            return builder.or_(low, builder.shl(high, ir.Constant(_WORD_TYPE, 32)))

        return types.uint64(x, types.int64), codegen

    return compare


def _spreader(count: int) -> Any:
    """A function that unpacks ``count`` elements."""

    @intrinsic
    def spread(context, word, x, first):
        """``x[first + e]`` is bit e of ``word``."""

        def codegen(context, builder, signature, args):
            lanes = _Lanes(context, builder, signature.args[1], args[1], args[2], count)
            bits = builder.bitcast(builder.trunc(args[0], ir.IntType(count)), ir.VectorType(ir.IntType(1), count))
            builder.store(builder.select(bits, lanes.one, lanes.zero), lanes.pointer, align=1)
            return context.get_dummy_value()

        return types.void(types.uint64, x, types.int64), codegen

    return spread


_compare, _compare_one, _spread, _spread_one = _comparer(_STEP), _comparer(1), _spreader(_STEP), _spreader(1)


@inline
def pack(x, first, size):
    """``(word, are_spikes)`` of ``x[first : first + size]``: bit e where element e is not 0; whether all are 0 or 1.

    At most `WORD` elements, stored as `storage.ELEMENT` says.
    """
    word = odd = U(0)
    whole = size - size % _STEP
    for e in range(0, whole, _STEP):
        found = _compare(x, first + e)
        word |= (found & U(0xFFFF)) << U(e)
        odd |= found >> U(32)
    for e in range(whole, size):
        found = _compare_one(x, first + e)
        word |= (found & U(1)) << U(e)
        odd |= found >> U(32)
    return word, odd == U(0)


@inline
def unpack(word, x, first, size):
    """``x[first + e]`` is bit e of ``word``; what `pack` reads."""
    whole = size - size % _STEP
    for e in range(0, whole, _STEP):
        _spread(word >> U(e), x, first + e)
    for e in range(whole, size):
        _spread_one(word >> U(e), x, first + e)


@inline
def take(bits, at, size):
    """The ``size`` bits, at most `WORD`, from bit ``at`` on, as a word."""
    first, shift = at // WORD, U(at % WORD)
    word = bits[first] >> shift
    if shift + U(size) > U(WORD):
        word |= bits[first + 1] << (U(WORD) - shift)
    return word if size == WORD else word & ((U(1) << U(size)) - U(1))


def take_rows(source, first, stride, size, mask, at, words):
    """One word for each token, the first from bit or element ``first`` on, zero at padding; whether all were spikes."""
    raise NotImplementedError


@overload(take_rows)
def _take_rows(source, first, stride, size, mask, at, words):
    return _take_bits if source.dtype == types.uint64 else _pack_numbers


def _take_bits(source, first, stride, size, mask, at, words):
    for i in range(words.size):
        words[i] = U(0) if mask.size > 0 and mask[at + i] else take(source, first + i * stride, size)
    return True


def _pack_numbers(source, first, stride, size, mask, at, words):
    are_spikes = True
    for i in range(words.size):
        words[i] = U(0)
        if not (mask.size > 0 and mask[at + i]):
            words[i], own = pack(source, first + i * stride, size)
            are_spikes &= own
    return are_spikes


@inline
def transpose(words, columns):
    """Bit j % 64 of ``columns[j // 64, e]`` is bit e of ``words[j]``."""
    columns[:] = U(0)
    for j in range(words.size):
        word, column = words[j], columns[j // WORD]
        for e in range(column.size):
            column[e] |= ((word >> U(e)) & U(1)) << U(j % WORD)


@inline
def count_row(query, keys, counts):
    """Add to ``counts`` the channels that fire in a query and in each key."""
    for j in range(counts.size):
        counts[j] += F(np.int64(count_bits(query & keys[j])))
