"""The CPU kernels of `event_linear`: weights of the inputs that fired are added up, in registers."""

from functools import cache

import numba
import numpy as np
import torch
from torch import Tensor

from spikeattn._cpu.bits import WORD, count_bits, pack
from spikeattn._cpu.compiler import SOURCES, Frame, Kernel, helper, memory, next_blocks
from spikeattn._cpu.memory import empty
from spikeattn._cpu.threads import spread
from spikeattn._cpu.vectors import (
    ROWS,
    STRIP,
    TILE,
    add_events,
    add_weighted_events,
    lowest_bit,
    multiply_rows,
)  # fmt: skip

F = np.float32
U = np.uint64
# From this share of inputs that are not zero on, multiplying by all of them is faster than looking for them.
DENSE = 0.45
_MOST_ROWS = 16 * ROWS  # of a block: their inputs stay in the L1 cache, and a tile of weights is read once for them
_STRETCH = 16  # floats of one cache line
_CHUNK = 128  # rows whose gradients of one tile, and events, lie in the L2 cache
_MOST_WORDS, _MOST_TILES = 4, 8  # of inputs and outputs whose gradients are added up together
_WORK_OF_A_STEP = 16  # multiply-adds that take as long as a neuron's step, for `spread`

_TILES = Frame("weight row_stride column_stride out inputs outputs")
_FORWARD = Frame("x weight bias y fired has_fired tally rows inputs outputs block_rows")
_BACKWARD = Frame("grad grad_weight fired rows inputs outputs slice group")
_tiles_record, _forward_record, _backward_record = _TILES.record, _FORWARD.record, _BACKWARD.record


@helper
def list_events(words, events):
    """Positions of the bits that are set, in order."""
    count = 0
    for w in range(words.size):
        word = words[w]
        while word != U(0):
            events[count] = w * WORD + lowest_bit(word)
            word &= word - U(1)
            count += 1
    return count


@helper
def count_of(word):
    """How many bits are set, a signed number."""
    return np.int64(count_bits(word))


@helper
def pack_inputs(row, words):
    """Which inputs are not zero, as bits: ``(how many, whether all of them are 1)``."""
    count, spikes = 0, True
    for w in range(words.size):
        words[w], own = pack(row, w * WORD, min(WORD, row.size - w * WORD))
        spikes &= own
        count += count_of(words[w])
    return count, spikes


@cache
def tiles_kernel() -> Kernel:
    """A matrix of any strides as tiles [tiles, inputs, TILE]; what the last one has too many stays as it was."""
    sources = SOURCES

    def in_tiles(frame):
        _ = sources
        p = numba.carray(frame, 1, _tiles_record)[0]
        inputs, outputs, row_stride, column_stride = p.inputs, p.outputs, p.row_stride, p.column_stride
        weight = memory(p.weight, (outputs - 1) * row_stride + (inputs - 1) * column_stride + 1, F)
        out = memory(p.out, p.blocks * inputs * TILE, F)
        first, last = next_blocks(frame, p.pieces, p.blocks, 0)
        while first < last:
            for tile in range(first, last):
                for begin in range(0, inputs, _STRETCH):
                    for o in range(tile * TILE, min(outputs, (tile + 1) * TILE)):
                        for k in range(begin, min(inputs, begin + _STRETCH)):
                            at = (tile * inputs + k) * TILE + o - tile * TILE
                            out[at] = weight[o * row_stride + k * column_stride]
            first, last = next_blocks(frame, p.pieces, p.blocks, 1)

    return Kernel(in_tiles, _TILES)


@cache
def forward_kernel() -> Kernel:
    """Rows times weights, plus bias; and which inputs were not zero."""
    sources = SOURCES

    def event_linear_forward(frame):
        _ = sources
        p = numba.carray(frame, 1, _forward_record)[0]
        rows, inputs, outputs, most, has_fired = p.rows, p.inputs, p.outputs, p.block_rows, p.has_fired
        words_of_row = (inputs + WORD - 1) // WORD
        tiles = (outputs + TILE - 1) // TILE
        x, y = memory(p.x, rows * inputs, F), memory(p.y, rows * outputs, F)
        fired = memory(p.fired, rows * words_of_row if has_fired else 0, U)
        tally = memory(p.tally, 2 * p.blocks, np.int64)
        bits = np.empty((most, words_of_row), U)
        events, values = np.empty((most, inputs), np.int32), np.empty((most, inputs), F)
        counts = np.empty(most, np.int64)
        last_tile = np.empty((ROWS, TILE), F)  # which may be wider than what is left of a row
        first, last = next_blocks(frame, p.pieces, p.blocks, 0)
        while first < last:
            for block in range(first, last):
                lo, hi = block * most, min(rows, (block + 1) * most)
                n = hi - lo
                total, spikes = 0, True
                for r in range(n):
                    row = x[(lo + r) * inputs : (lo + r + 1) * inputs]
                    words = fired[(lo + r) * words_of_row : (lo + r + 1) * words_of_row] if has_fired else bits[r]
                    counts[r], own = pack_inputs(row, words)
                    spikes &= own
                    total += counts[r]
                tally[2 * block], tally[2 * block + 1] = total, spikes
                together = n - n % ROWS if total > DENSE * n * inputs else 0
                for r in range(together, n):
                    words = fired[(lo + r) * words_of_row : (lo + r + 1) * words_of_row] if has_fired else bits[r]
                    list_events(words, events[r])
                    if not spikes:
                        for i in range(counts[r]):
                            values[r, i] = x[(lo + r) * inputs + events[r, i]]
                for tile in range(tiles):
                    width = min(TILE, outputs - tile * TILE)
                    weight, bias = p.weight + 4 * tile * TILE * inputs, p.bias + 4 * tile * TILE
                    for r in range(0, together, ROWS):
                        at = (lo + r) * outputs + tile * TILE
                        out, stride = (p.y + 4 * at, outputs) if width == TILE else (last_tile.ctypes.data, TILE)
                        for strip in range(0, TILE, STRIP):
                            multiply_rows(
                                weight + 4 * strip, p.x + 4 * (lo + r) * inputs, inputs, 1, inputs,
                                bias + 4 * strip, 0, out + 4 * strip, stride,
                            )  # fmt: skip
                        if width < TILE:
                            for own in range(ROWS):
                                y[at + own * outputs : at + own * outputs + width] = last_tile[own, :width]
                    for r in range(together, n):
                        at = (lo + r) * outputs + tile * TILE
                        out = p.y + 4 * at if width == TILE else last_tile.ctypes.data
                        listed = events[r].ctypes.data
                        if spikes:
                            add_events(weight, listed, counts[r], bias, out)
                        else:
                            add_weighted_events(weight, listed, values[r].ctypes.data, counts[r], bias, out)
                        if width < TILE:
                            y[at : at + width] = last_tile[0, :width]
            first, last = next_blocks(frame, p.pieces, p.blocks, 1)

    return Kernel(event_linear_forward, _FORWARD)


@cache
def weight_gradient_kernel() -> Kernel:
    """For each input, the gradients of the rows in which it fired, added up in the order of rows."""
    sources = SOURCES

    def event_linear_backward(frame):
        _ = sources
        p = numba.carray(frame, 1, _backward_record)[0]
        rows, inputs, outputs, most_inputs, most_tiles = p.rows, p.inputs, p.outputs, p.slice, p.group
        words_of_row = (inputs + WORD - 1) // WORD
        tiles = (outputs + TILE - 1) // TILE
        groups = (tiles + most_tiles - 1) // most_tiles
        grad, fired = memory(p.grad, rows * outputs, F), memory(p.fired, rows * words_of_row, U)
        events, counts = np.empty((most_inputs, _CHUNK), np.int32), np.empty(most_inputs, np.int64)
        grad_tiles = np.zeros((most_tiles, _CHUNK, TILE), F)
        first, last = next_blocks(frame, p.pieces, p.blocks, 0)
        while first < last:
            for block in range(first, last):
                low, first_tile = block // groups * most_inputs, block % groups * most_tiles
                n_inputs, n_tiles = min(most_inputs, inputs - low), min(most_tiles, tiles - first_tile)
                n_outputs = min(outputs - first_tile * TILE, n_tiles * TILE)
                for begin in range(0, rows, _CHUNK):
                    n = min(_CHUNK, rows - begin)
                    counts[:] = 0
                    for r in range(n):
                        at = (begin + r) * words_of_row + low // WORD
                        for w in range((n_inputs + WORD - 1) // WORD):
                            bits = fired[at + w]
                            while bits != U(0):
                                k = w * WORD + lowest_bit(bits)
                                bits &= bits - U(1)
                                events[k, counts[k]] = r
                                counts[k] += 1
                        at = (begin + r) * outputs + first_tile * TILE
                        for o in range(n_outputs):
                            grad_tiles[o // TILE, r, o % TILE] = grad[at + o]
                    for tile in range(n_tiles):
                        for k in range(n_inputs):
                            out = p.grad_weight + 4 * ((low + k) * tiles + first_tile + tile) * TILE
                            add_events(grad_tiles[tile].ctypes.data, events[k].ctypes.data, counts[k], out, out)
            first, last = next_blocks(frame, p.pieces, p.blocks, 1)

    return Kernel(event_linear_backward, _BACKWARD)


def _zeros(shape: tuple[int, ...]) -> Tensor:
    """float32, whatever the default is, and without PyTorch's threads, which hang after a fork."""
    return torch.from_numpy(np.zeros(shape, np.float32))


def in_tiles(weight: Tensor) -> Tensor:
    """``weight`` [outputs, inputs] as tiles [tiles, inputs, TILE], the last one filled up with zeros."""
    outputs, inputs = weight.shape
    shape = (-(-outputs // TILE), inputs, TILE)
    tiles = _zeros(shape) if outputs % TILE else empty(shape, torch.float32)
    spread(
        tiles_kernel(), shape[0], weight.numel(),
        weight=weight.data_ptr(), row_stride=weight.stride(0), column_stride=weight.stride(1), out=tiles.data_ptr(),
        inputs=inputs, outputs=outputs,
    )  # fmt: skip
    return tiles


def linear_cpu(x: Tensor, weight: Tensor, bias: Tensor | None, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """``x`` [rows, inputs] times ``weight`` [outputs, inputs], plus ``bias``; then as in `event_linear_forward`."""
    x = x.contiguous()
    rows, inputs = x.shape
    outputs = weight.shape[0]
    y = empty((rows, outputs), torch.float32)
    fired = empty((rows if keep else 0, -(-inputs // WORD)), torch.int64)
    tiles = in_tiles(weight)
    start = _zeros((tiles.shape[0] * TILE,))
    if bias is not None:
        start[:outputs] = bias
    each = -(-rows // (4 * torch.get_num_threads()))
    block_rows = min(_MOST_ROWS, -(-each // ROWS) * ROWS)
    blocks = -(-rows // block_rows) if rows else 0
    tally = np.zeros((blocks, 2), np.int64)
    spread(
        forward_kernel(), blocks, rows * inputs * outputs // _WORK_OF_A_STEP,
        x=x.data_ptr(), weight=tiles.data_ptr(), bias=start.data_ptr(), y=y.data_ptr(),
        fired=fired.data_ptr(), has_fired=keep, tally=tally.ctypes.data,
        rows=rows, inputs=inputs, outputs=outputs, block_rows=block_rows,
    )  # fmt: skip
    return y, fired, torch.tensor([int(tally[:, 0].sum()), int(tally[:, 1].all())])


def _slice(inputs: int, tiles: int) -> int:
    """Inputs of a block: all, so that gradients are read once, or so few that every thread has blocks."""
    words = min(_MOST_WORDS, -(-inputs // WORD))
    while words > 1 and tiles * -(-inputs // (words * WORD)) < 2 * torch.get_num_threads():
        words = (words + 1) // 2
    return words * WORD


def weight_gradient_cpu(grad: Tensor, fired: Tensor, inputs: int) -> Tensor:
    """``grad.T @ x`` [outputs, inputs] of ``grad`` [rows, outputs] and the bits of ``x`` [rows, inputs]."""
    rows, outputs = grad.shape
    tiles = -(-outputs // TILE)
    own = _slice(inputs, tiles)
    slices = -(-inputs // own)
    # As many tiles in one block as leave every thread some: they share lists of events.
    group = min(max(1, tiles * slices // (2 * torch.get_num_threads())), tiles, _MOST_TILES)
    grad_weight = _zeros((inputs, tiles * TILE))
    spread(
        weight_gradient_kernel(), slices * -(-tiles // group), rows * inputs * outputs // _WORK_OF_A_STEP,
        grad=grad.data_ptr(), grad_weight=grad_weight.data_ptr(), fired=fired.data_ptr(),
        rows=rows, inputs=inputs, outputs=outputs, slice=own, group=group,
    )  # fmt: skip
    return grad_weight[:, :outputs].t().contiguous()
