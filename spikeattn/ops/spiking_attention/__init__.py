"""Spiking attention: products of spikes in either order of association, and the neurons that follow them."""

from spikeattn.ops.spiking_attention.op import spiking_attention
from spikeattn.ops.spiking_attention.streaming import AttentionState, spiking_attention_step

__all__ = ["AttentionState", "spiking_attention", "spiking_attention_step"]
