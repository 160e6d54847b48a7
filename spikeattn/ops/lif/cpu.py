"""The fused CPU kernels of `lif`: blocks of neurons, t inside, so that the membrane stays in the L1 cache."""

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
    fire,
    for_surrogate,
    grad_row,
    neuron_scalars,
    reset,
    step_row,
    surrogate_scalars,
)  # fmt: skip
from spikeattn._cpu.storage import ELEMENT, as_rows, as_values, fill_row, load_row, store_row, target_row
from spikeattn._cpu.streams import CHUNK, prefetch, stream, streams
from spikeattn._cpu.threads import spread
from spikeattn._leak import has_exact_reciprocal
from spikeattn.ops.surrogate import Surrogate

# Neurons of a block: many, since memory is read fastest in long rows, and few enough for every thread to have blocks.
_WIDEST, _NARROWEST, _FEWEST_BLOCKS = 2048, 64, 32
# The backward keeps H of a block over time: at most this many steps, and no more floats than fit a core's L2 cache.
_SEGMENT = 1024
_TRAJECTORY = 1 << 17


def block_width(neurons: int, kept_steps: int = 1) -> int:
    """Neurons of a block of which ``kept_steps`` time steps are kept, a power of two."""
    width = min(neurons // _FEWEST_BLOCKS, _TRAJECTORY // kept_steps, _WIDEST)
    return max(_NARROWEST, 1 << width.bit_length() - 1 if width else 0)


_FORWARD = Frame(
    "x x_stride v0 v0_size spikes v v_seq has_v_seq N time_steps width streams",
    "tau v_threshold v_rest",
)
_BACKWARD = Frame(
    "grad_spikes grad_stride grad_v grad_v_size grad_v_seq has_v_seq x x_stride v0 v0_size grad_x grad_v0 grad_r_tau"
    " N time_steps static segment width kind streams",
    "tau v_threshold v_rest a b",
)
_forward_record, _backward_record = _FORWARD.record, _BACKWARD.record


@cache
def forward_kernel(storage: torch.dtype, decay_input: bool, divides: bool, hard_reset: bool) -> Kernel:
    """The forward for one kind of neuron."""
    plan, element = (storage == torch.float32, decay_input, divides, hard_reset, SOURCES), ELEMENT[storage]

    def lif_forward(frame):
        may_stream, decay_input, divides, hard_reset, _ = plan
        p = numba.carray(frame, 1, _forward_record)[0]
        N, time_steps, width, x_stride, has_v_seq = p.N, p.time_steps, p.width, p.x_stride, p.has_v_seq
        tau, v_threshold, v_rest = F(p.tau), F(p.v_threshold), F(p.v_rest)
        x, spikes = memory(p.x, (time_steps - 1) * x_stride + N, element), memory(p.spikes, time_steps * N, element)
        v0, v_last, v_seq = memory(p.v0, p.v0_size, F), memory(p.v, N, F), memory(p.v_seq, time_steps * N, F)
        buffers = allocate(2, width)
        first, last = next_blocks(frame, p.pieces, p.blocks, 0)
        while first < last:
            for block in range(first, last):
                lo, hi = block * width, min(N, (block + 1) * width)
                n = hi - lo
                v = v_last[lo:hi]
                fill_row(v, v0, lo)
                for t in range(time_steps):
                    if may_stream and p.streams:
                        for c in range(lo, hi, CHUNK):
                            end = min(hi, c + CHUNK)
                            if t + 1 < time_steps:
                                prefetch(x, (t + 1) * x_stride + c, end - c)
                            current = load_row(x[t * x_stride + c : t * x_stride + end], buffers[0, : end - c])
                            fired, own = buffers[1, : end - c], v_last[c:end]
                            step_row(
                                current, own, fired, tau, v_threshold, v_rest, decay_input, divides, hard_reset, True
                            )
                            stream(spikes, t * N + c, fired)
                    else:
                        current = load_row(x[t * x_stride + lo : t * x_stride + hi], buffers[0, :n])
                        row = spikes[t * N + lo : t * N + hi]
                        fired = target_row(row, buffers[1, :n])
                        step_row(current, v, fired, tau, v_threshold, v_rest, decay_input, divides, hard_reset, True)
                        store_row(row, fired)
                    if has_v_seq:
                        v_seq[t * N + lo : t * N + hi] = v
            first, last = next_blocks(frame, p.pieces, p.blocks, 1)
        release(buffers)

    return Kernel(lif_forward, _FORWARD)


@cache
def backward_kernel(
    storage: torch.dtype, decay_input: bool, divides: bool, learned: bool, hard_reset: bool, detach_reset: bool
) -> Kernel:
    """The backward for one kind of neuron; what it does with a long T stands in ``README.md``."""
    plan = (storage == torch.float32, decay_input, divides, learned, hard_reset, detach_reset, SOURCES)
    element = ELEMENT[storage]

    def lif_backward(frame):
        may_stream, decay_input, divides, learned, hard_reset, detach_reset, _ = plan
        p = numba.carray(frame, 1, _backward_record)[0]
        N, time_steps, segment, width, kind = p.N, p.time_steps, p.segment, p.width, p.kind
        x_stride, grad_stride, static, has_v_seq = p.x_stride, p.grad_stride, p.static, p.has_v_seq
        tau, v_threshold, v_rest, a, b = F(p.tau), F(p.v_threshold), F(p.v_rest), F(p.a), F(p.b)
        x = memory(p.x, (time_steps - 1) * x_stride + N, element)
        grad_spikes = memory(p.grad_spikes, (time_steps - 1) * grad_stride + N, element)
        grad_x = memory(p.grad_x, N if static else time_steps * N, element)
        v0, grad_v, grad_v0 = memory(p.v0, p.v0_size, F), memory(p.grad_v, p.grad_v_size, F), memory(p.grad_v0, N, F)
        grad_v_seq, grad_r_tau = memory(p.grad_v_seq, time_steps * N, F), memory(p.grad_r_tau, p.blocks, np.float64)
        streamed = may_stream and p.streams != 0
        segments = (time_steps + segment - 1) // segment
        starts = allocate(segments, width)  # V before each segment
        h_seq, buffers = allocate(segment, width), allocate(6, width)
        first, last = next_blocks(frame, p.pieces, p.blocks, 0)
        while first < last:
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
                        if streamed and t + 1 < end:
                            prefetch(x, (t + 1) * x_stride + lo, n)
                        current = load_row(x[t * x_stride + lo : t * x_stride + hi], buffers[4, :n])
                        h = h_seq[t - begin, :n]
                        step_row(current, v, h, tau, v_threshold, v_rest, decay_input, divides, hard_reset, False)
                    if visit < segments - 1:
                        continue
                    for t in range(end - 1, begin - 1, -1):
                        h = h_seq[t - begin, :n]
                        if has_v_seq:
                            grad = grad_v_seq[t * N + lo : t * N + hi]
                            for i in range(n):
                                carry[i] = carry[i] + grad[i]
                        if streamed and t > 0:
                            prefetch(grad_spikes, (t - 1) * grad_stride + lo, n)
                        derivative_row(kind, h, v_threshold, a, b, sg)
                        grad_s = load_row(grad_spikes[t * grad_stride + lo : t * grad_stride + hi], buffers[4, :n])
                        row = grad_x[lo:hi] if static else grad_x[t * N + lo : t * N + hi]
                        out = buffers[5, :n] if static or streamed else target_row(row, buffers[5, :n])
                        # With a learned tau dL/dH[t] is needed, too: it is what would pass if the input did not decay.
                        grad_row(
                            grad_s, sg, h, carry, out, tau, v_threshold, v_rest,
                            decay_input and not learned, divides, hard_reset, detach_reset,
                        )  # fmt: skip
                        if learned:
                            sg[:] = out
                            if decay_input:
                                for i in range(n):
                                    out[i] = out[i] * tau
                        if static:
                            for i in range(n):
                                total[i] = total[i] + out[i]
                        elif streamed:
                            stream(grad_x, t * N + lo, out)
                        else:
                            store_row(row, out)
                        if learned:
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
                if learned:
                    double = 0.0
                    for i in range(n):
                        double += terms[i]
                    grad_r_tau[block] = double
            first, last = next_blocks(frame, p.pieces, p.blocks, 1)
        release(starts)
        release(h_seq)
        release(buffers)

    return Kernel(lif_backward, _BACKWARD)


def _divides(tau: float, r_tau: Tensor | None) -> bool:
    """Whether a kernel divides by tau; else it multiplies by the reciprocal."""
    return r_tau is None and not has_exact_reciprocal(tau)


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
    x, x_stride = as_rows(x)
    v0, v0_size = as_values(v0)
    N = v.numel()
    width = block_width(N)
    spread(
        forward_kernel(x.dtype, decay_input, _divides(tau, r_tau), v_reset is not None),
        -(-N // width), spikes.numel(),
        x=x.data_ptr(), x_stride=x_stride, v0=v0.data_ptr(), v0_size=v0_size,
        spikes=spikes.data_ptr(), v=v.data_ptr(), v_seq=v_seq.data_ptr(), has_v_seq=return_v_seq,
        N=N, time_steps=time_steps, width=width, streams=streams(spikes, N),
        **neuron_scalars(tau, r_tau, v_threshold, v_reset),
    )  # fmt: skip
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
    N = v0.numel()
    width = block_width(N, min(time_steps, _SEGMENT))
    blocks = -(-N // width)
    parts = np.empty(blocks)  # of the gradient of r_tau, one a block: their sum does not depend on the threads
    plan = (x.dtype, decay_input, _divides(tau, r_tau), r_tau is not None, v_reset is not None, detach_reset)
    kernel = for_surrogate(backward_kernel, plan, surrogate)
    grad_spikes, grad_stride = as_rows(grad_spikes.to(x.dtype))
    grad_v, grad_v_size = as_values(grad_v)
    has_v_seq = grad_v_seq is not None
    grad_v_seq = grad_v if grad_v_seq is None else grad_v_seq.contiguous()
    x, x_stride = as_rows(x)
    v0, v0_size = as_values(v0)
    spread(
        kernel, blocks, time_steps * N,
        grad_spikes=grad_spikes.data_ptr(), grad_stride=grad_stride, grad_v=grad_v.data_ptr(), grad_v_size=grad_v_size,
        grad_v_seq=grad_v_seq.data_ptr(), has_v_seq=has_v_seq, x=x.data_ptr(), x_stride=x_stride,
        v0=v0.data_ptr(), v0_size=v0_size,
        grad_x=grad_x.data_ptr(), grad_v0=grad_v0.data_ptr(), grad_r_tau=parts.ctypes.data,
        N=N, time_steps=time_steps, static=x.shape[0] == 1, segment=min(time_steps, _SEGMENT), width=width,
        streams=x.shape[0] > 1 and streams(grad_x, N),
        **neuron_scalars(tau, r_tau, v_threshold, v_reset), **surrogate_scalars(surrogate.name, surrogate.alpha),
    )  # fmt: skip
    grad_r_tau = torch.zeros(()) if r_tau is None else torch.tensor(parts.sum(), dtype=torch.float32)
    return grad_x, grad_v0, grad_r_tau
