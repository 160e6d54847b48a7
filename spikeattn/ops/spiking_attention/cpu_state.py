"""The fused CPU kernel of `spiking_attention` where the output fires or nothing does: linear in L, causal or not.

`WORD` channels of the result of one head of one sequence at a time. Their states K^T V, one a time step, stay in the
caches; a token adds its values to the rows of the state that its key names, and sums the rows that its query names.
"""

from functools import cache

import numba
import numpy as np
import torch

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
from spikeattn._cpu.neuron import F, step_row
from spikeattn._cpu.states import add_bits_to_token, sum_rows_of_token
from spikeattn._cpu.storage import ELEMENT, copy_row
from spikeattn._cpu.vectors import TILE, row_of
from spikeattn.ops.spiking_attention.cpu_inputs import INPUTS, load_tokens, open_inputs

# Tokens that are taken through time together, so that a state is read from the L1 cache by all but the first.
TOKENS = 16

_FRAME = Frame(f"{INPUTS} are_spikes out", "tau v_threshold v_rest")
_record = _FRAME.record


@inline
def sum_currents(
    state, queries, keys, W, values, begin, n, width, is_causal, scale, scale_at, scale_step, zeros, currents
):  # fmt: skip
    """``width`` currents of each of the ``n`` tokens from ``begin`` on; if causal, each joins the state before.

    The scale of token i is ``scale[scale_at + i * scale_step]``.
    """
    for i in range(begin, begin + n):
        if is_causal:
            add_bits_to_token(state, keys, W, i, width, values[i])
        own = currents.ctypes.data + (i - begin) * width * currents.itemsize
        sum_rows_of_token(state, queries, W, i, width, row_of(zeros, 0), scale[scale_at + i * scale_step], own)


@cache
def state_kernel(
    storage: torch.dtype, packed: bool, wide: bool, fires: bool, divides: bool, hard_reset: bool
) -> Kernel:
    """The forward for spikes as bits or as numbers, for tokens of one word or more, and for one kind of neuron or none.

    A block that finds a number that is no spike says so in ``are_spikes`` and stops.
    """
    plan, element = (wide, fires, divides, hard_reset, SOURCES), ELEMENT[storage]
    source = U if packed else element

    def spiking_attention_state(frame):
        wide, fires, divides, hard_reset, _ = plan
        p = numba.carray(frame, 1, _record)[0]
        T, B, H, L, S, E, is_causal = p.T, p.B, p.H, p.L, p.S, p.E, p.is_causal
        tau, v_threshold, v_rest = F(p.tau), F(p.v_threshold), F(p.v_rest)
        q, k, v, scale, query_mask, key_mask = open_inputs(p, source)
        out, are_spikes = memory(p.out, T * B * L * H * E, element), memory(p.are_spikes, p.blocks, np.int64)
        W = (E + WORD - 1) // WORD if wide else 1  # words of a token
        words = allocate_words(3 * T * W, max(L, S))
        queries, keys, values = words[: T * W, :L], words[T * W : 2 * T * W, :S], words[2 * T * W :, :S]
        tiles = allocate(T * E + 1, TILE)
        states, zeros = tiles[: T * E], tiles[T * E :]
        # Of `TOKENS` tokens, one after another; with room for what is written beyond the last.
        rows = allocate(4, (TOKENS + 1) * TILE)
        currents, spikes, potentials, buffer = rows[0], rows[1], rows[2], rows[3, :TILE]
        zeros[:] = F(0.0)
        first, last = next_blocks(frame, p.pieces, p.blocks, 0)
        while first < last:
            for block in range(first, last):
                b, h, own = block // W // H, block // W % H, block % W
                width = min(WORD, E - own * WORD)
                scale_at = b * p.scaleB + h * p.scaleH
                states[:] = F(0.0)
                spikes_only = True
                for t in range(T):
                    at = t * W
                    spikes_only = load_tokens(
                        p, t, b, h, q, k, v, query_mask, key_mask, W, queries[at:], keys[at:], values[at:]
                    )  # fmt: skip
                    if not spikes_only:
                        break
                    if not is_causal:
                        for j in range(S):
                            add_bits_to_token(row_of(states, t * E), keys[at:], W, j, width, values[at + own, j])
                are_spikes[block] = spikes_only
                for begin in range(0, L if spikes_only else 0, TOKENS):
                    n = min(TOKENS, L - begin)
                    potentials[: n * width] = v_rest
                    for t in range(T):
                        at = t * W
                        sum_currents(
                            row_of(states, t * E), queries[at:], keys[at:], W, values[at + own],
                            begin, n, width, is_causal, scale, scale_at, p.scaleL, zeros, currents,
                        )  # fmt: skip
                        if fires:
                            step_row(
                                currents[: n * width], potentials[: n * width], spikes, tau, v_threshold, v_rest,
                                True, divides, hard_reset, True,
                            )  # fmt: skip
                        result = spikes if fires else currents
                        for i in range(n):
                            at = (((t * B + b) * L + begin + i) * H + h) * E + own * WORD
                            copy_row(out[at : at + width], result[i * width : (i + 1) * width], buffer[:width])
            first, last = next_blocks(frame, p.pieces, p.blocks, 1)
        release(words)
        release(tiles)
        release(rows)

    return Kernel(spiking_attention_state, _FRAME)
