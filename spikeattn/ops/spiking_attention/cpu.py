"""The fused CPU kernel of `spiking_attention` for short sequences: spikes as bits, one head of one sequence at a time.

What is not a spike, and what is too long to gain, goes to matrix products (`reference.attend`).
"""

from functools import cache

import numba
import numpy as np
import torch
from torch import Tensor

from spikeattn._cpu.bits import WORD, U, count_bits, count_row, pack, pack_rows, transpose, unpack_rows
from spikeattn._cpu.compiler import SOURCES, Frame, Kernel, inline, memory, next_blocks
from spikeattn._cpu.memory import empty
from spikeattn._cpu.neuron import F, neuron_scalars, step_row
from spikeattn._cpu.storage import ELEMENT, mask_arguments, store_row, target_row
from spikeattn._cpu.threads import spread
from spikeattn._cpu.vectors import ROWS, TILE, WHY_NOT, multiply, tile_rows
from spikeattn._leak import has_exact_reciprocal
from spikeattn.ops.spiking_attention.layout import in_one_piece, rows_in_one_piece, strides

# Keys; beyond, matrix products are faster (benchmarks, suite "attention"). Causal ones compute twice what counts.
_LONGEST, _LONGEST_CAUSAL = 64, 128

INPUTS = (
    "q qT qB qH qL k kT kB kH kL v vT vB vH vL scale scaleT scaleB scaleH scaleL"
    " query_mask has_query_mask key_mask has_key_mask odd T B H L S E is_causal"
)
_FORWARD = Frame(f"{INPUTS} out", "tau v_threshold v_rest")
_forward_record = _FORWARD.record


def takes(q: Tensor, k: Tensor, scale: Tensor, is_causal: bool) -> bool:
    """Whether the forward takes such a call."""
    longest = _LONGEST_CAUSAL if is_causal else _LONGEST
    short = k.shape[-2] <= longest and q.shape[-1] <= min(WORD, TILE)
    return short and q.dtype in ELEMENT and scale.shape[0] == 1 and not WHY_NOT


@inline
def extent(by_T, by_B, by_H, by_L, T, B, H, L, E):
    """Elements from the first to the last of a tensor with these strides."""
    return (T - 1) * by_T + (B - 1) * by_B + (H - 1) * by_H + (L - 1) * by_L + E


@inline
def open_inputs(p, element):
    """Queries, keys, values, scale, the two masks (empty where there is none) and the flag of what is no spike."""
    T, B, H, L, S, E = p.T, p.B, p.H, p.L, p.S, p.E
    q = memory(p.q, extent(p.qT, p.qB, p.qH, p.qL, T, B, H, L, E), element)
    k = memory(p.k, extent(p.kT, p.kB, p.kH, p.kL, T, B, H, S, E), element)
    v = memory(p.v, extent(p.vT, p.vB, p.vH, p.vL, T, B, H, S, E), element)
    scale = memory(p.scale, extent(p.scaleT, p.scaleB, p.scaleH, p.scaleL, 1, B, H, L, 1), F)
    query_mask = memory(p.query_mask, B * L if p.has_query_mask else 0, np.bool_)
    key_mask = memory(p.key_mask, B * S if p.has_key_mask else 0, np.bool_)
    return q, k, v, scale, query_mask, key_mask, memory(p.odd, 1, np.int64)


@inline
def load_tokens(p, t, b, h, q, k, v, query_mask, key_mask, queries, keys, values):
    """Pack the tokens of one head and time step; whether they hold 0 and 1 only."""
    goes_on = t + 1 < p.T
    own = pack_rows(queries, q, t * p.qT + b * p.qB + h * p.qH, p.qL, p.E, query_mask, b * p.L, goes_on * p.qT)
    own &= pack_rows(keys, k, t * p.kT + b * p.kB + h * p.kH, p.kL, p.E, key_mask, b * p.S, goes_on * p.kT)
    return own & pack_rows(values, v, t * p.vT + b * p.vB + h * p.vH, p.vL, p.E, key_mask, b * p.S, goes_on * p.vT)


@inline
def attend_rows(queries, i, keys, values, E, is_causal, scale, at, scale_stride, counts, zeros, out):
    """``out[:ROWS] = scale Q K^T V`` of the queries from i on, and ``counts = Q K^T``; ``values`` in rows of `TILE`.

    The scale of query j is ``scale[at + j * scale_stride]``.
    """
    S, last = keys.size, min(queries.size, i + ROWS)
    for own in range(i, last):
        count_row(queries[own], keys, counts[own - i])
        if is_causal:
            counts[own - i, own + 1 :] = F(0.0)
    multiply(counts, S, 1, min(last, S) if is_causal else S, last - i, values, E, zeros, out)
    for own in range(i, last):
        own_scale, row = scale[at + own * scale_stride], out[own - i, :E]
        for e in range(E):
            row[e] = row[e] * own_scale


@cache
def forward_kernel(storage: torch.dtype, fire: str | None, divides: bool, hard_reset: bool) -> Kernel:
    """The forward for one kind of firing."""
    plan, element = (fire == "output", fire == "map", divides, hard_reset, SOURCES), ELEMENT[storage]

    def spiking_attention_forward(frame):
        fires_output, fires_map, divides, hard_reset, _ = plan
        p = numba.carray(frame, 1, _forward_record)[0]
        T, B, H, L, S, E, is_causal = p.T, p.B, p.H, p.L, p.S, p.E, p.is_causal
        tau, v_threshold, v_rest = F(p.tau), F(p.v_threshold), F(p.v_rest)
        q, k, v, scale, query_mask, key_mask, odd = open_inputs(p, element)
        out = memory(p.out, T * B * L * H * E, element)
        queries, keys, values = np.empty(L, U), np.empty(S, U), np.empty(S, U)
        columns, spikes = np.empty(((S + WORD - 1) // WORD, E), U), np.empty(S, F)  # of values; of a fired map
        tile, zeros, currents = tile_rows(S), tile_rows(1), tile_rows(ROWS)
        counts, buffer = np.zeros((ROWS, S), F), np.empty(E, F)
        potentials = np.empty((L, S if fires_map else E), F)
        first, last = next_blocks(frame, p.pieces, p.blocks, 0)
        while first < last:
            for block in range(first, last):
                if odd[0]:  # another block holds what is no spike: the call goes to matrix products
                    break
                b, h = block // H, block % H
                scale_at = b * p.scaleB + h * p.scaleH
                potentials[:] = v_rest
                for t in range(T):
                    if not load_tokens(p, t, b, h, q, k, v, query_mask, key_mask, queries, keys, values):
                        odd[0] = 1
                    if fires_map:
                        transpose(values, columns)
                    else:
                        unpack_rows(values, tile)
                    for i in range(L):
                        row = out[(((t * B + b) * L + i) * H + h) * E : (((t * B + b) * L + i) * H + h + 1) * E]
                        result = target_row(row, buffer)
                        if fires_map:
                            current, own_scale = counts[0], scale[scale_at + i * p.scaleL]
                            count_row(queries[i], keys, current)
                            for j in range(S):
                                current[j] = current[j] * own_scale if j <= i or not is_causal else F(0.0)
                            step_row(
                                current, potentials[i], spikes, tau, v_threshold, v_rest,
                                True, divides, hard_reset, True,
                            )  # fmt: skip
                            result[:] = F(0.0)
                            for begin in range(0, S, WORD):
                                word, column = pack(spikes, begin, min(WORD, S - begin))[0], columns[begin // WORD]
                                for e in range(E):
                                    result[e] += F(np.int64(count_bits(word & column[e])))
                        else:
                            if i % ROWS == 0:
                                attend_rows(
                                    queries, i, keys, tile, E, is_causal, scale, scale_at, p.scaleL,
                                    counts, zeros, currents,
                                )  # fmt: skip
                            current = currents[i % ROWS, :E]
                            if fires_output:
                                step_row(
                                    current, potentials[i], result, tau, v_threshold, v_rest,
                                    True, divides, hard_reset, True,
                                )  # fmt: skip
                            else:
                                result[:] = current
                        store_row(row, result)
            first, last = next_blocks(frame, p.pieces, p.blocks, 1)

    return Kernel(spiking_attention_forward, _FORWARD)


def tensor_arguments(name: str, x: Tensor) -> dict[str, int]:
    """Address and strides of [T, B, H, L, E] for a frame."""
    return {name: x.data_ptr()} | {f"{name}{axis}": stride for axis, stride in zip("TBHL", strides(x), strict=True)}


def input_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Tensor,
    masks: tuple[Tensor | None, Tensor | None],
    is_causal: bool,
    odd: np.ndarray,
) -> dict[str, float]:
    """What both frames take for the inputs; ``masks`` are those of queries and keys."""
    T, B, H, L, E = q.shape
    return {
        **tensor_arguments("q", q), **tensor_arguments("k", k), **tensor_arguments("v", v),
        **tensor_arguments("scale", scale),
        **mask_arguments("query_mask", masks[0]), **mask_arguments("key_mask", masks[1]),
        "odd": odd.ctypes.data, "T": T, "B": B, "H": H, "L": L, "S": k.shape[3], "E": E, "is_causal": is_causal,
    }  # fmt: skip


def spiking_attention_forward_cpu(
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
) -> Tensor | None:
    """`spiking_attention`, [T, B, H, L, E] in memory [T, B, L, H, E]; None if an input is not made of spikes."""
    T, B, H, L, E = q.shape
    q, k, v = rows_in_one_piece(q), rows_in_one_piece(k), rows_in_one_piece(v)
    masks = in_one_piece(query_padding_mask), in_one_piece(key_padding_mask)
    out, odd = empty((T, B, L, H, E), q.dtype), np.zeros(1, np.int64)
    spread(
        forward_kernel(q.dtype, fire, not has_exact_reciprocal(tau), v_reset is not None), B * H, T * B * H * L * E,
        **input_arguments(q, k, v, scale, masks, is_causal, odd), out=out.data_ptr(),
        **neuron_scalars(tau, None, v_threshold, v_reset),
    )  # fmt: skip
    return None if odd[0] else out.transpose(2, 3)
