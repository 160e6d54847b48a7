"""Spikes kept for a backward as one bit each."""

from functools import cache
from typing import NamedTuple

import numba
import numpy as np
import torch
from torch import Tensor

from spikeattn._cpu.bits import WORD, pack, unpack
from spikeattn._cpu.compiler import SOURCES, Frame, Kernel, memory, next_blocks
from spikeattn._cpu.memory import empty
from spikeattn._cpu.storage import ELEMENT
from spikeattn._cpu.threads import spread

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

    def stride(self) -> tuple[int, ...]:
        """As of a tensor."""
        return self.strides


@cache
def _kernel(storage: torch.dtype, packs: bool) -> Kernel:
    """Numbers to bits, or bits to numbers."""
    plan, element = (packs, SOURCES), ELEMENT[storage]

    def convert(frame):
        packs, _ = plan
        p = numba.carray(frame, 1, _record)[0]
        words = (p.N + WORD - 1) // WORD
        x, bits = memory(p.x, p.N, element), memory(p.bits, words, U)
        are_spikes = memory(p.are_spikes, p.blocks, np.int64)
        first, last = next_blocks(frame, p.pieces, p.blocks, 0)
        while first < last:
            for block in range(first, last):
                spikes = True
                for w in range(block * _BLOCK, min(words, (block + 1) * _BLOCK)):
                    size = min(WORD, p.N - w * WORD)
                    if packs:
                        bits[w], own = pack(x, w * WORD, size)
                        spikes &= own
                    else:
                        unpack(bits[w], x, w * WORD, size)
                are_spikes[block] = spikes
            first, last = next_blocks(frame, p.pieces, p.blocks, 1)

    return Kernel(convert, _FRAME)


def _convert(packs: bool, x: Tensor, bits: Tensor) -> bool:
    """Run the kernel; whether all numbers are 0 or 1."""
    blocks = -(-bits.numel() // _BLOCK)
    are_spikes = np.zeros(blocks, np.int64)
    own = {"x": x.data_ptr(), "bits": bits.data_ptr(), "are_spikes": are_spikes.ctypes.data, "N": x.numel()}
    spread(_kernel(x.dtype, packs), blocks, x.numel(), **own)
    return bool(are_spikes.all())


def packed(x: Tensor) -> Packed | None:
    """``x`` as bits, each number in memory once; None where it holds others than 0 and 1."""
    if x.dtype not in ELEMENT or not x.numel():
        return None
    x = x.resolve_neg()
    own = _without_repeats(x)
    order = sorted(range(own.ndim), key=own.stride().__getitem__, reverse=True)
    if not own.permute(order).is_contiguous():  # it has gaps
        own = x = x.contiguous()
    bits = empty((-(-own.numel() // WORD),), torch.int64)
    return Packed(bits, x.shape, x.stride(), x.dtype) if _convert(True, own, bits) else None


def unpacked(spikes: Packed) -> Tensor:
    """What `packed` was given; with the same strides, if it had no gaps."""
    x = torch.empty_strided(spikes.shape, spikes.strides, dtype=spikes.dtype, device="meta")
    own = empty((_without_repeats(x).numel(),), spikes.dtype)
    _convert(False, own, spikes.bits)
    return own.as_strided(spikes.shape, spikes.strides)


def _without_repeats(x: Tensor) -> Tensor:
    """The first of each row of numbers that are one number in memory."""
    return x[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in x.stride())]
