"""The fused CPU kernels of `norm_lif`: one row at a time over all t, so that all but ``x`` stays in the caches."""

import math
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spikeattn._cpu.compiler import SOURCES, kernel, with_derivative
from spikeattn._cpu.memory import empty
from spikeattn._cpu.neuron import (
    F,
    custom_derivative_row,
    derivative_row,
    grad_row,
    neuron_scalars,
    step_row,
    surrogate_constants,
)
from spikeattn._cpu.norm import PARTIAL_SUMS, current_row, grad_norm_row, row_statistics
from spikeattn._cpu.storage import as_array, as_rows, as_values, fill_row, load_row, store_row, target_row
from spikeattn._cpu.threads import spread
from spikeattn.ops.surrogate import CustomSurrogate, Surrogate

# Rows are cut into so many blocks, each with its own sum of the gradients of weight and bias.
_BLOCKS = 256
# The backward keeps H of a row over time: no more floats than fit a core's L2 cache.
_TRAJECTORY = 1 << 16


@cache
def forward_kernel(decay_input: bool, hard_reset: bool) -> Any:
    """The forward for one kind of neuron."""
    plan = (decay_input, hard_reset, SOURCES)

    @kernel
    def norm_lif_forward(
        first, last, x, x_stride, weight, bias, mask, v0, spikes, v_last, mean, rstd,
        time_steps, block_rows, eps, tau, v_threshold, v_rest,
    ):  # fmt: skip
        decay_input, hard_reset, _ = plan
        D = weight.size
        R = v_last.size // D
        buffers = np.empty((4, D), np.float32)
        current, work = buffers[0], buffers[1]
        partial = np.empty(PARTIAL_SUMS, np.float32)
        for r in range(first * block_rows, min(R, last * block_rows)):
            lo, hi = r * D, (r + 1) * D
            v = v_last[lo:hi]
            fill_row(v, v0, lo)
            padded = mask.size > 0 and mask[r]
            for t in range(time_steps):
                if t == 0 or x_stride > 0:
                    row = load_row(x[t * x_stride + lo : t * x_stride + hi], buffers[2])
                    m, s = row_statistics(row, eps, work, partial)
                    current_row(row, m, s, weight, bias, padded, current)
                if t * R + r < mean.size:
                    mean[t * R + r], rstd[t * R + r] = m, s
                out = spikes[t * R * D + lo : t * R * D + hi]
                fired = target_row(out, buffers[3])
                step_row(current, v, fired, tau, v_threshold, v_rest, decay_input, True, hard_reset, True)
                store_row(out, fired)

    return norm_lif_forward


@cache
def backward_kernel(decay_input: bool, hard_reset: bool, detach_reset: bool) -> Any:
    """The backward for one kind of neuron; segments of time as in `lif`."""
    plan = (decay_input, hard_reset, detach_reset, SOURCES)

    @kernel
    def norm_lif_backward(
        first, last, grad_spikes, grad_stride, grad_v, x, x_stride, weight, bias, mask, v0, mean, rstd,
        grad_x, grad_weight, grad_bias, grad_v0,
        time_steps, segment, block_rows, tau, v_threshold, v_rest, kind, a, b,
    ):  # fmt: skip
        decay_input, hard_reset, detach_reset, _ = plan
        D = weight.size
        R = grad_v0.size // D
        static = grad_x.size == R * D
        segments = (time_steps + segment - 1) // segment
        starts = np.empty((segments, D), np.float32)  # V before each segment
        h_seq = np.empty((segment, D), np.float32)
        buffers = np.empty((11, D), np.float32)
        v, sg, current, grad, total = buffers[0], buffers[1], buffers[2], buffers[3], buffers[4]
        row_weight, row_bias = buffers[5], buffers[6]
        partial = np.empty(PARTIAL_SUMS, np.float32)
        for block in range(first, last):
            block_weight, block_bias = grad_weight[block], grad_bias[block]
            block_weight[:] = F(0.0)
            block_bias[:] = F(0.0)
            for r in range(block * block_rows, min(R, (block + 1) * block_rows)):
                lo, hi = r * D, (r + 1) * D
                padded = mask.size > 0 and mask[r]
                carry = grad_v0[lo:hi]
                fill_row(carry, grad_v, lo)
                fill_row(v, v0, lo)
                total[:] = F(0.0)
                row_weight[:] = F(0.0)
                row_bias[:] = F(0.0)
                # First over all segments but the last, for their starts; then each of them again, from the last.
                for visit in range(2 * segments - 1):
                    part = visit if visit < segments else 2 * segments - 2 - visit
                    begin, end = part * segment, min(time_steps, (part + 1) * segment)
                    if visit < segments:
                        starts[part] = v
                    else:
                        v[:] = starts[part]
                    for t in range(begin, end):
                        at = r if static else t * R + r
                        row = load_row(x[t * x_stride + lo : t * x_stride + hi], buffers[7])
                        current_row(row, mean[at], rstd[at], weight, bias, padded, current)
                        h = h_seq[t - begin]
                        step_row(current, v, h, tau, v_threshold, v_rest, decay_input, True, hard_reset, False)
                    if visit < segments - 1:
                        continue
                    for t in range(end - 1, begin - 1, -1):
                        h = h_seq[t - begin]
                        derivative_row(kind, h, v_threshold, a, b, sg)
                        at = t * grad_stride
                        grad_s = load_row(grad_spikes[at + lo : at + hi], buffers[7])
                        grad_row(
                            grad_s, sg, h, carry, grad, tau, v_threshold, v_rest,
                            decay_input, True, hard_reset, detach_reset,
                        )  # fmt: skip
                        if static:
                            for i in range(D):
                                total[i] = total[i] + grad[i]
                        if static and t > 0:
                            continue
                        out = grad_x[lo:hi] if static else grad_x[t * R * D + lo : t * R * D + hi]
                        result = target_row(out, buffers[8])
                        if padded:
                            result[:] = F(0.0)
                        else:
                            at = r if static else t * R + r
                            row = load_row(x[t * x_stride + lo : t * x_stride + hi], buffers[7])
                            grad_norm_row(
                                row, mean[at], rstd[at], weight, total if static else grad, result,
                                row_weight, row_bias, buffers[9], buffers[10], partial,
                            )  # fmt: skip
                        store_row(out, result)
                for i in range(D):
                    block_weight[i] = block_weight[i] + row_weight[i]
                    block_bias[i] = block_bias[i] + row_bias[i]

    return norm_lif_backward


@lru_cache(maxsize=64)
def custom_backward_kernel(plan: tuple[bool, bool, bool], surrogate: CustomSurrogate) -> Any:
    """The backward for one kind of neuron with a user's surrogate."""
    return with_derivative(backward_kernel(*plan), custom_derivative_row(surrogate.numba))


def _as_vector(x: Tensor) -> np.ndarray:
    """A weight or bias in float32."""
    return as_array(x.detach().float().contiguous())


def _as_mask(padding_mask: Tensor | None) -> np.ndarray:
    """The mask as one axis; empty if there is none."""
    return np.empty(0, np.bool_) if padding_mask is None else as_array(padding_mask.contiguous())


def norm_lif_forward_cpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    padding_mask: Tensor | None,
    v0: Tensor,
    time_steps: int,
    eps: float,
    tau: float,
    decay_input: bool,
    v_threshold: float,
    v_reset: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`norm_lif_reference` in one pass over memory, the same bits."""
    spikes = empty((time_steps, *x.shape[1:]), x.dtype)
    v = empty(x.shape[1:], torch.float32)
    mean, rstd = (empty((*x.shape[:-1], 1), torch.float32) for _ in range(2))
    rows = v.numel() // weight.numel()
    block_rows = -(-rows // _BLOCKS)
    run = forward_kernel(decay_input, v_reset is not None)
    arguments = (
        *as_rows(x), _as_vector(weight), _as_vector(bias), _as_mask(padding_mask), as_values(v0),
        as_array(spikes), as_array(v), as_array(mean), as_array(rstd),
        time_steps, block_rows, F(eps), *neuron_scalars(tau, None, v_threshold, v_reset),
    )  # fmt: skip
    blocks = -(-rows // max(1, block_rows))
    spread(lambda first, last: run(first, last, *arguments), blocks, spikes.numel())
    return spikes, v, mean, rstd


def norm_lif_backward_cpu(
    grad_spikes: Tensor,
    grad_v: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    padding_mask: Tensor | None,
    v0: Tensor,
    mean: Tensor,
    rstd: Tensor,
    time_steps: int,
    tau: float,
    decay_input: bool,
    v_threshold: float,
    v_reset: float | None,
    detach_reset: bool,
    surrogate: Surrogate,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`norm_lif_backward_reference` in one pass over memory."""
    D = weight.numel()
    grad_x, grad_v0 = empty(x.shape, x.dtype), empty(v0.shape, torch.float32)
    rows = v0.numel() // D
    block_rows = -(-rows // _BLOCKS)
    blocks = -(-rows // max(1, block_rows))
    # One sum a block: the totals do not depend on the threads.
    grad_weight, grad_bias = np.empty((blocks, D), np.float32), np.empty((blocks, D), np.float32)
    segment = max(math.isqrt(time_steps), min(time_steps, _TRAJECTORY // D))
    plan = (decay_input, v_reset is not None, detach_reset)
    custom = isinstance(surrogate, CustomSurrogate)
    run = custom_backward_kernel(plan, surrogate) if custom else backward_kernel(*plan)
    arguments = (
        *as_rows(grad_spikes), as_values(grad_v), *as_rows(x), _as_vector(weight), _as_vector(bias),
        _as_mask(padding_mask), as_values(v0), as_array(mean), as_array(rstd),
        as_array(grad_x), grad_weight, grad_bias, as_array(grad_v0),
        time_steps, segment, block_rows, *neuron_scalars(tau, None, v_threshold, v_reset),
        *surrogate_constants(surrogate.name, surrogate.alpha),
    )  # fmt: skip
    spread(lambda first, last: run(first, last, *arguments), blocks, time_steps * v0.numel())
    total_weight, total_bias = (torch.from_numpy(part.sum(0, dtype=np.float64)) for part in (grad_weight, grad_bias))
    return grad_x, total_weight.to(weight.dtype), total_bias.to(bias.dtype), grad_v0
