"""The fused CPU kernel of the gradients of `spiking_attention`, where the output fires or nothing does.

One head of one sequence at a time: its currents are counted again from bits, the gradient goes back through its
neurons, and the products with that real-valued gradient are made in vector registers. Only the results reach memory.
"""

from functools import cache

import numba
import numpy as np
import torch
from torch import Tensor

from spikeattn._cpu.bits import U, count_row, transpose, unpack_rows
from spikeattn._cpu.compiler import SOURCES, Frame, Kernel, inline, memory, next_blocks
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
from spikeattn._cpu.storage import ELEMENT, load_row, store_row, target_row
from spikeattn._cpu.streams import prefetch
from spikeattn._cpu.threads import spread
from spikeattn._cpu.vectors import ROWS, TILE, multiply, tile_rows
from spikeattn._leak import has_exact_reciprocal
from spikeattn.ops.spiking_attention.cpu import (
    INPUTS,
    attend_rows,
    extent,
    input_arguments,
    load_tokens,
    open_inputs,
    takes,
    tensor_arguments,
)
from spikeattn.ops.spiking_attention.layout import in_one_piece, rows_in_one_piece
from spikeattn.ops.surrogate import Surrogate

_TRAJECTORY = 1 << 18  # floats of H that are kept of a head
_MOST_QUERIES = 512  # whose gradients a key and a value add up one after another, in float32

_BACKWARD = Frame(f"{INPUTS} grad gradT gradB gradH gradL grad_q grad_k grad_v kind", "tau v_threshold v_rest a b")
_record = _BACKWARD.record


def takes_backward(q: Tensor, k: Tensor, scale: Tensor, fire: str | None) -> bool:
    """Whether the kernel takes such a call."""
    T, _, _, L, E = q.shape
    fits = L <= _MOST_QUERIES and (fire is None or T * L * E <= _TRAJECTORY)
    return fire != "map" and fits and takes(q, k, scale, is_causal=False)


@inline
def _store_rows(target, first, stride, rows, count, mask, at, E, buffer):
    """The first ``E`` numbers of ``count`` rows to ``target[first + r stride :]``, zeros at padding."""
    for r in range(count):
        if mask.size > 0 and mask[at + r]:
            rows[r, :E] = F(0.0)
        row = target[first + r * stride : first + r * stride + E]
        result = target_row(row, buffer)
        for e in range(E):
            result[e] = rows[r, e]
        store_row(row, result)


@cache
def backward_kernel(storage: torch.dtype, fires: bool, divides: bool, hard_reset: bool, detach_reset: bool) -> Kernel:
    """Gradients of q, k and v, [T, B, L, H, E] in memory, for one kind of neuron or none."""
    plan, element = (fires, divides, hard_reset, detach_reset, SOURCES), ELEMENT[storage]

    def spiking_attention_backward(frame):
        fires, divides, hard_reset, detach_reset, _ = plan
        p = numba.carray(frame, 1, _record)[0]
        T, B, H, L, S, E, is_causal, kind = p.T, p.B, p.H, p.L, p.S, p.E, p.is_causal, p.kind
        tau, v_threshold, v_rest, a, b_ = F(p.tau), F(p.v_threshold), F(p.v_rest), F(p.a), F(p.b)
        q, k, v, scale, query_mask, key_mask, odd = open_inputs(p, element)
        grad = memory(p.grad, extent(p.gradT, p.gradB, p.gradH, p.gradL, T, B, H, L, E), element)
        grad_q = memory(p.grad_q, T * B * L * H * E, element)
        grad_k = memory(p.grad_k, T * B * S * H * E, element)
        grad_v = memory(p.grad_v, T * B * S * H * E, element)
        queries, keys, values = np.empty((T, L), U), np.empty((T, S), U), np.empty((T, S), U)
        h_seq, carries = np.empty((T if fires else 0, L, E), F), np.empty((L, E), F)
        currents, slopes, buffer = tile_rows(ROWS), np.empty(E, F), np.empty(E, F)
        # Rows of `TILE` numbers, with room for what `multiply` reads and writes beyond the last.
        most = max(L, S, E) + ROWS
        G, grad_map, counts = tile_rows(most), tile_rows(most), tile_rows(most)
        spikes, product, zeros = tile_rows(most), tile_rows(most), tile_rows(1)
        shared, columns = np.zeros((ROWS, S), F), np.empty((1, E), U)
        first, last = next_blocks(frame, p.pieces, p.blocks, 0)
        while first < last:
            for block in range(first, last):
                if odd[0]:  # another block holds what is no spike: the call goes to matrix products
                    break
                b, h = block // H, block % H
                scale_at = b * p.scaleB + h * p.scaleH
                carries[:] = v_rest  # first the potentials, then their gradients
                for t in range(T):
                    own_q, own_k, own_v = queries[t], keys[t], values[t]
                    if not load_tokens(p, t, b, h, q, k, v, query_mask, key_mask, own_q, own_k, own_v):
                        odd[0] = 1
                    if fires:
                        unpack_rows(own_v, spikes)
                        for i in range(L):
                            if i % ROWS == 0:
                                attend_rows(
                                    own_q, i, own_k, spikes, E, is_causal, scale, scale_at, p.scaleL,
                                    shared, zeros, currents,
                                )  # fmt: skip
                            step_row(
                                currents[i % ROWS, :E], carries[i], h_seq[t, i], tau, v_threshold, v_rest,
                                True, divides, hard_reset, False,
                            )  # fmt: skip
                carries[:] = F(0.0)
                for t in range(T - 1, -1, -1):
                    for i in range(L):
                        own_scale = scale[scale_at + i * p.scaleL]
                        at = t * p.gradT + b * p.gradB + h * p.gradH + i * p.gradL
                        if t > 0:
                            prefetch(grad, at - p.gradT, E)
                        grad_s = load_row(grad[at : at + E], buffer)
                        if fires:
                            derivative_row(kind, h_seq[t, i], v_threshold, a, b_, slopes)
                            grad_row(
                                grad_s, slopes, h_seq[t, i], carries[i], currents[0, :E], tau, v_threshold, v_rest,
                                True, divides, hard_reset, detach_reset,
                            )  # fmt: skip
                            grad_s = currents[0, :E]
                        for e in range(E):
                            G[i, e] = grad_s[e] * own_scale
                    transpose(values[t], columns)
                    unpack_rows(columns[0], spikes)
                    multiply(G, TILE, 1, E, L, spikes, S, zeros, grad_map)
                    for i in range(L):
                        count_row(queries[t, i], keys[t], counts[i, :S])
                        if is_causal:
                            counts[i, i + 1 : S] = F(0.0)
                            grad_map[i, i + 1 : S] = F(0.0)
                    token = (t * B + b) * L * H + h  # of the queries; tokens lie H rows apart
                    unpack_rows(keys[t], spikes)
                    multiply(grad_map, TILE, 1, S, L, spikes, E, zeros, product)
                    _store_rows(grad_q, token * E, H * E, product, L, query_mask, b * L, E, buffer)
                    token = (t * B + b) * S * H + h
                    unpack_rows(queries[t], spikes)
                    multiply(grad_map, 1, TILE, L, S, spikes, E, zeros, product)
                    _store_rows(grad_k, token * E, H * E, product, S, key_mask, b * S, E, buffer)
                    multiply(counts, 1, TILE, L, S, G, E, zeros, product)
                    _store_rows(grad_v, token * E, H * E, product, S, key_mask, b * S, E, buffer)
            first, last = next_blocks(frame, p.pieces, p.blocks, 1)

    return Kernel(spiking_attention_backward, _BACKWARD)


def spiking_attention_backward_cpu(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Gradients of ``q``, ``k`` and ``v``, [T, B, H, L, E] in memory [T, B, L, H, E]; None if one holds no spikes."""
    T, B, H, L, E = q.shape
    grad = rows_in_one_piece(grad.to(q.dtype))
    q, k, v = rows_in_one_piece(q), rows_in_one_piece(k), rows_in_one_piece(v)
    masks = in_one_piece(query_padding_mask), in_one_piece(key_padding_mask)
    odd = np.zeros(1, np.int64)
    grads = [empty((T, B, x.shape[3], H, E), q.dtype) for x in (q, k, v)]
    plan = (q.dtype, fire == "output", not has_exact_reciprocal(tau), v_reset is not None, detach_reset)
    spread(
        for_surrogate(backward_kernel, plan, surrogate), B * H, T * B * H * L * E,
        **input_arguments(q, k, v, scale, masks, is_causal, odd), **tensor_arguments("grad", grad),
        **{name: x.data_ptr() for name, x in zip(("grad_q", "grad_k", "grad_v"), grads, strict=True)},
        **neuron_scalars(tau, None, v_threshold, v_reset), **surrogate_scalars(surrogate.name, surrogate.alpha),
    )  # fmt: skip
    if odd[0]:
        return None
    grad_q, grad_k, grad_v = (x.transpose(2, 3) for x in grads)
    return grad_q, grad_k, grad_v
