"""The fused CPU kernel of `spiking_attention` where the map fires: one head of one sequence at a time."""

from functools import cache

import numba
import numpy as np
import torch

from spikeattn._cpu.bits import WORD, U, count_bits, count_row, pack, transpose
from spikeattn._cpu.compiler import SOURCES, Frame, Kernel, allocate, allocate_words, memory, next_blocks, release
from spikeattn._cpu.neuron import F, step_row
from spikeattn._cpu.storage import ELEMENT, store_row, target_row
from spikeattn.ops.spiking_attention.cpu_inputs import INPUTS, load_tokens, open_inputs

# Keys; beyond, matrix products are faster (benchmarks, suite "attention"). Causal ones compute twice what counts.
LONGEST, LONGEST_CAUSAL = 64, 128

_FRAME = Frame(f"{INPUTS} are_spikes out", "tau v_threshold v_rest")
_record = _FRAME.record


@cache
def map_kernel(storage: torch.dtype, packed: bool, divides: bool, hard_reset: bool) -> Kernel:
    """The forward for spikes as bits or as numbers, and for one kind of neuron; ``are_spikes`` as in `state_kernel`."""
    plan, element = (divides, hard_reset, SOURCES), ELEMENT[storage]
    source = U if packed else element

    def spiking_attention_map(frame):
        divides, hard_reset, _ = plan
        p = numba.carray(frame, 1, _record)[0]
        T, B, H, L, S, E, is_causal = p.T, p.B, p.H, p.L, p.S, p.E, p.is_causal
        tau, v_threshold, v_rest = F(p.tau), F(p.v_threshold), F(p.v_rest)
        q, k, v, scale, query_mask, key_mask = open_inputs(p, source)
        out, are_spikes = memory(p.out, T * B * L * H * E, element), memory(p.are_spikes, p.blocks, np.int64)
        W = (E + WORD - 1) // WORD  # words of a token
        words = allocate_words(3 * W, max(L, S))
        queries, keys, values = words[:W, :L], words[W : 2 * W, :S], words[2 * W :, :S]
        columns = allocate_words((S + WORD - 1) // WORD, E)  # of values
        rows, potentials = allocate(3, max(S, E)), allocate(L, S)
        current, spikes, buffer = rows[0, :S], rows[1, :S], rows[2, :E]
        first, last = next_blocks(frame, p.pieces, p.blocks, 0)
        while first < last:
            for block in range(first, last):
                b, h = block // H, block % H
                scale_at = b * p.scaleB + h * p.scaleH
                potentials[:] = v_rest
                are_spikes[block] = True
                for t in range(T):
                    if not load_tokens(p, t, b, h, q, k, v, query_mask, key_mask, W, queries, keys, values):
                        are_spikes[block] = False
                        break
                    for w in range(W):
                        transpose(values[w], columns[:, w * WORD : min(E, (w + 1) * WORD)])
                    for i in range(L):
                        own_scale = scale[scale_at + i * p.scaleL]
                        current[:] = F(0.0)
                        for w in range(W):
                            count_row(queries[w, i], keys[w], current)
                        for j in range(S):
                            current[j] = current[j] * own_scale if j <= i or not is_causal else F(0.0)
                        step_row(
                            current, potentials[i], spikes, tau, v_threshold, v_rest, True, divides, hard_reset, True
                        )
                        row = out[(((t * B + b) * L + i) * H + h) * E : (((t * B + b) * L + i) * H + h + 1) * E]
                        result = target_row(row, buffer)
                        result[:] = F(0.0)
                        for begin in range(0, S, WORD):
                            word, column = pack(spikes, begin, min(WORD, S - begin))[0], columns[begin // WORD]
                            for e in range(E):
                                result[e] += F(np.int64(count_bits(word & column[e])))
                        store_row(row, result)
            first, last = next_blocks(frame, p.pieces, p.blocks, 1)
        release(words)
        release(columns)
        release(rows)
        release(potentials)

    return Kernel(spiking_attention_map, _FRAME)
