"""LayerNorm and leaky integrate-and-fire neurons in one pass."""

from spikeattn.ops.norm_lif.op import norm_lif

__all__ = ["norm_lif"]
