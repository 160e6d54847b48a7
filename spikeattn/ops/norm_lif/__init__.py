"""LayerNorm and leaky integrate-and-fire neurons in one pass."""
