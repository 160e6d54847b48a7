"""Spiking attention: products of spikes in either order of association, and the neurons that follow them."""

from spikeattn.ops.spiking_attention.op import spiking_attention

__all__ = ["spiking_attention"]
