"""Sums over the bits of a word, in vector registers: what attention between spikes does with a state such as K^T V.

A state is a row of `vectors.TILE` numbers for each channel. States, rows and numbers are given by address. Of a row the
first ``width`` numbers count; what lies beyond them, up to `TILE`, may be read and written. Token i of more than
`bits.WORD` channels is several words, ``words[:, i]``.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from spikeattn._cpu import vectors
from spikeattn._cpu.bits import WORD, F
from spikeattn._cpu.compiler import inline
from spikeattn._cpu.vectors import TILE

_WORD, _BIT = ir.IntType(64), ir.IntType(1)
_BYTES = 4 * TILE * WORD  # of the rows that the bits of a word name
_Step = Callable[[Any, list[Any]], list[Any]]


def _over_bits(builder: Any, word: Any, starts: list[Any], step: _Step) -> list[Any]:
    """``for k in bits of word: sums = step(k, sums)``, the sums in registers."""
    before = builder.block
    head, body, end = (builder.append_basic_block(name) for name in ("head", "body", "end"))
    builder.branch(head)
    builder.position_at_end(head)
    left = builder.phi(_WORD)
    sums = [builder.phi(start.type) for start in starts]
    builder.cbranch(builder.icmp_unsigned("!=", left, _WORD(0)), body, end)
    builder.position_at_end(body)
    after = step(builder.cttz(left, _BIT(1)), sums)
    without_lowest = builder.and_(left, builder.sub(left, _WORD(1)))
    for phi, first, then in zip([left, *sums], [word, *starts], [without_lowest, *after], strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(then, body)
    builder.branch(head)
    builder.position_at_end(end)
    return sums


def _row(builder: Any, state: Any, k: Any) -> Any:
    return builder.gep(state, [builder.mul(k, _WORD(TILE))])


def _as_numbers(builder: Any, word: Any, registers: int) -> list[Any]:
    """The bits of a word as vectors of 0 and 1."""
    rows = []
    for r in range(registers):
        part = builder.trunc(builder.lshr(word, _WORD(r * vectors.WIDTH)), ir.IntType(vectors.WIDTH))
        bits = builder.bitcast(part, ir.VectorType(_BIT, vectors.WIDTH))
        one, zero = (ir.Constant(vectors.VECTOR, [number] * vectors.WIDTH) for number in (1.0, 0.0))
        rows.append(builder.select(bits, one, zero))
    return rows


def _summer(registers: int) -> Any:
    @intrinsic
    def sum_rows(context, state, word, start, scale, out):
        def codegen(context, builder, signature, args):
            state, start, out = (vectors.floats(builder, args[i]) for i in (0, 2, 4))

            def step(k, sums):
                own = vectors.load(builder, _row(builder, state, k), registers)
                return [builder.fadd(total, one) for total, one in zip(sums, own, strict=True)]

            sums = _over_bits(builder, args[1], vectors.load(builder, start, registers), step)
            factor = vectors.spread(builder, args[3])
            vectors.store(builder, out, [builder.fmul(total, factor) for total in sums])
            return context.get_dummy_value()

        return types.void(types.int64, types.uint64, types.int64, types.float32, types.int64), codegen

    return sum_rows


def _adder(registers: int, of_bits: bool) -> Any:
    @intrinsic
    def add_outer(context, state, word, row):
        def codegen(context, builder, signature, args):
            state, word, row = vectors.floats(builder, args[0]), args[1], args[2]
            if of_bits:
                own = _as_numbers(builder, row, registers)
            else:
                own = vectors.load(builder, vectors.floats(builder, row), registers)

            def step(k, nothing):
                at = _row(builder, state, k)
                sums = vectors.load(builder, at, registers)
                vectors.store(builder, at, [builder.fadd(total, one) for total, one in zip(sums, own, strict=True)])
                return nothing

            _over_bits(builder, word, [], step)
            return context.get_dummy_value()

        return types.void(types.int64, types.uint64, types.uint64 if of_bits else types.int64), codegen

    return add_outer


def _product_adder(registers: int) -> Any:
    @intrinsic
    def add_products(context, state, values, count, word):
        def codegen(context, builder, signature, args):
            state, values = vectors.floats(builder, args[0]), vectors.floats(builder, args[1])
            own = _as_numbers(builder, args[3], registers)
            with cgutils.for_range(builder, args[2]) as loop:
                at = _row(builder, state, loop.index)
                sums = vectors.load(builder, at, registers)
                value = vectors.spread(builder, builder.load(builder.gep(values, [loop.index])))
                after = [vectors.fma(builder, value, one, total) for one, total in zip(own, sums, strict=True)]
                vectors.store(builder, at, after)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64, types.uint64), codegen

    return add_products


_ALL, _HALF = TILE // vectors.WIDTH, TILE // vectors.WIDTH // 2
_sum_all, _sum_half = _summer(_ALL), _summer(_HALF)
_add_bits_all, _add_bits_half = _adder(_ALL, True), _adder(_HALF, True)
_add_row_all, _add_row_half = _adder(_ALL, False), _adder(_HALF, False)
_add_products_all, _add_products_half = _product_adder(_ALL), _product_adder(_HALF)


@inline
def sum_rows(state, word, width, start, scale, out):
    """``out = scale * (start + sum of state[k])`` over the bits k of ``word``, from the lowest on."""
    if width <= TILE // 2:
        _sum_half(state, word, start, scale, out)
    else:
        _sum_all(state, word, start, scale, out)


@inline
def add_bits(state, word, width, bits):
    """``state[k] += bits``, a word as numbers 0 and 1, for the bits k of ``word``."""
    if width <= TILE // 2:
        _add_bits_half(state, word, bits)
    else:
        _add_bits_all(state, word, bits)


@inline
def add_row(state, word, width, row):
    """``state[k] += row`` for the bits k of ``word``."""
    if width <= TILE // 2:
        _add_row_half(state, word, row)
    else:
        _add_row_all(state, word, row)


@inline
def add_products(state, values, count, width, bits):
    """``state[k] += values[k] * bits`` for k < ``count``, ``bits`` a word as numbers 0 and 1."""
    if width <= TILE // 2:
        _add_products_half(state, values, count, bits)
    else:
        _add_products_all(state, values, count, bits)


@inline
def sum_rows_of_token(state, words, W, i, width, start, scale, out):
    """`sum_rows` over the bits of all ``W`` words of a token."""
    last = W - 1
    for w in range(last):
        sum_rows(state + w * _BYTES, words[w, i], width, start if w == 0 else out, F(1.0), out)
    sum_rows(state + last * _BYTES, words[last, i], width, start if last == 0 else out, scale, out)


@inline
def add_bits_to_token(state, words, W, i, width, bits):
    """`add_bits` for the bits of all ``W`` words of a token."""
    for w in range(W):
        add_bits(state + w * _BYTES, words[w, i], width, bits)


@inline
def add_row_to_token(state, words, W, i, width, row):
    """`add_row` for the bits of all ``W`` words of a token."""
    for w in range(W):
        add_row(state + w * _BYTES, words[w, i], width, row)
