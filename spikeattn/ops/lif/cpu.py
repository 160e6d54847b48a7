"""The fused CPU kernels of `lif`: blocks of neurons, t inside, so that the membrane stays in the L1 cache."""

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
    fire,
    grad_row,
    neuron_scalars,
    reset,
    step_row,
    surrogate_constants,
)  # fmt: skip
from spikeattn._cpu.storage import as_array, as_rows, as_values, fill_row, load_row, store_row, target_row
from spikeattn._cpu.threads import spread
from spikeattn.ops.surrogate import CustomSurrogate, Surrogate

_FORWARD_BLOCK = 1024
# The backward keeps H of a block over time: at most this many steps, and no more floats than fit a core's L2 cache.
_SEGMENT = 1024
_TRAJECTORY = 1 << 16


def backward_width(time_steps: int) -> int:
    """Neurons in a block of the backward: 64 to 1024, a power of two."""
    return max(64, min(1024, _TRAJECTORY // (1 << (min(time_steps, _SEGMENT) - 1).bit_length())))


@cache
def forward_kernel(decay_input: bool, divides: bool, hard_reset: bool) -> Any:
    """The forward for one kind of neuron."""
    plan = (decay_input, divides, hard_reset, SOURCES)

    @kernel
    def lif_forward(first, last, x, x_stride, v0, spikes, v_last, v_seq, time_steps, width, tau, v_threshold, v_rest):
        decay_input, divides, hard_reset, _ = plan
        N = v_last.size
        buffers = np.empty((2, width), np.float32)
        for block in range(first, last):
            lo, hi = block * width, min(N, (block + 1) * width)
            n = hi - lo
            v = v_last[lo:hi]
            fill_row(v, v0, lo)
            for t in range(time_steps):
                current = load_row(x[t * x_stride + lo : t * x_stride + hi], buffers[0, :n])
                row = spikes[t * N + lo : t * N + hi]
                fired = target_row(row, buffers[1, :n])
                step_row(current, v, fired, tau, v_threshold, v_rest, decay_input, divides, hard_reset, True)
                store_row(row, fired)
                if v_seq.size:
                    v_seq[t * N + lo : t * N + hi] = v

    return lif_forward


@cache
def backward_kernel(decay_input: bool, divides: bool, hard_reset: bool, detach_reset: bool) -> Any:
    """The backward for one kind of neuron; what it does with a long T stands in ``README.md``."""
    plan = (decay_input, divides, hard_reset, detach_reset, SOURCES)

    @kernel
    def lif_backward(
        first, last, grad_spikes, grad_stride, grad_v, grad_v_seq, x, x_stride, v0, grad_x, grad_v0, grad_r_tau,
        time_steps, segment, width, tau, v_threshold, v_rest, kind, a, b,
    ):  # fmt: skip
        decay_input, divides, hard_reset, detach_reset, _ = plan
        N = grad_v0.size
        static = x_stride == 0 and grad_x.size == N
        segments = (time_steps + segment - 1) // segment
        starts = np.empty((segments, width), np.float32)  # V before each segment
        h_seq = np.empty((segment, width), np.float32)
        buffers = np.empty((6, width), np.float32)
        for block in range(first, last):
            lo, hi = block * width, min(N, (block + 1) * width)
            n = hi - lo
            v, sg, total, terms = buffers[0, :n], buffers[1, :n], buffers[2, :n], buffers[3, :n]
            carry = grad_v0[lo:hi]
            fill_row(carry, grad_v, lo)
            total[:] = F(0.0)
            terms[:] = F(0.0)
            fill_row(v, v0, lo)
            # First over all segments but the last, for their starts; then each of them again, from the last.
            for visit in range(2 * segments - 1):
                part = visit if visit < segments else 2 * segments - 2 - visit
                begin, end = part * segment, min(time_steps, (part + 1) * segment)
                if visit < segments:
                    starts[part, :n] = v
                else:
                    v[:] = starts[part, :n]
                for t in range(begin, end):
                    current = load_row(x[t * x_stride + lo : t * x_stride + hi], buffers[4, :n])
                    h = h_seq[t - begin, :n]
                    step_row(current, v, h, tau, v_threshold, v_rest, decay_input, divides, hard_reset, False)
                if visit < segments - 1:
                    continue
                for t in range(end - 1, begin - 1, -1):
                    h = h_seq[t - begin, :n]
                    derivative_row(kind, h, v_threshold, a, b, sg)
                    if grad_v_seq.size:
                        grad = grad_v_seq[t * N + lo : t * N + hi]
                        for i in range(n):
                            carry[i] = carry[i] + grad[i]
                    grad_s = load_row(grad_spikes[t * grad_stride + lo : t * grad_stride + hi], buffers[4, :n])
                    row = grad_x[lo:hi] if static else grad_x[t * N + lo : t * N + hi]
                    out = buffers[5, :n] if static else target_row(row, buffers[5, :n])
                    grad_row(
                        grad_s, sg, h, carry, out, tau, v_threshold, v_rest,
                        decay_input, divides, hard_reset, detach_reset,
                    )  # fmt: skip
                    if static:
                        for i in range(n):
                            total[i] = total[i] + out[i]
                    else:
                        store_row(row, out)
                    if not divides:  # sg holds dL/dH[t] now
                        if t > begin:
                            h = h_seq[t - begin - 1, :n]
                            for i in range(n):
                                v[i] = reset(h[i], fire(h[i], v_threshold), v_threshold, v_rest, hard_reset)
                        else:
                            v[:] = starts[part, :n]
                        current = load_row(x[t * x_stride + lo : t * x_stride + hi], buffers[4, :n])
                        for i in range(n):
                            leak = v[i] - v_rest
                            terms[i] += sg[i] * (current[i] - leak if decay_input else -leak)
            if static:
                row = grad_x[lo:hi]
                out = target_row(row, total)
                for i in range(n):
                    out[i] = total[i]
                store_row(row, total)
            if not divides:
                double = 0.0
                for i in range(n):
                    double += terms[i]
                grad_r_tau[block] = double

    return lif_backward


@lru_cache(maxsize=64)
def custom_backward_kernel(plan: tuple[bool, bool, bool, bool], surrogate: CustomSurrogate) -> Any:
    """The backward for one kind of neuron with a user's surrogate."""
    return with_derivative(backward_kernel(*plan), custom_derivative_row(surrogate.numba))


def lif_forward_cpu(
    x: Tensor,
    v0: Tensor,
    r_tau: Tensor | None,
    time_steps: int,
    tau: float,
    decay_input: bool,
    v_threshold: float,
    v_reset: float | None,
    return_v_seq: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`lif_reference` in one pass over memory, the same bits."""
    shape = (time_steps, *x.shape[1:])
    spikes = empty(shape, x.dtype)
    v = empty(shape[1:], torch.float32)
    v_seq = empty(shape if return_v_seq else (0,), torch.float32)
    run = forward_kernel(decay_input, r_tau is None, v_reset is not None)
    arguments = (
        *as_rows(x), as_values(v0), as_array(spikes), as_array(v), as_array(v_seq),
        time_steps, _FORWARD_BLOCK, *neuron_scalars(tau, r_tau, v_threshold, v_reset),
    )  # fmt: skip
    spread(lambda first, last: run(first, last, *arguments), -(-v.numel() // _FORWARD_BLOCK), spikes.numel())
    return spikes, v, v_seq


def lif_backward_cpu(
    grad_spikes: Tensor,
    grad_v: Tensor,
    grad_v_seq: Tensor | None,
    x: Tensor,
    v0: Tensor,
    r_tau: Tensor | None,
    time_steps: int,
    tau: float,
    decay_input: bool,
    v_threshold: float,
    v_reset: float | None,
    detach_reset: bool,
    surrogate: Surrogate,
) -> tuple[Tensor, Tensor, Tensor]:
    """`lif_backward_reference` in one pass over memory; which bits are the same: ``docs/numerics.md``."""
    grad_x = empty(x.shape, x.dtype)
    grad_v0 = empty(v0.shape, torch.float32)
    width = backward_width(time_steps)
    blocks = -(-v0.numel() // width)
    parts = np.zeros(blocks)  # of the gradient of r_tau, one a block: their sum does not depend on the threads
    plan = (decay_input, r_tau is None, v_reset is not None, detach_reset)
    custom = isinstance(surrogate, CustomSurrogate)
    run = custom_backward_kernel(plan, surrogate) if custom else backward_kernel(*plan)
    grad_v_seq = torch.empty(0) if grad_v_seq is None else grad_v_seq
    arguments = (
        *as_rows(grad_spikes), as_values(grad_v), as_array(grad_v_seq.contiguous()),
        *as_rows(x), as_values(v0), as_array(grad_x), as_array(grad_v0), parts,
        time_steps, min(time_steps, _SEGMENT), width, *neuron_scalars(tau, r_tau, v_threshold, v_reset),
        *surrogate_constants(surrogate.name, surrogate.alpha),
    )  # fmt: skip
    spread(lambda first, last: run(first, last, *arguments), blocks, time_steps * v0.numel())
    return grad_x, grad_v0, torch.tensor(parts.sum(), dtype=torch.float32)
