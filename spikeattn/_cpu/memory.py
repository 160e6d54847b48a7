"""Memory for results."""

import ctypes
import mmap
import sys

import torch
from torch import Tensor

# glibc maps blocks from 32 MiB on anew at each call and the kernel fills them page by page: with pages of 4 KiB that
# takes longer than the neurons do.
_LARGE = 32 << 20


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """``torch.empty`` on the CPU; large ones ask Linux for huge pages."""
    out = torch.empty(shape, dtype=dtype)
    if out.nbytes >= _LARGE and sys.platform == "linux":
        first = -(-out.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        size = out.data_ptr() + out.nbytes - first
        advise = ctypes.CDLL(None).madvise
        advise(ctypes.c_void_p(first), ctypes.c_size_t(size), ctypes.c_int(mmap.MADV_HUGEPAGE))  # a hint: may fail
    return out
