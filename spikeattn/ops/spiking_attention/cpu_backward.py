"""The fused CPU kernel of the gradients of `spiking_attention`, where the output fires or nothing does.

One head of one sequence at a time, in memory linear in L: its currents are summed again from states (`cpu_state`), the
gradient goes back through its neurons, and meets the states K^T V and Q^T G. Only the results reach memory.
"""

from collections.abc import Sequence
from functools import cache

import numba
import torch
from torch import Tensor

from spikeattn._cpu.bits import WORD, U
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
from spikeattn._cpu.states import add_bits_to_token, add_products, add_row_to_token, sum_rows_of_token
from spikeattn._cpu.storage import ELEMENT, copy_row, load_row
from spikeattn._cpu.streams import prefetch
from spikeattn._cpu.threads import spread
from spikeattn._cpu.vectors import ROWS, TILE, multiply, multiply_row, row_of
from spikeattn._leak import has_exact_reciprocal
from spikeattn.ops.spiking_attention.call import Masks, Settings
from spikeattn.ops.spiking_attention.cpu import MOST_STATE_ROWS, MOST_TOKENS
from spikeattn.ops.spiking_attention.cpu_inputs import (
    INPUTS,
    Spikes,
    are_taken,
    input_arguments,
    load_tokens,
    open_inputs,
    tensor_arguments,
)
from spikeattn.ops.spiking_attention.cpu_state import TOKENS, sum_currents
from spikeattn.ops.spiking_attention.layout import in_one_piece, rows_in_one_piece
from spikeattn.ops.surrogate import surrogate_of

_MOST_GRADIENTS = 1 << 24  # T * L * E: 64 MiB for each thread
# Queries whose gradients are added up one after another, in float32; then sums of so many.
_PART = 256

_BACKWARD = Frame(
    f"{INPUTS} grad gradT gradB gradH gradL grad_size kind grad_q grad_qT grad_qB grad_qH grad_qL grad_q_size"
    " grad_k grad_kT grad_kB grad_kH grad_kL grad_k_size grad_v grad_vT grad_vB grad_vH grad_vL grad_v_size",
    "tau v_threshold v_rest a b",
)
_record = _BACKWARD.record


def takes_backward(shape: Sequence[int], S: int, dtype: torch.dtype, scale: Tensor, fire: str | None) -> bool:
    """Whether the kernel takes a call with queries of this shape and ``S`` keys."""
    T, _, _, L, E = shape
    rows = T * E * -(-E // WORD)
    fits = rows <= MOST_STATE_ROWS and T * max(L, S) <= MOST_TOKENS and T * L * E <= _MOST_GRADIENTS
    return fire != "map" and fits and are_taken(shape, dtype, scale)


@inline
def _scale_row(row, scale, out):
    for e in range(out.size):
        out[e] = row[e] * scale


@inline
def _add_rows(rows, total, width):
    """``total += rows``, ``width`` numbers of each row."""
    for r in range(total.shape[0]):
        own, row = rows[r, :width], total[r, :width]
        for f in range(width):
            row[f] += own[f]


@inline
def _transpose(matrix, out, E):
    """``out`` is the transpose of a matrix [E, E], both as `TILE` columns after another."""
    for column in range(0, E, TILE):
        width = min(TILE, E - column)
        for f in range(E):
            at = f // TILE * E + column
            row, source = out[column // TILE * E + f, :width], matrix[at : at + width, f % TILE]
            for e in range(width):
                row[e] = source[e]


@inline
def _add_up(total, part, is_last, words, W, i, width, zeros, sums):
    """``sums``: the rows from ``total`` on, and those from ``part`` on unless it is the last, for a token's bits."""
    sum_rows_of_token(total, words, W, i, width, row_of(zeros, 0), F(1.0), row_of(sums, 0))
    if not is_last:
        sum_rows_of_token(part, words, W, i, width, row_of(sums, 0), F(1.0), row_of(sums, 0))


@inline
def _keys_and_values(p, t, b, h, W, queries, keys, values, G, squares, zeros, sums, buffer, grad_k, grad_v):
    """Gradients of the keys and values of one time step, from R = Q^T G and its transpose.

    From the last token on: a key is seen by the queries from its own on, if causal, or by all. Padding has no bits, and
    so a sum of nothing as its gradient. ``squares`` hold R and R^T of the tokens up to the last, then those of a part,
    if it is not the last.
    """
    L, S, E, is_causal = p.L, p.S, p.E, p.is_causal
    k_at = t * p.grad_kT + b * p.grad_kB + h * p.grad_kH
    v_at = t * p.grad_vT + b * p.grad_vB + h * p.grad_vH
    n = W * E
    total, total_T, part, part_T = 0, n, 2 * n, 3 * n  # where each begins
    for begin in range((L - 1) // _PART * _PART, -1, -_PART):
        is_last = begin + _PART >= L
        own = total if is_last else part
        squares[own : own + (2 * n if is_causal else n)] = F(0.0)
        for i in range(min(L, begin + _PART) - 1, begin - 1, -1):
            own_G = G.ctypes.data + (t * L + i) * E * G.itemsize
            for c in range(W):
                width, at = min(WORD, E - c * WORD), own + c * E
                add_row_to_token(row_of(squares, at), queries, W, i, width, own_G + c * WORD * G.itemsize)
                if is_causal and queries[c, i] != U(0):  # padding has none, and whatever gradient
                    add_products(row_of(squares, n + at), own_G, E, width, queries[c, i])
            if is_causal:
                for c in range(W):
                    width, at = min(WORD, E - c * WORD), c * E
                    to = k_at + i * p.grad_kL + c * WORD
                    first, second = row_of(squares, total_T + at), row_of(squares, part_T + at)
                    _add_up(first, second, is_last, values, W, i, width, zeros, sums)
                    copy_row(grad_k[to : to + width], sums[0, :width], buffer[0, :width])
                    to = v_at + i * p.grad_vL + c * WORD
                    first, second = row_of(squares, total + at), row_of(squares, part + at)
                    _add_up(first, second, is_last, keys, W, i, width, zeros, sums)
                    copy_row(grad_v[to : to + width], sums[0, :width], buffer[0, :width])
        if not is_last and (begin > 0 or not is_causal):  # else nobody reads it
            size = 2 * n if is_causal else n
            _add_rows(squares[part : part + size], squares[total : total + size], min(TILE, E))
    if not is_causal:
        _transpose(squares[total : total + n], squares[total_T : total_T + n], E)
        for c in range(W):
            width, at = min(WORD, E - c * WORD), c * E
            for j in range(S):
                to = k_at + j * p.grad_kL + c * WORD
                _add_up(row_of(squares, total_T + at), 0, True, values, W, j, width, zeros, sums)
                copy_row(grad_k[to : to + width], sums[0, :width], buffer[0, :width])
                to = v_at + j * p.grad_vL + c * WORD
                _add_up(row_of(squares, total + at), 0, True, keys, W, j, width, zeros, sums)
                copy_row(grad_v[to : to + width], sums[0, :width], buffer[0, :width])


@cache
def backward_kernel(
    storage: torch.dtype, wide: bool, fires: bool, divides: bool, hard_reset: bool, detach_reset: bool
) -> Kernel:
    """Gradients of q, k and v, for tokens of one word or more, and for one kind of neuron or none."""
    plan, element = (wide, fires, divides, hard_reset, detach_reset, SOURCES), ELEMENT[storage]

    def spiking_attention_backward(frame):
        wide, fires, divides, hard_reset, detach_reset, _ = plan
        p = numba.carray(frame, 1, _record)[0]
        T, H, L, S, E, is_causal, kind = p.T, p.H, p.L, p.S, p.E, p.is_causal, p.kind
        tau, v_threshold, v_rest, a, b_ = F(p.tau), F(p.v_threshold), F(p.v_rest), F(p.a), F(p.b)
        q, k, v, scale, query_mask, key_mask = open_inputs(p, U)
        grad, grad_q = memory(p.grad, p.grad_size, element), memory(p.grad_q, p.grad_q_size, element)
        grad_k, grad_v = memory(p.grad_k, p.grad_k_size, element), memory(p.grad_v, p.grad_v_size, element)
        W = (E + WORD - 1) // WORD if wide else 1  # words of a token
        words = allocate_words(3 * T * W, max(L, S))
        all_queries, all_keys, all_values = words[: T * W, :L], words[T * W : 2 * T * W, :S], words[2 * T * W :, :S]
        # A matrix [E, E] is E rows of `TILE` columns, then E rows of the next.
        rows = W * E
        tiles = allocate((2 * T + 4) * rows + TOKENS + ROWS + 2, TILE)
        states, states_T = tiles[: T * rows], tiles[T * rows : 2 * T * rows]  # K^T V, and V^T K
        squares = tiles[2 * T * rows : (2 * T + 4) * rows]
        lines = tiles[(2 * T + 4) * rows :]
        sums, zeros, products = lines[0:1], lines[1:2], lines[2:]
        # Of `TOKENS` tokens, one after another; with room for what is written beyond the last.
        steps = allocate(T + 4, TOKENS * E + TILE)
        h_seq, carries, slopes, currents, grads = steps[:T], steps[T], steps[T + 1], steps[T + 2], steps[T + 3]
        buffer = allocate(1, TILE)
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
                    queries, keys, values = all_queries[t * W :], all_keys[t * W :], all_values[t * W :]
                    load_tokens(p, t, b, h, q, k, v, query_mask, key_mask, W, queries, keys, values)
                    if not is_causal:
                        for c in range(W):
                            width, at = min(WORD, E - c * WORD), (t * W + c) * E
                            for j in range(S):
                                if fires:
                                    add_bits_to_token(row_of(states, at), keys, W, j, width, values[c, j])
                                add_bits_to_token(row_of(states_T, at), values, W, j, width, keys[c, j])
                for begin in range(0, L, TOKENS):
                    n = min(TOKENS, L - begin)
                    if fires:
                        carries[:] = v_rest  # first the potentials, then their gradients
                        for t in range(T):
                            queries, keys = all_queries[t * W :], all_keys[t * W :]
                            for c in range(W):
                                width, at = min(WORD, E - c * WORD), c * WORD * TOKENS
                                sum_currents(
                                    row_of(states, (t * W + c) * E), queries, keys, W, all_values[t * W + c],
                                    begin, n, width, is_causal, scale, scale_at, p.scaleL, zeros, currents,
                                )  # fmt: skip
                                step_row(
                                    currents[: n * width], carries[at : at + n * width], h_seq[t, at : at + n * width],
                                    tau, v_threshold, v_rest, True, divides, hard_reset, False,
                                )  # fmt: skip
                        carries[:] = F(0.0)
                    for t in range(T - 1, -1, -1):
                        for c in range(W):
                            width, own = min(WORD, E - c * WORD), c * WORD * TOKENS
                            for i in range(n):
                                at = t * p.gradT + grad_at + (begin + i) * p.gradL + c * WORD
                                if t > 0:
                                    prefetch(grad, at - p.gradT, width)
                                row = load_row(grad[at : at + width], buffer[0, :width])
                                copy_row(grads[i * width : (i + 1) * width], row, buffer[0, :width])
                            if fires:
                                h_row = h_seq[t, own : own + n * width]
                                derivative_row(kind, h_row, v_threshold, a, b_, slopes[: n * width])
                                grad_row(
                                    grads, slopes, h_row, carries[own : own + n * width], currents,
                                    tau, v_threshold, v_rest, True, divides, hard_reset, detach_reset,
                                )  # fmt: skip
                            source = currents if fires else grads
                            for i in range(n):
                                at = (t * L + begin + i) * E + c * WORD
                                _scale_row(
                                    source[i * width : (i + 1) * width], scale[scale_at + (begin + i) * p.scaleL],
                                    G[at : at + width],
                                )  # fmt: skip
                        keys, values = all_keys[t * W :], all_values[t * W :]
                        for c in range(W):
                            width, at = min(WORD, E - c * WORD), (t * W + c) * E
                            if is_causal:
                                state_T = row_of(states_T, at)
                                for i in range(begin, begin + n):
                                    add_bits_to_token(state_T, values, W, i, width, keys[c, i])
                                    own_G = G.ctypes.data + (t * L + i) * E * G.itemsize
                                    to = row_of(products, i - begin)
                                    multiply_row(own_G, E, state_T, width, row_of(zeros, 0), to)
                            else:
                                multiply(
                                    G[(t * L + begin) * E :], E, 1, E, n, states_T[at : at + E], width, zeros, products
                                )  # fmt: skip
                            for i in range(begin, begin + n):
                                at = t * p.grad_qT + b * p.grad_qB + h * p.grad_qH + i * p.grad_qL + c * WORD
                                is_padding = query_mask.size > 0 and query_mask[b * L + i]
                                row = zeros[0, :width] if is_padding else products[i - begin, :width]
                                copy_row(grad_q[at : at + width], row, buffer[0, :width])
                for t in range(T):
                    _keys_and_values(
                        p, t, b, h, W, all_queries[t * W :], all_keys[t * W :], all_values[t * W :],
                        G, squares, zeros, sums, buffer, grad_k, grad_v,
                    )  # fmt: skip
            first, last = next_blocks(frame, p.pieces, p.blocks, 1)
        release(words)
        release(tiles)
        release(steps)
        release(buffer)
        release(all_G)

    return Kernel(spiking_attention_backward, _BACKWARD)


def spiking_attention_backward_cpu(
    grad: Tensor,
    spikes: Spikes,
    steps: Sequence[tuple[int, ...]],
    scale: Tensor,
    masks: Masks,
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v with the strides ``steps``."""
    dtype, surrogate = spikes.q.dtype, surrogate_of(settings.surrogate, settings.alpha)
    tau, v_threshold, v_reset = settings.tau, settings.v_threshold, settings.v_reset
    grad = rows_in_one_piece(grad.to(dtype))
    masks = in_one_piece(masks[0]), in_one_piece(masks[1])
    grad_q, grad_k, grad_v = (
        empty((x.shape.numel(),), dtype).as_strided(x.shape, own) for x, own in zip(spikes, steps, strict=True)
    )
    neuron = (not has_exact_reciprocal(tau), v_reset is not None, settings.detach_reset)
    plan = (dtype, spikes.q.shape[-1] > WORD, settings.fire == "output", *neuron)
    spread(
        for_surrogate(backward_kernel, plan, surrogate), grad.shape[1] * grad.shape[2], grad.numel(),
        **input_arguments(spikes, scale, masks, settings.is_causal), **tensor_arguments("grad", grad),
        **tensor_arguments("grad_q", grad_q), **tensor_arguments("grad_k", grad_k),
        **tensor_arguments("grad_v", grad_v),
        **neuron_scalars(tau, None, v_threshold, v_reset), **surrogate_scalars(surrogate.name, surrogate.alpha),
    )  # fmt: skip
    return grad_q, grad_k, grad_v
