"""Spikes kept for a backward as one bit each."""

from functools import cache
from typing import NamedTuple

import numba
import numpy as np
import torch
from torch import Tensor

from spikeattn._cpu.bits import WORD, pack_row
from spikeattn._cpu.compiler import SOURCES, Frame, Kernel, memory, next_blocks
from spikeattn._cpu.memory import empty
from spikeattn._cpu.storage import ELEMENT, load_row, store_row, target_row
from spikeattn._cpu.threads import spread

F = np.float32
U = np.uint64
_BLOCK = 1024  # words

_FRAME = Frame("x bits are_spikes N")
_record = _FRAME.record


class Packed(NamedTuple):
    """Spikes as bits, in the order of memory, and how the tensor of them lay there."""

    bits: Tensor
    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype


@cache
def _pack_kernel(storage: torch.dtype) -> Kernel:
    plan, element = (SOURCES,), ELEMENT[storage]

    def pack(frame):
        _ = plan
        p = numba.carray(frame, 1, _record)[0]
        words = (p.N + WORD - 1) // WORD
        x, bits = memory(p.x, p.N, element), memory(p.bits, words, U)
        are_spikes = memory(p.are_spikes, p.blocks, np.int64)
        buffer = np.empty(WORD, np.float32)
        first, last = next_blocks(frame, p.pieces, p.blocks, 0)
        while first < last:
            for block in range(first, last):
                spikes = True
                for w in range(block * _BLOCK, min(words, (block + 1) * _BLOCK)):
                    lo, hi = w * WORD, min(p.N, (w + 1) * WORD)
                    bits[w], own = pack_row(load_row(x[lo:hi], buffer[: hi - lo]), False)
                    spikes &= own
                are_spikes[block] = spikes
            first, last = next_blocks(frame, p.pieces, p.blocks, 1)

    return Kernel(pack, _FRAME)


@cache
def _unpack_kernel(storage: torch.dtype) -> Kernel:
    plan, element = (SOURCES,), ELEMENT[storage]

    def unpack(frame):
        _ = plan
        p = numba.carray(frame, 1, _record)[0]
        words = (p.N + WORD - 1) // WORD
        x, bits = memory(p.x, p.N, element), memory(p.bits, words, U)
        buffer = np.empty(WORD, np.float32)
        first, last = next_blocks(frame, p.pieces, p.blocks, 0)
        while first < last:
            for block in range(first, last):
                for w in range(block * _BLOCK, min(words, (block + 1) * _BLOCK)):
                    row = x[w * WORD : min(p.N, (w + 1) * WORD)]
                    spikes = target_row(row, buffer[: row.size])
                    word = bits[w]
                    for e in range(row.size):
                        spikes[e] = F(1.0) if (word >> U(e)) & U(1) else F(0.0)
                    store_row(row, spikes)
            first, last = next_blocks(frame, p.pieces, p.blocks, 1)

    return Kernel(unpack, _FRAME)


def _spread(kernel: Kernel, x: Tensor, bits: Tensor) -> bool:
    """Run a kernel of this file; whether all that it packed are spikes."""
    blocks = -(-bits.numel() // _BLOCK)
    are_spikes = np.zeros(blocks, np.int64)
    own = {"x": x.data_ptr(), "bits": bits.data_ptr(), "are_spikes": are_spikes.ctypes.data, "N": x.numel()}
    spread(kernel, blocks, x.numel(), **own)
    return bool(are_spikes.all())


def packed(x: Tensor) -> Packed | None:
    """``x`` as bits; None where it holds other numbers than 0 and 1, or has gaps in memory."""
    strides = x.stride()
    order = sorted(range(x.ndim), key=strides.__getitem__, reverse=True)
    if x.dtype not in ELEMENT or not x.numel() or x.is_neg() or not x.permute(order).is_contiguous():
        return None
    bits = empty((-(-x.numel() // WORD),), torch.int64)
    return Packed(bits, x.shape, strides, x.dtype) if _spread(_pack_kernel(x.dtype), x, bits) else None


def unpacked(spikes: Packed) -> Tensor:
    """What `packed` was given, with the same strides."""
    x = empty((spikes.shape.numel(),), spikes.dtype)
    _spread(_unpack_kernel(spikes.dtype), x, spikes.bits)
    return x.as_strided(spikes.shape, spikes.strides)
