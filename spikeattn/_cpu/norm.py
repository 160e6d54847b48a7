"""LayerNorm of a row in compiled float32, its sums in the order of the definition (``ops/norm_lif/reference.py``)."""

import math

import numpy as np

from spikeattn._cpu.compiler import helper, inline

F = np.float32
PARTIAL_SUMS = 128  # of the definition; `ordered_sum` is written out for it


@inline
def _halvings(p):
    """The sum of `PARTIAL_SUMS` numbers, in the order of the definition.

    The halvings to 64, 32 and 16 sums in one loop, and those to one in registers: one by one, each would wait for the
    memory that the one before has just written.
    """
    for j in range(16):
        even = (p[j] + p[j + 64]) + (p[j + 32] + p[j + 96])
        odd = (p[j + 16] + p[j + 80]) + (p[j + 48] + p[j + 112])
        p[j] = even + odd
    even = ((p[0] + p[8]) + (p[4] + p[12])) + ((p[2] + p[10]) + (p[6] + p[14]))
    odd = ((p[1] + p[9]) + (p[5] + p[13])) + ((p[3] + p[11]) + (p[7] + p[15]))
    return even + odd


@inline
def _term(x, mean, squares):
    centred = x - mean
    return centred * centred if squares else x


@inline
def _ordered_sum(row, mean, squares, partial):
    """The sum of ``row``, or of ``(row - mean)^2``; ``squares`` is a constant."""
    D, p = row.size, partial
    begin = PARTIAL_SUMS if D >= PARTIAL_SUMS else 0
    if begin:
        part = row[:PARTIAL_SUMS]
        for j in range(PARTIAL_SUMS):
            p[j] = F(0.0) + _term(part[j], mean, squares)
    else:
        p[:] = F(0.0)
    while begin < D:
        part = row[begin : begin + PARTIAL_SUMS]  # a slice: an index with a sum in it does not vectorise
        for j in range(part.size):
            p[j] = p[j] + _term(part[j], mean, squares)
        begin += PARTIAL_SUMS
    return _halvings(p)


@helper
def ordered_sum(row, partial):
    """`ordered_sum` of the definition; ``partial`` is room for its partial sums."""
    return _ordered_sum(row, F(0.0), False, partial)


@inline
def row_statistics(row, eps, partial):
    """``(mean, rstd)`` of a row."""
    D = F(row.size)
    mean = ordered_sum(row, partial) / D
    variance = _ordered_sum(row, mean, True, partial) / D
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
