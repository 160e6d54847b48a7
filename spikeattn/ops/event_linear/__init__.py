"""A linear layer that costs by the inputs that fired."""

from spikeattn.ops.event_linear.op import event_linear

__all__ = ["event_linear"]
