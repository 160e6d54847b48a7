"""Rows of float32, float16 and bfloat16 in memory, float32 in arithmetic.

numba has no 16-bit floats on a CPU. A kernel sees their bits: uint16 for float16, int16 for bfloat16.
"""

import numpy as np
import torch
from numba import types
from numba.extending import overload
from torch import Tensor

from spikeattn._cpu.compiler import inline

U = np.uint32


# The type in which a kernel sees an element.
ELEMENT = {torch.float32: np.float32, torch.float16: np.uint16, torch.bfloat16: np.int16}


def as_rows(x: Tensor) -> tuple[Tensor, int]:
    """``x`` [T, *N] and the distance between its time steps, in elements; copied only if a step has gaps."""
    if not x[0].is_contiguous():
        x = x.contiguous()
    return x, x.stride(0) if x.shape[0] > 1 else 0


def as_values(x: Tensor) -> tuple[Tensor, int]:
    """``x`` in float32 and how many numbers it is in memory: one where it is one number expanded. For `fill_row`."""
    x = x.float()
    return (x.contiguous(), x.numel()) if any(x.stride()) else (x, 1)


def mask_arguments(name: str, mask: Tensor | None) -> dict[str, int]:
    """What a frame takes for a contiguous mask, or none."""
    return {name: 0 if mask is None else mask.data_ptr(), f"has_{name}": mask is not None}


@inline
def fill_row(row, values, first):
    """Copy ``values`` from ``first`` on into ``row``."""
    if values.size == 1:
        row[:] = values[0]
    else:
        row[:] = values[first : first + row.size]


def load_row(row, buffer):
    """``row`` in float32: itself, or converted into ``buffer``."""
    raise NotImplementedError


def target_row(row, buffer):
    """Where to write what shall become ``row``: itself if it is float32, else ``buffer``, for `store_row`."""
    raise NotImplementedError


def store_row(row, buffer):
    """Round ``buffer`` to ``row``, to nearest even; nothing to do where `target_row` was ``row`` itself."""
    raise NotImplementedError


@overload(load_row)
def _load_row(row, buffer):
    if row.dtype == types.float32:
        return lambda row, buffer: row
    return _load_bfloat16 if row.dtype == types.int16 else _load_float16


@overload(target_row)
def _target_row(row, buffer):
    if row.dtype == types.float32:
        return lambda row, buffer: row
    return lambda row, buffer: buffer


@overload(store_row)
def _store_row(row, buffer):
    if row.dtype == types.float32:
        return lambda row, buffer: None
    return _store_bfloat16 if row.dtype == types.int16 else _store_float16


def _load_bfloat16(row, buffer):
    bits = buffer.view(U)
    for i in range(row.size):
        bits[i] = U(np.uint16(row[i])) << U(16)
    return buffer


def _store_bfloat16(row, buffer):
    bits = buffer.view(U)
    for i in range(row.size):
        b = bits[i]
        rounded = (b + U(0x7FFF) + ((b >> U(16)) & U(1))) >> U(16)
        is_nan = (b & U(0x7FFFFFFF)) > U(0x7F800000)
        row[i] = np.int16(U(0x7FC0) if is_nan else rounded)


def _load_float16(row, buffer):
    bits = buffer.view(U)
    for i in range(row.size):
        b = U(row[i])
        exponent, fraction = b & U(0x7C00), b & U(0x3FF)
        normal = ((b & U(0x7FFF)) << U(13)) + U(0x38000000)  # 112 = 127 - 15 added to the exponent
        special = (fraction << U(13)) | U(0x7F800000)
        tiny = np.float32(np.float32(fraction) * np.float32(2.0**-24)).view(U)
        magnitude = tiny if exponent == U(0) else (special if exponent == U(0x7C00) else normal)
        bits[i] = ((b & U(0x8000)) << U(16)) | magnitude
    return buffer


def _store_float16(row, buffer):
    bits = buffer.view(U)
    for i in range(row.size):
        b = bits[i]
        size = b & U(0x7FFFFFFF)
        # Below the normal numbers, adding 0.5 leaves the rounded fraction in the lowest bits.
        tiny = np.float32(np.uint32(size).view(np.float32) + np.float32(0.5)).view(U) - U(0x3F000000)
        normal = (size - U(0x38000000) + U(0xFFF) + ((size >> U(13)) & U(1))) >> U(13)
        special = U(0x7E00) if size > U(0x7F800000) else U(0x7C00)
        magnitude = tiny if size < U(0x38800000) else (special if size >= U(0x47800000) else normal)
        row[i] = np.uint16(((b >> U(16)) & U(0x8000)) | magnitude)


@inline
def copy_row(target, row, buffer):
    """Store float32 ``row`` in ``target``; ``buffer`` is as long."""
    own = target_row(target, buffer)
    for e in range(row.size):
        own[e] = row[e]
    store_row(target, own)
