"""Modules: parameters and wiring around `spikeattn.ops`."""

from spikeattn.nn.attention import SpikingSelfAttention
from spikeattn.nn.block import SpikingMLP, SpikingTransformer, SpikingTransformerBlock
from spikeattn.nn.neuron import IF, LIF, ParametricLIF, Spike
from spikeattn.nn.views import firing_rates

__all__ = [
    "IF",
    "LIF",
    "ParametricLIF",
    "Spike",
    "SpikingMLP",
    "SpikingSelfAttention",
    "SpikingTransformer",
    "SpikingTransformerBlock",
    "firing_rates",
]
