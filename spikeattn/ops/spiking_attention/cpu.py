"""The fused CPU kernels of `spiking_attention`, and which calls they take.

What is not made of spikes, and what does not fit them, goes to matrix products (`reference.attend`).
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from spikeattn._cpu.bits import WORD
from spikeattn._cpu.memory import empty
from spikeattn._cpu.neuron import neuron_scalars
from spikeattn._cpu.threads import spread
from spikeattn._leak import has_exact_reciprocal
from spikeattn.ops.spiking_attention.call import Masks, Settings
from spikeattn.ops.spiking_attention.cpu_inputs import Numbers, Spikes, are_taken, input_arguments, spikes_of
from spikeattn.ops.spiking_attention.cpu_map import LONGEST, LONGEST_CAUSAL, map_kernel
from spikeattn.ops.spiking_attention.cpu_state import state_kernel
from spikeattn.ops.spiking_attention.layout import in_one_piece, rows_in_one_piece

# For each thread: 8 MiB of states, and twice that in the backward; 96 MiB of words for each 64 channels of a head.
MOST_STATE_ROWS, MOST_TOKENS = 1 << 15, 1 << 22


def takes(shape: Sequence[int], S: int, dtype: torch.dtype, scale: Tensor, fire: str | None, is_causal: bool) -> bool:
    """Whether the forward takes a call with queries of this shape and ``S`` keys."""
    T, _, _, L, E = shape
    fits = T * E <= MOST_STATE_ROWS and T * max(L, S) <= MOST_TOKENS
    if fire == "map":
        fits = (LONGEST_CAUSAL if is_causal else LONGEST) >= S
    return fits and are_taken(shape, dtype, scale)


def spiking_attention_forward_cpu(
    inputs: Spikes | Numbers, scale: Tensor, masks: Masks, settings: Settings
) -> Tensor | None:
    """`spiking_attention`, [T, B, H, L, E] in memory [T, B, L, H, E]; None where a number is no spike.

    A kernel packs numbers as it reads them. Where several blocks read the same, they are packed before.
    """
    (T, B, H, L, E), dtype, fire = inputs[0].shape, inputs[0].dtype, settings.fire
    tau, v_threshold, v_reset = settings.tau, settings.v_threshold, settings.v_reset
    wide = E > WORD
    if not isinstance(inputs, Spikes):
        if wide and fire != "map":
            if (spikes := spikes_of(*inputs)) is None:
                return None
            inputs = spikes
        else:
            q, k, v = (rows_in_one_piece(x) for x in inputs)
            inputs = (q, k, v)
    masks = in_one_piece(masks[0]), in_one_piece(masks[1])
    blocks = B * H * (1 if fire == "map" else -(-E // WORD))
    out, are_spikes = empty((T, B, L, H, E), dtype), np.zeros(blocks, np.int64)
    packed, neuron = isinstance(inputs, Spikes), (not has_exact_reciprocal(tau), v_reset is not None)
    if fire == "map":
        kernel = map_kernel(dtype, packed, *neuron)
    else:
        kernel = state_kernel(dtype, packed, wide, fire == "output", *neuron)
    spread(
        kernel, blocks, out.numel(),
        **input_arguments(inputs, scale, masks, settings.is_causal),
        are_spikes=are_spikes.ctypes.data, out=out.data_ptr(), **neuron_scalars(tau, None, v_threshold, v_reset),
    )  # fmt: skip
    return out.transpose(2, 3) if are_spikes.all() else None
