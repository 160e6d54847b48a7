"""What the CPU kernels of `spiking_attention` take: spikes as bits or as numbers, and tokens of any strides."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from spikeattn._cpu.bits import WORD, take_rows
from spikeattn._cpu.compiler import inline, memory
from spikeattn._cpu.neuron import F
from spikeattn._cpu.packed import Packed, packed
from spikeattn._cpu.storage import ELEMENT, mask_arguments
from spikeattn._cpu.vectors import WHY_NOT
from spikeattn.ops.spiking_attention.call import Masks
from spikeattn.ops.spiking_attention.layout import rows_in_one_piece, strides

INPUTS = (
    "q qT qB qH qL q_size k kT kB kH kL k_size v vT vB vH vL v_size scale scaleT scaleB scaleH scaleL scale_size"
    " query_mask has_query_mask key_mask has_key_mask T B H L S E is_causal"
)
MOST_CHANNELS = 128
Numbers = tuple[Tensor, Tensor, Tensor]  # queries, keys and values as they are given


def are_taken(shape: Sequence[int], dtype: torch.dtype, scale: Tensor) -> bool:
    """Whether heads are narrow enough, in a storage that the kernels know, and one scale is for all time steps."""
    return shape[-1] <= MOST_CHANNELS and dtype in ELEMENT and scale.shape[0] == 1 and not WHY_NOT


@inline
def open_inputs(p, source):
    """Queries, keys and values, words of bits or numbers, the scale, and the two masks, empty where there is none."""
    q, k, v = memory(p.q, p.q_size, source), memory(p.k, p.k_size, source), memory(p.v, p.v_size, source)
    scale = memory(p.scale, p.scale_size, F)
    query_mask = memory(p.query_mask, p.B * p.L if p.has_query_mask else 0, np.bool_)
    key_mask = memory(p.key_mask, p.B * p.S if p.has_key_mask else 0, np.bool_)
    return q, k, v, scale, query_mask, key_mask


@inline
def load_tokens(p, t, b, h, q, k, v, query_mask, key_mask, W, queries, keys, values):
    """The words of the tokens of one head and time step: row w of each holds `WORD` channels of every token.

    Whether all were spikes.
    """
    are_spikes = True
    for w in range(W):
        first = w * WORD
        size = min(WORD, p.E - first)
        are_spikes &= take_rows(q, t * p.qT + b * p.qB + h * p.qH + first, p.qL, size, query_mask, b * p.L, queries[w])
        are_spikes &= take_rows(k, t * p.kT + b * p.kB + h * p.kH + first, p.kL, size, key_mask, b * p.S, keys[w])
        are_spikes &= take_rows(v, t * p.vT + b * p.vB + h * p.vH + first, p.vL, size, key_mask, b * p.S, values[w])
    return are_spikes


class Spikes(NamedTuple):
    """Queries, keys and values as bits."""

    q: Packed
    k: Packed
    v: Packed


def spikes_of(q: Tensor, k: Tensor, v: Tensor) -> Spikes | None:
    """All three as bits, the channels of a token side by side; None where one holds other numbers than 0 and 1."""
    found = []
    for x in (q, k, v):
        spikes = packed(rows_in_one_piece(x))
        if spikes is None:
            return None
        found.append(spikes)
    return Spikes(*found)


def tensor_arguments(name: str, x: Tensor | Packed) -> dict[str, int]:
    """Address, strides and size of [T, B, H, L, E] for a frame."""
    memory = x.bits if isinstance(x, Packed) else x
    return {name: memory.data_ptr(), f"{name}_size": _size(x)} | {
        f"{name}{axis}": stride for axis, stride in zip("TBHL", strides(x), strict=True)
    }


def _size(x: Tensor | Packed) -> int:
    """Words of bits, or elements from the first to the last."""
    if isinstance(x, Packed):
        return x.bits.numel()
    return 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))


def input_arguments(inputs: Spikes | Numbers, scale: Tensor, masks: Masks, is_causal: bool) -> dict[str, float]:
    """What all frames take for the inputs; ``masks`` are those of queries and keys, in one piece."""
    T, B, H, L, E = inputs[0].shape
    arguments: dict[str, float] = {}
    own: Sequence[Tensor | Packed] = inputs
    for name, x in zip("qkv", own, strict=True):
        arguments |= tensor_arguments(name, x)
    return {
        **arguments, **tensor_arguments("scale", scale),
        **mask_arguments("query_mask", masks[0]), **mask_arguments("key_mask", masks[1]),
        "T": T, "B": B, "H": H, "L": L, "S": inputs[1].shape[3], "E": E, "is_causal": is_causal,
    }  # fmt: skip
