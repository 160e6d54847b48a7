"""The fused CPU kernels of `spiking_attention`, and which calls they take.

What is not made of spikes, and what does not fit them, goes to matrix products (`reference.attend`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from spikeattn._cpu.bits import WORD
from spikeattn._cpu.memory import empty
from spikeattn._cpu.neuron import neuron_scalars
from spikeattn._cpu.threads import spread
from spikeattn._leak import has_exact_reciprocal
from spikeattn.ops.spiking_attention.call import Masks, Settings
from spikeattn.ops.spiking_attention.cpu_inputs import Spikes, are_taken, input_arguments
from spikeattn.ops.spiking_attention.cpu_map import LONGEST, LONGEST_CAUSAL, map_kernel
from spikeattn.ops.spiking_attention.cpu_state import state_kernel
from spikeattn.ops.spiking_attention.layout import in_one_piece

# For each thread: 8 MiB of states, and twice that in the backward; 96 MiB of words for each 64 channels of a head.
MOST_STATE_ROWS, MOST_TOKENS = 1 << 15, 1 << 22


def takes(shape: Sequence[int], S: int, dtype: torch.dtype, scale: Tensor, fire: str | None, is_causal: bool) -> bool:
    """Whether the forward takes a call with queries of this shape and ``S`` keys."""
    T, _, _, L, E = shape
    fits = T * E <= MOST_STATE_ROWS and T * max(L, S) <= MOST_TOKENS
    if fire == "map":
        fits = (LONGEST_CAUSAL if is_causal else LONGEST) >= S
    return fits and are_taken(shape, dtype, scale)


def spiking_attention_forward_cpu(spikes: Spikes, scale: Tensor, masks: Masks, settings: Settings) -> Tensor:
    """`spiking_attention`, [T, B, H, L, E] in memory [T, B, L, H, E]."""
    (T, B, H, L, E), dtype, fire = spikes.q.shape, spikes.q.dtype, settings.fire
    tau, v_threshold, v_reset = settings.tau, settings.v_threshold, settings.v_reset
    masks = in_one_piece(masks[0]), in_one_piece(masks[1])
    out = empty((T, B, L, H, E), dtype)
    neuron = (not has_exact_reciprocal(tau), v_reset is not None)
    spread(
        map_kernel(dtype, *neuron) if fire == "map" else state_kernel(dtype, E > WORD, fire == "output", *neuron),
        B * H if fire == "map" else B * H * -(-E // WORD), out.numel(),
        **input_arguments(spikes, scale, masks, settings.is_causal), out=out.data_ptr(),
        **neuron_scalars(tau, None, v_threshold, v_reset),
    )  # fmt: skip
    return out.transpose(2, 3)
