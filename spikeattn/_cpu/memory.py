"""Memory for results: what is freed is kept for the next result of its size.

The C library gives large blocks back to Linux, which fills every page of the next one with zeros. That takes longer
than the neurons do.
"""

import ctypes
import math
import mmap
import sys
import weakref

import numpy as np
import torch
from torch import Tensor

_SMALL = 128 << 10  # smaller results stay in the C library's own lists
_MOST_KEPT = 1 << 30
_HUGE_PAGE = 2 << 20


class Pool:
    """Blocks of memory that were results once, at most ``most_kept`` bytes of them.

    A block comes back when its tensor dies: in any thread, in the middle of any line, between a fork's two halves. So
    there is no lock; each step on the dictionary is one that the interpreter does whole, and what two threads can do to
    each other is to lose a block, which is then freed.
    """

    def __init__(self, most_kept: int) -> None:
        self._most_kept = most_kept
        self._free: dict[int, list[np.ndarray]] = {}  # blocks by size, the size that came back last at the end

    @property
    def kept(self) -> int:
        """Bytes that no tensor uses."""
        return sum(size * len(self._free.get(size, ())) for size in list(self._free))

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """``torch.empty`` on the CPU."""
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes < _SMALL:
            return torch.empty(shape, dtype=dtype, device="cpu")
        size = _rounded_up(nbytes)
        try:
            block = self._free[size].pop()
        except (KeyError, IndexError):
            block = _new_block(size)
        loan = block[:nbytes]  # an object of its own, which lives as long as a tensor needs it
        weakref.finalize(loan, self._give_back, block).atexit = False
        return torch.from_numpy(loan).view(dtype).view(shape)

    def release(self) -> None:
        """Free every block that no tensor uses."""
        self._free.clear()

    def _give_back(self, block: np.ndarray) -> None:
        same_size = self._free.pop(block.nbytes, [])
        same_size.append(block)
        self._free[block.nbytes] = same_size
        while self.kept > self._most_kept:
            for longest_unused in list(self._free)[:1]:
                blocks = self._free.get(longest_unused, [])
                del blocks[:1]
                if not blocks:
                    self._free.pop(longest_unused, None)


def _rounded_up(nbytes: int) -> int:
    """The size of a block: up to an eighth more, so that batches of nearly the same length share blocks."""
    step = 1 << (nbytes.bit_length() - 4)
    return -(-nbytes // step) * step


def _new_block(size: int) -> np.ndarray:
    """Memory in huge pages, where Linux has any: one page fault for 2 MiB."""
    block = torch.empty(size, dtype=torch.uint8, device="cpu").numpy()
    if size >= _HUGE_PAGE and sys.platform == "linux":
        first = -(-block.ctypes.data // mmap.PAGESIZE) * mmap.PAGESIZE
        advise = ctypes.CDLL(None).madvise
        advise(ctypes.c_void_p(first), ctypes.c_size_t(size - mmap.PAGESIZE), ctypes.c_int(mmap.MADV_HUGEPAGE))
    return block


_pool = Pool(_MOST_KEPT)
empty, release = _pool.empty, _pool.release
