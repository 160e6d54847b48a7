"""Modules: parameters and wiring around `spikeattn.ops`."""

from spikeattn.nn.attention import SpikingSelfAttention, StreamState
from spikeattn.nn.block import SpikingMLP, SpikingTransformer, SpikingTransformerBlock
from spikeattn.nn.cross_attention import SpikingCrossAttention
from spikeattn.nn.dual_spike import DualSpikeSelfAttention
from spikeattn.nn.linear import EventLinear
from spikeattn.nn.neuron import IF, LIF, ParametricLIF, Spike
from spikeattn.nn.qk_attention import QKAttention
from spikeattn.nn.spatio_temporal import SpatioTemporalAttention
from spikeattn.nn.spike_driven import SpikeDrivenSelfAttention
from spikeattn.nn.views import attention_maps, firing_rates

__all__ = [
    "IF",
    "LIF",
    "DualSpikeSelfAttention",
    "EventLinear",
    "ParametricLIF",
    "QKAttention",
    "SpatioTemporalAttention",
    "Spike",
    "SpikeDrivenSelfAttention",
    "SpikingCrossAttention",
    "SpikingMLP",
    "SpikingSelfAttention",
    "SpikingTransformer",
    "SpikingTransformerBlock",
    "StreamState",
    "attention_maps",
    "firing_rates",
]
