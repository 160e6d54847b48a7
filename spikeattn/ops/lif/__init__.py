"""Leaky integrate-and-fire neurons over all time steps."""

from spikeattn.ops.lif.op import LIFOutput, lif

__all__ = ["LIFOutput", "lif"]
