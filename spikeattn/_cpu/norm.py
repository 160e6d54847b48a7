"""LayerNorm of a row in compiled float32, its sums in the order of the definition (``ops/norm_lif/reference.py``)."""

import math

import numba
import numpy as np

from spikeattn._cpu.compiler import inline

F = np.float32
PARTIAL_SUMS = 128  # of the definition; the tree of `ordered_sum` is written out for it


@inline
def _halve(partial, width):
    for j in range(width):
        partial[j] = partial[j] + partial[j + width]


@numba.njit(nogil=True, error_model="numpy")
def ordered_sum(row, partial):
    """`ordered_sum` of the definition; ``partial`` is room for its partial sums."""
    D = row.size
    partial[:] = F(0.0)
    for start in range(0, D - PARTIAL_SUMS + 1, PARTIAL_SUMS):
        for j in range(PARTIAL_SUMS):
            partial[j] = partial[j] + row[start + j]
    for i in range(D - D % PARTIAL_SUMS, D):
        partial[i % PARTIAL_SUMS] += row[i]
    _halve(partial, 64)  # constant widths: each becomes a few vector additions
    _halve(partial, 32)
    _halve(partial, 16)
    _halve(partial, 8)
    _halve(partial, 4)
    _halve(partial, 2)
    _halve(partial, 1)
    return partial[0]


@inline
def row_statistics(row, eps, work, partial):
    """``(mean, rstd)`` of a row."""
    D = F(row.size)
    mean = ordered_sum(row, partial) / D
    for i in range(row.size):
        centred = row[i] - mean
        work[i] = centred * centred
    variance = ordered_sum(work, partial) / D
    return mean, F(1.0) / F(math.sqrt(variance + eps))


@inline
def current_row(row, mean, rstd, weight, bias, padded, out):
    """What the neurons are given: the normalised row, or zero at padding."""
    if padded:
        out[:] = F(0.0)
    else:
        for i in range(row.size):
            out[i] = (row[i] - mean) * rstd * weight[i] + bias[i]


@inline
def grad_norm_row(row, mean, rstd, weight, grad, out, grad_weight, grad_bias, normal, scaled, partial):
    """dL/dX to ``out`` from dL/dI in ``grad``; adds to the sums of the gradients of weight and bias."""
    # Short loops: LLVM proves at most eight pairs of rows disjoint, and vectorises nothing beyond that.
    D = F(row.size)
    for i in range(row.size):
        normal[i] = (row[i] - mean) * rstd
    for i in range(row.size):
        scaled[i] = grad[i] * weight[i]
        grad_bias[i] = grad_bias[i] + grad[i]
    for i in range(row.size):
        grad_weight[i] = grad_weight[i] + grad[i] * normal[i]
        out[i] = scaled[i] * normal[i]
    mean_scaled = ordered_sum(scaled, partial) / D
    mean_product = ordered_sum(out, partial) / D
    for i in range(row.size):
        out[i] = rstd * (scaled[i] - mean_scaled - normal[i] * mean_product)
