"""Spiking neurons and spiking attention over all time steps at once, on PyTorch and SpikingJelly."""

from importlib.metadata import version

from spikeattn._backends import BackendStatus, BackendUnavailableError, SpikeattnError, backend_status
from spikeattn._report import backend_report
from spikeattn.nn import (
    IF,
    LIF,
    DualSpikeSelfAttention,
    EventLinear,
    ParametricLIF,
    QKAttention,
    SpatioTemporalAttention,
    Spike,
    SpikeDrivenSelfAttention,
    SpikingCrossAttention,
    SpikingMLP,
    SpikingSelfAttention,
    SpikingTransformer,
    SpikingTransformerBlock,
    StreamState,
    attention_maps,
    firing_rates,
)
from spikeattn.ops.event_linear import event_linear
from spikeattn.ops.lif import LIFOutput, lif
from spikeattn.ops.norm_lif import norm_lif
from spikeattn.ops.spiking_attention import AttentionState, spiking_attention, spiking_attention_step
from spikeattn.ops.surrogate import (
    ATan,
    CustomSurrogate,
    Erf,
    PiecewiseExp,
    PiecewiseQuadratic,
    Rect,
    Sigmoid,
    SoftSign,
    SuperSpike,
    Surrogate,
    spike,
)

__version__ = version("spikeattn")

__all__ = [
    "IF",
    "LIF",
    "ATan",
    "AttentionState",
    "BackendStatus",
    "BackendUnavailableError",
    "CustomSurrogate",
    "DualSpikeSelfAttention",
    "Erf",
    "EventLinear",
    "LIFOutput",
    "ParametricLIF",
    "PiecewiseExp",
    "PiecewiseQuadratic",
    "QKAttention",
    "Rect",
    "Sigmoid",
    "SoftSign",
    "SpatioTemporalAttention",
    "Spike",
    "SpikeDrivenSelfAttention",
    "SpikeattnError",
    "SpikingCrossAttention",
    "SpikingMLP",
    "SpikingSelfAttention",
    "SpikingTransformer",
    "SpikingTransformerBlock",
    "StreamState",
    "SuperSpike",
    "Surrogate",
    "attention_maps",
    "backend_report",
    "backend_status",
    "event_linear",
    "firing_rates",
    "lif",
    "norm_lif",
    "spike",
    "spiking_attention",
    "spiking_attention_step",
]
