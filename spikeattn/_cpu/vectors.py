"""Products of a matrix with rows of numbers, in vector registers: what loops of numba would keep in memory.

A matrix comes in tiles: ``tile[k, o]`` is the weight of input k for output o of ``TILE`` outputs, in one piece. Every
output is its start, to which the products are added in the order of the inputs, each with one rounding (a fused
multiply-add). So its bits depend on nothing else: not on the other rows, nor on whether inputs of zero are passed over.
"""

from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from spikeattn._cpu.compiler import as_pointer, inline

TILE = 64  # outputs
ROWS = 6  # that are multiplied together, so that a weight is loaded once for all of them

_FLOAT, _INT32, _INT64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)


_HOST = llvm.get_host_cpu_features()
# Why these products cannot run fast here; empty if they can.
WHY_NOT = "" if _HOST.get("fma", _HOST.get("neon", False)) else "the processor has no fused multiply-add"


def _lanes() -> tuple[int, int]:
    """Floats of a vector register, and how many registers of outputs fit beside ``ROWS`` rows."""
    if _HOST.get("avx512f"):
        return 16, 4
    return (8, 2) if _HOST.get("avx") else (4, 4)


WIDTH, _REGISTERS = _lanes()
STRIP = WIDTH * _REGISTERS  # outputs of `multiply_rows`
VECTOR = ir.VectorType(_FLOAT, WIDTH)


def _index(number: int) -> ir.Constant:
    return ir.Constant(_INT64, number)


def floats(builder: Any, address: Any) -> Any:
    """An address as a pointer to floats."""
    return as_pointer(builder, address, _FLOAT.as_pointer())


def _vectors(builder: Any, first: Any, count: int) -> list[Any]:
    """Pointers to ``count`` vectors from ``first`` on."""
    starts = [builder.gep(first, [_index(i * WIDTH)]) for i in range(count)]
    return [builder.bitcast(start, VECTOR.as_pointer()) for start in starts]


def load(builder: Any, first: Any, count: int) -> list[Any]:
    return [builder.load(pointer, align=4) for pointer in _vectors(builder, first, count)]


def store(builder: Any, first: Any, values: list[Any]) -> None:
    for pointer, value in zip(_vectors(builder, first, len(values)), values, strict=True):
        builder.store(value, pointer, align=4)


def spread(builder: Any, number: Any) -> Any:
    """A vector of one number."""
    undefined = ir.Constant(VECTOR, ir.Undefined)
    first = builder.insert_element(undefined, number, ir.Constant(_INT32, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(_INT32, WIDTH), [0] * WIDTH))


def fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    kind = ir.FunctionType(VECTOR, [VECTOR] * 3)
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{WIDTH}f32"), [a, b, c])


def _accumulate(builder: Any, count: Any, starts: list[Any], step: Callable[[Any, list[Any]], list[Any]]) -> list[Any]:
    """``for i in range(count): sums = step(i, sums)``, the sums in registers."""
    before = builder.block
    head, body, end = (builder.append_basic_block(name) for name in ("head", "body", "end"))
    builder.branch(head)
    builder.position_at_end(head)
    i = builder.phi(_INT64)
    sums = [builder.phi(VECTOR) for _ in starts]
    builder.cbranch(builder.icmp_signed("<", i, count), body, end)
    builder.position_at_end(body)
    after = step(i, sums)
    for phi, first, then in zip([i, *sums], [_index(0), *starts], [builder.add(i, _index(1)), *after], strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(then, body)
    builder.branch(head)
    builder.position_at_end(end)
    return sums


@intrinsic
def add_events(context, tile, events, count, start, out):
    """``out[:TILE] = start + sum of tile[k]`` over ``count`` inputs k in ``events`` (int32); all are addresses."""

    def codegen(context, builder, signature, args):
        tile, events, count, start, out = args
        tile, numbers = floats(builder, tile), as_pointer(builder, events, _INT32.as_pointer())

        def step(i, sums):
            k = builder.zext(builder.load(builder.gep(numbers, [i])), _INT64)
            row = load(builder, builder.gep(tile, [builder.mul(k, _index(TILE))]), len(sums))
            return [builder.fadd(total, own) for total, own in zip(sums, row, strict=True)]

        starts = load(builder, floats(builder, start), TILE // WIDTH)
        store(builder, floats(builder, out), _accumulate(builder, count, starts, step))

    return types.void(*[types.int64] * 5), codegen


@intrinsic
def add_weighted_events(context, tile, events, values, count, start, out):
    """`add_events` of ``values[i] * tile[k]``."""

    def codegen(context, builder, signature, args):
        tile, events, values, count, start, out = args
        tile, numbers = floats(builder, tile), as_pointer(builder, events, _INT32.as_pointer())
        values = floats(builder, values)

        def step(i, sums):
            k = builder.zext(builder.load(builder.gep(numbers, [i])), _INT64)
            value = spread(builder, builder.load(builder.gep(values, [i])))
            row = load(builder, builder.gep(tile, [builder.mul(k, _index(TILE))]), len(sums))
            return [fma(builder, value, own, total) for total, own in zip(sums, row, strict=True)]

        starts = load(builder, floats(builder, start), TILE // WIDTH)
        store(builder, floats(builder, out), _accumulate(builder, count, starts, step))

    return types.void(*[types.int64] * 6), codegen


def _row_multiplier(registers: int, count: int = ROWS) -> Any:
    """`multiply_rows` for so many registers of outputs and ``count`` rows."""

    @intrinsic
    def multiply_rows(context, tile, x, row_stride, step_stride, steps, start, start_stride, out, out_stride):
        def codegen(context, builder, signature, args):
            tile, x, start, out = (floats(builder, args[i]) for i in (0, 1, 5, 7))
            row_stride, step_stride, steps, start_stride, out_stride = (args[i] for i in (2, 3, 4, 6, 8))

            def rows(first, stride):
                return [builder.gep(first, [builder.mul(stride, _index(r))]) for r in range(count)]

            numbers = rows(x, row_stride)

            def step(k, sums):
                weights = load(builder, builder.gep(tile, [builder.mul(k, _index(TILE))]), registers)
                at = builder.mul(k, step_stride)
                after = []
                for r, row in enumerate(numbers):
                    value = spread(builder, builder.load(builder.gep(row, [at])))
                    own = sums[r * registers : (r + 1) * registers]
                    after += [fma(builder, value, weight, total) for weight, total in zip(weights, own, strict=True)]
                return after

            starts = [vector for row in rows(start, start_stride) for vector in load(builder, row, registers)]
            sums = _accumulate(builder, steps, starts, step)
            for r, row in enumerate(rows(out, out_stride)):
                store(builder, row, sums[r * registers : (r + 1) * registers])

        return types.void(*[types.int64] * 9), codegen

    return multiply_rows


# ``out[r, :STRIP] = start[r] + x[r] @ tile[:, :STRIP]`` for ``ROWS`` rows of ``steps`` numbers. ``x[r, k]`` lies at
# ``x + r * row_stride + k * step_stride``; strides count floats.
multiply_rows = _row_multiplier(_REGISTERS)
_multiply_half, _multiply_quarter = _row_multiplier(_REGISTERS // 2), _row_multiplier(max(1, _REGISTERS // 4))
_multiply_one, _multiply_one_half = (_row_multiplier(TILE // WIDTH // part, 1) for part in (1, 2))


@inline
def multiply_row(values, steps, tile, width, zeros, out):
    """``out[:width] = values[:steps] @ tile[:steps]``; addresses. Up to `TILE` numbers may be computed."""
    if width <= TILE // 2:
        _multiply_one_half(tile, values, 0, 1, steps, zeros, 0, out, 0)
    else:
        _multiply_one(tile, values, 0, 1, steps, zeros, 0, out, 0)


@inline
def row_of(rows, r):
    """The address of ``rows[r]``, in rows of `TILE` floats."""
    return rows.ctypes.data + r * TILE * rows.itemsize


@inline
def multiply(a, row_stride, step_stride, steps, rows, tile, width, zeros, out):
    """``out[:rows, :width] = A @ tile[:steps]``; ``A[r, s]`` is element ``r row_stride + s step_stride`` of ``a``.

    ``tile``, ``zeros`` and ``out`` have rows of `TILE`, of which some more than ``width`` may be computed; so may up to
    ``ROWS - 1`` more rows, of what lies there.
    """
    for r in range(0, rows, ROWS):
        x = a.ctypes.data + r * row_stride * a.itemsize
        for strip in range(0, width, STRIP):
            at, left = strip * a.itemsize, width - strip
            own_tile, start, target = (
                tile.ctypes.data + at, zeros.ctypes.data + at, out.ctypes.data + r * TILE * a.itemsize + at,
            )  # fmt: skip
            if left <= STRIP // 4:
                _multiply_quarter(own_tile, x, row_stride, step_stride, steps, start, 0, target, TILE)
            elif left <= STRIP // 2:
                _multiply_half(own_tile, x, row_stride, step_stride, steps, start, 0, target, TILE)
            else:
                multiply_rows(own_tile, x, row_stride, step_stride, steps, start, 0, target, TILE)


@intrinsic
def lowest_bit(context, word):
    """The position of the lowest bit that is set in an unsigned 64-bit word which is not 0."""

    def codegen(context, builder, signature, args):
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.uint64), codegen
