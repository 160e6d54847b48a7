"""The fused CPU kernel of the gradients of `spiking_attention`, where the output fires or nothing does.

One head of one sequence at a time, in memory linear in L: its currents are summed again from states (`cpu_state`), the
gradient goes back through its neurons, and meets the states K^T V and Q^T G. Only the results reach memory.
"""

from collections.abc import Sequence
from functools import cache

import numba
import torch
from torch import Tensor

from spikeattn._cpu.bits import U
from spikeattn._cpu.compiler import (
    SOURCES,
    Frame,
    Kernel,
    allocate,
    allocate_words,
    inline,
    memory,
    next_blocks,
    release,
)
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
from spikeattn._cpu.states import add_bits, add_products, add_row, sum_rows
from spikeattn._cpu.storage import ELEMENT, copy_row, load_row
from spikeattn._cpu.streams import prefetch
from spikeattn._cpu.threads import spread
from spikeattn._cpu.vectors import ROWS, TILE, multiply, multiply_row, row_of
from spikeattn._leak import has_exact_reciprocal
from spikeattn.ops.spiking_attention.cpu import MOST_STATE_ROWS, MOST_TOKENS
from spikeattn.ops.spiking_attention.cpu_inputs import (
    INPUTS,
    Spikes,
    are_taken,
    extent,
    input_arguments,
    load_tokens,
    open_inputs,
    tensor_arguments,
)
from spikeattn.ops.spiking_attention.cpu_state import TOKENS, sum_currents
from spikeattn.ops.spiking_attention.layout import in_one_piece, rows_in_one_piece
from spikeattn.ops.surrogate import Surrogate

_MOST_GRADIENTS = 1 << 24  # T * L * E: 64 MiB for each thread
# Queries whose gradients are added up one after another, in float32; then sums of so many.
_PART = 256

_BACKWARD = Frame(
    f"{INPUTS} grad gradT gradB gradH gradL kind grad_q grad_qT grad_qB grad_qH grad_qL"
    " grad_k grad_kT grad_kB grad_kH grad_kL grad_v grad_vT grad_vB grad_vH grad_vL",
    "tau v_threshold v_rest a b",
)
_record = _BACKWARD.record


def takes_backward(shape: Sequence[int], S: int, dtype: torch.dtype, scale: Tensor, fire: str | None) -> bool:
    """Whether the kernel takes a call with queries of this shape and ``S`` keys."""
    T, _, _, L, E = shape
    fits = T * E <= MOST_STATE_ROWS and T * max(L, S) <= MOST_TOKENS and T * L * E <= _MOST_GRADIENTS
    return fire != "map" and fits and are_taken(shape, dtype, scale)


@inline
def _scale_row(row, scale, out):
    for e in range(out.size):
        out[e] = row[e] * scale


@inline
def _add_square(square, total, size):
    """``total += square``."""
    for e in range(size):
        own, row = square[e, :size], total[e, :size]
        for f in range(size):
            row[f] += own[f]


@inline
def _transpose(square, out, size):
    """``out[f, e] = square[e, f]``."""
    for f in range(size):
        row, column = out[f, :size], square[:size, f]
        for e in range(size):
            row[e] = column[e]


@inline
def _add_up(total, part, word, E, zeros, sums):
    """``sums``: the rows of ``total``, and of ``part``, for the bits of ``word``."""
    sum_rows(row_of(total, 0), word, E, row_of(zeros, 0), F(1.0), row_of(sums, 0))
    sum_rows(row_of(part, 0), word, E, row_of(sums, 0), F(1.0), row_of(sums, 0))


@cache
def backward_kernel(storage: torch.dtype, fires: bool, divides: bool, hard_reset: bool, detach_reset: bool) -> Kernel:
    """Gradients of q, k and v, for one kind of neuron or none."""
    plan, element = (fires, divides, hard_reset, detach_reset, SOURCES), ELEMENT[storage]

    def spiking_attention_backward(frame):
        fires, divides, hard_reset, detach_reset, _ = plan
        p = numba.carray(frame, 1, _record)[0]
        T, B, H, L, S, E, is_causal, kind = p.T, p.B, p.H, p.L, p.S, p.E, p.is_causal, p.kind
        tau, v_threshold, v_rest, a, b_ = F(p.tau), F(p.v_threshold), F(p.v_rest), F(p.a), F(p.b)
        q, k, v, scale, query_mask, key_mask = open_inputs(p)
        grad = memory(p.grad, extent(p.gradT, p.gradB, p.gradH, p.gradL, T, B, H, L, E), element)
        grad_q = memory(p.grad_q, T * B * H * L * E, element)
        grad_k, grad_v = memory(p.grad_k, T * B * H * S * E, element), memory(p.grad_v, T * B * H * S * E, element)
        words = allocate_words(3 * T, max(L, S))
        queries, keys, values = words[:T, :L], words[T : 2 * T, :S], words[2 * T :, :S]
        tiles = allocate((2 * T + 4) * E + TOKENS + ROWS + 2, TILE)
        states, states_T, squares = tiles[: T * E], tiles[T * E : 2 * T * E], tiles[2 * T * E :]  # K^T V, and V^T K
        total, total_T, part, part_T = squares[:E], squares[E : 2 * E], squares[2 * E : 3 * E], squares[3 * E : 4 * E]
        lines = squares[4 * E :]
        sums, zeros, products = lines[0:1], lines[1:2], lines[2:]
        # Of `TOKENS` tokens, one after another; with room for what is written beyond the last.
        rows = allocate(T + 5, TOKENS * E + TILE)
        h_seq, carries, slopes, currents, grads = rows[:T], rows[T], rows[T + 1], rows[T + 2], rows[T + 3]
        own_row, buffer = sums[0, :E], rows[T + 4, :E]
        all_G = allocate(1, (T * L + ROWS) * E + TILE)  # of all tokens, with room for what is read beyond the last
        G = all_G[0]
        zeros[0] = F(0.0)
        first, last = next_blocks(frame, p.pieces, p.blocks, 0)
        while first < last:
            for block in range(first, last):
                b, h = block // H, block % H
                scale_at, grad_at = b * p.scaleB + h * p.scaleH, b * p.gradB + h * p.gradH
                states[:] = F(0.0)
                states_T[:] = F(0.0)
                for t in range(T):
                    load_tokens(p, t, b, h, q, k, v, query_mask, key_mask, queries[t], keys[t], values[t])
                    if not is_causal:
                        for j in range(S):
                            if fires:
                                add_bits(row_of(states, t * E), keys[t, j], E, values[t, j])
                            add_bits(row_of(states_T, t * E), values[t, j], E, keys[t, j])
                for begin in range(0, L, TOKENS):
                    n = min(TOKENS, L - begin)
                    if fires:
                        carries[:] = v_rest  # first the potentials, then their gradients
                        for t in range(T):
                            sum_currents(
                                row_of(states, t * E), queries[t], keys[t], values[t], begin, n, E, is_causal,
                                scale, scale_at, p.scaleL, zeros, currents,
                            )  # fmt: skip
                            step_row(
                                currents[: n * E], carries[: n * E], h_seq[t, : n * E], tau, v_threshold, v_rest,
                                True, divides, hard_reset, False,
                            )  # fmt: skip
                        carries[:] = F(0.0)
                    for t in range(T - 1, -1, -1):
                        for i in range(n):
                            at = t * p.gradT + grad_at + (begin + i) * p.gradL
                            if t > 0:
                                prefetch(grad, at - p.gradT, E)
                            copy_row(grads[i * E : (i + 1) * E], load_row(grad[at : at + E], buffer), buffer)
                        own_G = G[(t * L + begin) * E : (t * L + begin + n) * E]
                        if fires:
                            h_row = h_seq[t, : n * E]
                            derivative_row(kind, h_row, v_threshold, a, b_, slopes[: n * E])
                            grad_row(
                                grads, slopes, h_row, carries, own_G, tau, v_threshold, v_rest,
                                True, divides, hard_reset, detach_reset,
                            )  # fmt: skip
                        for i in range(n):
                            source = own_G if fires else grads
                            _scale_row(
                                source[i * E : (i + 1) * E], scale[scale_at + (begin + i) * p.scaleL],
                                own_G[i * E : (i + 1) * E],
                            )  # fmt: skip
                        if is_causal:
                            state_T = row_of(states_T, t * E)
                            for i in range(begin, begin + n):
                                add_bits(state_T, values[t, i], E, keys[t, i])
                                own = G.ctypes.data + (t * L + i) * E * G.itemsize
                                multiply_row(own, E, state_T, E, row_of(zeros, 0), row_of(products, i - begin))
                        else:
                            state_T = states_T[t * E : (t + 1) * E]
                            multiply(G[(t * L + begin) * E :], E, 1, E, n, state_T, E, zeros, products)
                        for i in range(begin, begin + n):
                            at = t * p.grad_qT + b * p.grad_qB + h * p.grad_qH + i * p.grad_qL
                            is_padding = query_mask.size > 0 and query_mask[b * L + i]
                            copy_row(
                                grad_q[at : at + E], zeros[0, :E] if is_padding else products[i - begin, :E], buffer
                            )
                for t in range(T):
                    k_at = t * p.grad_kT + b * p.grad_kB + h * p.grad_kH
                    v_at = t * p.grad_vT + b * p.grad_vB + h * p.grad_vH
                    total[:] = F(0.0)
                    if is_causal:
                        total_T[:] = F(0.0)
                    # From the last token on: a key is seen by the queries from its own on, if causal, or by all.
                    # Padding has no bits, and so a sum of nothing as its gradient.
                    for begin in range((L - 1) // _PART * _PART, -1, -_PART):
                        part[:] = F(0.0)
                        if is_causal:
                            part_T[:] = F(0.0)
                        for i in range(min(L, begin + _PART) - 1, begin - 1, -1):
                            own = G.ctypes.data + (t * L + i) * E * G.itemsize
                            add_row(row_of(part, 0), queries[t, i], E, own)
                            if is_causal:
                                if queries[t, i] != U(0):  # padding has none, and whatever gradient
                                    add_products(row_of(part_T, 0), own, E, E, queries[t, i])
                                _add_up(total_T, part_T, values[t, i], E, zeros, sums)
                                at = k_at + i * p.grad_kL
                                copy_row(grad_k[at : at + E], own_row, buffer)
                                _add_up(total, part, keys[t, i], E, zeros, sums)
                                at = v_at + i * p.grad_vL
                                copy_row(grad_v[at : at + E], own_row, buffer)
                        _add_square(part, total, E)
                        if is_causal or begin == 0:  # else nobody reads it before the last part
                            _transpose(total, total_T, E)
                    if not is_causal:
                        for j in range(S):
                            sum_rows(row_of(total_T, 0), values[t, j], E, row_of(zeros, 0), F(1.0), row_of(sums, 0))
                            at = k_at + j * p.grad_kL
                            copy_row(grad_k[at : at + E], own_row, buffer)
                            sum_rows(row_of(total, 0), keys[t, j], E, row_of(zeros, 0), F(1.0), row_of(sums, 0))
                            at = v_at + j * p.grad_vL
                            copy_row(grad_v[at : at + E], own_row, buffer)
            first, last = next_blocks(frame, p.pieces, p.blocks, 1)
        release(words)
        release(tiles)
        release(rows)
        release(all_G)

    return Kernel(spiking_attention_backward, _BACKWARD)


def spiking_attention_backward_cpu(
    grad: Tensor,
    spikes: Spikes,
    steps: Sequence[tuple[int, ...]],
    scale: Tensor,
    query_padding_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    fire: str | None,
    is_causal: bool,
    tau: float,
    v_threshold: float,
    v_reset: float | None,
    detach_reset: bool,
    surrogate: Surrogate,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v with the strides ``steps``."""
    dtype = spikes.q.dtype
    grad = rows_in_one_piece(grad.to(dtype))
    masks = in_one_piece(query_padding_mask), in_one_piece(key_padding_mask)
    grad_q, grad_k, grad_v = (
        empty((x.shape.numel(),), dtype).as_strided(x.shape, own) for x, own in zip(spikes, steps, strict=True)
    )
    plan = (dtype, fire == "output", not has_exact_reciprocal(tau), v_reset is not None, detach_reset)
    spread(
        for_surrogate(backward_kernel, plan, surrogate), grad.shape[1] * grad.shape[2], grad.numel(),
        **input_arguments(spikes, scale, masks, is_causal), **tensor_arguments("grad", grad),
        **tensor_arguments("grad_q", grad_q), **tensor_arguments("grad_k", grad_k),
        **tensor_arguments("grad_v", grad_v),
        **neuron_scalars(tau, None, v_threshold, v_reset), **surrogate_scalars(surrogate.name, surrogate.alpha),
    )  # fmt: skip
    return grad_q, grad_k, grad_v
