"""The fused CPU kernels of `norm_lif`: one row at a time over all t, so that all but ``x`` stays in the caches."""

import math
from functools import cache

import numba
import numpy as np
import torch
from torch import Tensor

from spikeattn._cpu.compiler import SOURCES, Frame, Kernel, allocate, memory, next_blocks, release
from spikeattn._cpu.memory import empty
from spikeattn._cpu.neuron import (
    F,
    derivative_row,
    for_surrogate,
    grad_row,
    neuron_scalars,
    step_row,
    surrogate_scalars,
)
from spikeattn._cpu.norm import PARTIAL_SUMS, current_row, grad_norm_row, row_statistics
from spikeattn._cpu.storage import (
    ELEMENT,
    as_rows,
    as_values,
    fill_row,
    load_row,
    mask_arguments,
    store_row,
    target_row,
)
from spikeattn._cpu.streams import prefetch
from spikeattn._cpu.threads import spread
from spikeattn._leak import has_exact_reciprocal
from spikeattn.ops.surrogate import Surrogate

# Rows are cut into blocks, each with its own sum of the gradients of weight and bias: not too many to sum, and enough
# for every thread. A block is worked on in groups of rows, since memory is read fastest in long runs.
_MOST_BLOCKS, _ENOUGH_BLOCKS, _RUN = 256, 32, 4096
# The backward keeps H of a group over time: no more floats than fit a core's L2 cache.
_TRAJECTORY = 1 << 17


def block_rows(rows: int, D: int) -> int:
    """Rows of a block: depends on nothing else, so that sums do not depend on the number of threads."""
    return max(1, -(-rows // _MOST_BLOCKS), min(-(-_RUN // D), -(-rows // _ENOUGH_BLOCKS)))


def group_rows(rows: int, D: int, kept_steps: int = 1) -> int:
    """Rows of a group in blocks of ``rows``, of which ``kept_steps`` time steps are kept."""
    return max(1, min(rows, -(-_RUN // D), _TRAJECTORY // (D * kept_steps)))


_FORWARD = Frame(
    "x x_stride weight bias mask has_mask v0 v0_size spikes v mean rstd R D time_steps steps_of_x block_rows group",
    "eps tau v_threshold v_rest",
)
_BACKWARD = Frame(
    "grad_spikes grad_stride grad_v grad_v_size x x_stride weight bias mask has_mask v0 v0_size mean rstd"
    " grad_x grad_weight grad_bias grad_v0 R D time_steps steps_of_x segment block_rows group kind",
    "tau v_threshold v_rest a b",
)
_forward_record, _backward_record = _FORWARD.record, _BACKWARD.record


@cache
def forward_kernel(storage: torch.dtype, decay_input: bool, divides: bool, hard_reset: bool) -> Kernel:
    """The forward for one kind of neuron."""
    plan, element = (decay_input, divides, hard_reset, SOURCES), ELEMENT[storage]

    def norm_lif_forward(frame):
        decay_input, divides, hard_reset, _ = plan
        p = numba.carray(frame, 1, _forward_record)[0]
        R, D, time_steps, steps_of_x, x_stride = p.R, p.D, p.time_steps, p.steps_of_x, p.x_stride
        block_rows, group, has_mask, eps = p.block_rows, p.group, p.has_mask, F(p.eps)
        tau, v_threshold, v_rest = F(p.tau), F(p.v_threshold), F(p.v_rest)
        x = memory(p.x, (time_steps - 1) * x_stride + R * D, element)
        weight, bias, mask = memory(p.weight, D, F), memory(p.bias, D, F), memory(p.mask, R, np.bool_)
        v0, v_last = memory(p.v0, p.v0_size, F), memory(p.v, R * D, F)
        spikes = memory(p.spikes, time_steps * R * D, element)
        mean, rstd = memory(p.mean, steps_of_x * R, F), memory(p.rstd, steps_of_x * R, F)
        currents, buffers, partials = allocate(group, D), allocate(2, D), allocate(1, PARTIAL_SUMS)
        partial = partials[0]
        m, s = F(0.0), F(0.0)
        first, last = next_blocks(frame, p.pieces, p.blocks, 0)
        while first < last:
            for begin in range(first * block_rows, min(R, last * block_rows), group):
                end = min(begin + group, R, last * block_rows)
                fill_row(v_last[begin * D : end * D], v0, begin * D)
                for t in range(time_steps):
                    for r in range(begin, end):
                        lo, hi, current = r * D, (r + 1) * D, currents[r - begin]
                        if t + 1 < steps_of_x:
                            prefetch(x, (t + 1) * x_stride + lo, D)
                        if t < steps_of_x:
                            row = load_row(x[t * x_stride + lo : t * x_stride + hi], buffers[0])
                            m, s = row_statistics(row, eps, partial)
                            current_row(row, m, s, weight, bias, has_mask and mask[r], current)
                            mean[t * R + r], rstd[t * R + r] = m, s
                        out = spikes[t * R * D + lo : t * R * D + hi]
                        fired = target_row(out, buffers[1])
                        v = v_last[lo:hi]
                        step_row(current, v, fired, tau, v_threshold, v_rest, decay_input, divides, hard_reset, True)
                        store_row(out, fired)
            first, last = next_blocks(frame, p.pieces, p.blocks, 1)
        release(currents)
        release(buffers)
        release(partials)

    return Kernel(norm_lif_forward, _FORWARD)


@cache
def backward_kernel(
    storage: torch.dtype, decay_input: bool, divides: bool, hard_reset: bool, detach_reset: bool
) -> Kernel:
    """The backward for one kind of neuron; segments of time as in `lif`."""
    plan, element = (decay_input, divides, hard_reset, detach_reset, SOURCES), ELEMENT[storage]

    def norm_lif_backward(frame):
        decay_input, divides, hard_reset, detach_reset, _ = plan
        p = numba.carray(frame, 1, _backward_record)[0]
        R, D, time_steps, steps_of_x, segment = p.R, p.D, p.time_steps, p.steps_of_x, p.segment
        x_stride, grad_stride, kind, has_mask = p.x_stride, p.grad_stride, p.kind, p.has_mask
        block_rows, group = p.block_rows, p.group
        tau, v_threshold, v_rest, a, b = F(p.tau), F(p.v_threshold), F(p.v_rest), F(p.a), F(p.b)
        x = memory(p.x, (time_steps - 1) * x_stride + R * D, element)
        grad_spikes = memory(p.grad_spikes, (time_steps - 1) * grad_stride + R * D, element)
        grad_x = memory(p.grad_x, steps_of_x * R * D, element)
        weight, bias, mask = memory(p.weight, D, F), memory(p.bias, D, F), memory(p.mask, R, np.bool_)
        mean, rstd = memory(p.mean, steps_of_x * R, F), memory(p.rstd, steps_of_x * R, F)
        grad_weight, grad_bias = memory(p.grad_weight, p.blocks * D, F), memory(p.grad_bias, p.blocks * D, F)
        v0, grad_v = memory(p.v0, p.v0_size, F), memory(p.grad_v, p.grad_v_size, F)
        carry = memory(p.grad_v0, R * D, F)
        static = steps_of_x == 1
        segments = (time_steps + segment - 1) // segment
        starts = allocate(segments, group * D)  # V before each segment
        h_seq, sums = allocate(segment, group * D), allocate(2, group * D)
        buffers, partials = allocate(7, D), allocate(1, PARTIAL_SUMS)
        potentials, totals, partial = sums[0], sums[1], partials[0]
        sg, current, grad = buffers[0], buffers[1], buffers[2]
        first, last = next_blocks(frame, p.pieces, p.blocks, 0)
        while first < last:
            for block in range(first, last):
                block_weight = grad_weight[block * D : (block + 1) * D]
                block_bias = grad_bias[block * D : (block + 1) * D]
                block_weight[:] = F(0.0)
                block_bias[:] = F(0.0)
                for begin in range(block * block_rows, min(R, (block + 1) * block_rows), group):
                    end = min(begin + group, R, (block + 1) * block_rows)
                    n = (end - begin) * D
                    fill_row(carry[begin * D : end * D], grad_v, begin * D)
                    fill_row(potentials[:n], v0, begin * D)
                    totals[:] = F(0.0)
                    # First over all segments but the last, for their starts; then each of them again, from the last.
                    for visit in range(2 * segments - 1):
                        part = visit if visit < segments else 2 * segments - 2 - visit
                        t_begin, t_end = part * segment, min(time_steps, (part + 1) * segment)
                        if visit < segments:
                            starts[part] = potentials
                        else:
                            potentials[:] = starts[part]
                        for t in range(t_begin, t_end):
                            for r in range(begin, end):
                                lo, hi, at = r * D, (r + 1) * D, (r if static else t * R + r)
                                own = slice(lo - begin * D, hi - begin * D)
                                if t + 1 < t_end:
                                    prefetch(x, (t + 1) * x_stride + lo, D)
                                row = load_row(x[t * x_stride + lo : t * x_stride + hi], buffers[3])
                                padded = has_mask and mask[r]
                                current_row(row, mean[at], rstd[at], weight, bias, padded, current)
                                step_row(
                                    current, potentials[own], h_seq[t - t_begin, own], tau, v_threshold, v_rest,
                                    decay_input, divides, hard_reset, False,
                                )  # fmt: skip
                        if visit < segments - 1:
                            continue
                        for t in range(t_end - 1, t_begin - 1, -1):
                            for r in range(begin, end):
                                lo, hi, at = r * D, (r + 1) * D, (r if static else t * R + r)
                                own = slice(lo - begin * D, hi - begin * D)
                                if t > 0:
                                    prefetch(grad_spikes, (t - 1) * grad_stride + lo, D)
                                    prefetch(x, (t - 1) * x_stride + lo, D)
                                h = h_seq[t - t_begin, own]
                                derivative_row(kind, h, v_threshold, a, b, sg)
                                grad_s = load_row(grad_spikes[t * grad_stride + lo : t * grad_stride + hi], buffers[3])
                                grad_row(
                                    grad_s, sg, h, carry[lo:hi], grad, tau, v_threshold, v_rest,
                                    decay_input, divides, hard_reset, detach_reset,
                                )  # fmt: skip
                                total = totals[own]
                                if static:
                                    for i in range(D):
                                        total[i] = total[i] + grad[i]
                                if static and t > 0:
                                    continue
                                out = grad_x[lo:hi] if static else grad_x[t * R * D + lo : t * R * D + hi]
                                result = target_row(out, buffers[4])
                                if has_mask and mask[r]:
                                    result[:] = F(0.0)
                                else:
                                    row = load_row(x[t * x_stride + lo : t * x_stride + hi], buffers[3])
                                    grad_norm_row(
                                        row, mean[at], rstd[at], weight, total if static else grad, result,
                                        block_weight, block_bias, buffers[5], buffers[6], partial,
                                    )  # fmt: skip
                                store_row(out, result)
            first, last = next_blocks(frame, p.pieces, p.blocks, 1)
        release(starts)
        release(h_seq)
        release(sums)
        release(buffers)
        release(partials)

    return Kernel(norm_lif_backward, _BACKWARD)


def _as_vector(x: Tensor) -> Tensor:
    """A weight or bias in float32."""
    return x.float().contiguous()


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
    D = weight.numel()
    rows = v.numel() // D
    in_block = block_rows(rows, D)
    x, x_stride = as_rows(x)
    v0, v0_size = as_values(v0)
    weight, bias = _as_vector(weight), _as_vector(bias)
    padding_mask = None if padding_mask is None else padding_mask.contiguous()
    spread(
        forward_kernel(x.dtype, decay_input, not has_exact_reciprocal(tau), v_reset is not None),
        -(-rows // in_block), spikes.numel(),
        x=x.data_ptr(), x_stride=x_stride, weight=weight.data_ptr(), bias=bias.data_ptr(),
        v0=v0.data_ptr(), v0_size=v0_size, spikes=spikes.data_ptr(), v=v.data_ptr(),
        mean=mean.data_ptr(), rstd=rstd.data_ptr(),
        R=rows, D=D, time_steps=time_steps, steps_of_x=x.shape[0],
        block_rows=in_block, group=group_rows(in_block, D), eps=eps,
        **mask_arguments("mask", padding_mask), **neuron_scalars(tau, None, v_threshold, v_reset),
    )  # fmt: skip
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
    in_block = block_rows(rows, D)
    blocks = -(-rows // in_block)
    # One sum a block: the totals do not depend on the threads.
    grad_weight, grad_bias = np.empty((blocks, D), np.float32), np.empty((blocks, D), np.float32)
    segment = max(math.isqrt(time_steps), min(time_steps, _TRAJECTORY // D))
    plan = (x.dtype, decay_input, not has_exact_reciprocal(tau), v_reset is not None, detach_reset)
    kernel = for_surrogate(backward_kernel, plan, surrogate)
    grad_spikes, grad_stride = as_rows(grad_spikes.to(x.dtype))
    grad_v, grad_v_size = as_values(grad_v)
    x, x_stride = as_rows(x)
    v0, v0_size = as_values(v0)
    own_weight, own_bias = _as_vector(weight), _as_vector(bias)
    padding_mask = None if padding_mask is None else padding_mask.contiguous()
    spread(
        kernel, blocks, time_steps * rows * D,
        grad_spikes=grad_spikes.data_ptr(), grad_stride=grad_stride, grad_v=grad_v.data_ptr(), grad_v_size=grad_v_size,
        x=x.data_ptr(), x_stride=x_stride, weight=own_weight.data_ptr(), bias=own_bias.data_ptr(),
        v0=v0.data_ptr(), v0_size=v0_size, mean=mean.data_ptr(), rstd=rstd.data_ptr(),
        grad_x=grad_x.data_ptr(), grad_v0=grad_v0.data_ptr(),
        grad_weight=grad_weight.ctypes.data, grad_bias=grad_bias.ctypes.data,
        R=rows, D=D, time_steps=time_steps, steps_of_x=x.shape[0], segment=segment,
        block_rows=in_block, group=group_rows(in_block, D, segment),
        **mask_arguments("mask", padding_mask), **neuron_scalars(tau, None, v_threshold, v_reset),
        **surrogate_scalars(surrogate.name, surrogate.alpha),
    )  # fmt: skip
    total_weight, total_bias = (torch.from_numpy(part.sum(0, dtype=np.float64)) for part in (grad_weight, grad_bias))
    return grad_x, total_weight.to(weight.dtype), total_bias.to(bias.dtype), grad_v0
