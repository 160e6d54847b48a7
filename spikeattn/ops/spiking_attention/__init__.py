"""Spiking attention: products of spikes, in either order of association."""

from spikeattn.ops.spiking_attention.reference import attention_map, spiking_attention_reference

__all__ = ["attention_map", "spiking_attention_reference"]
