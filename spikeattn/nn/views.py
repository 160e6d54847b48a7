"""Views of a spiking model that has run."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from spikingjelly.activation_based.neuron import BaseNode
from torch import Tensor, nn

from spikeattn.nn.attention import SpikingSelfAttention, split_heads
from spikeattn.nn.cross_attention import SpikingCrossAttention
from spikeattn.nn.dual_spike import DualSpikeSelfAttention
from spikeattn.nn.neuron import Spike
from spikeattn.ops.lif.reference import state_dtype
from spikeattn.ops.spiking_attention.reference import exact_sums

_WITH_MAPS = (SpikingSelfAttention, SpikingCrossAttention, DualSpikeSelfAttention)


def firing_rates(model: nn.Module, *inputs: Any, key_padding_mask: Tensor | None = None) -> dict[str, float]:
    """Firing rate of each spiking layer during one forward pass.

    Args:
        model: Any module; its layers of `LIF`, `IF`, `ParametricLIF`, `Spike` and of spikingjelly's neurons count.
            It runs once under ``no_grad``, in the mode (train or eval) it is in.
        inputs: What ``model`` is called with.
        key_padding_mask: [B, L], True at padding, as given to the model. Spiking layers of this package are silent
            at padding; with the mask given, the rates are those of the tokens alone. It counts for layers over L
            tokens: in cross-attention give queries and keys different numbers, or no mask.

    Returns:
        Spikes a neuron and time step, between 0 and 1, by the layer's name. A layer that was called several times
        gives the mean; one that was not called is left out.

    Example:
        >>> firing_rates(nn.Sequential(nn.Identity(), Spike()), torch.tensor([-1.0, 1.0]))
        {'1': 0.5}
    """
    fired: dict[str, float] = defaultdict(float)
    places: dict[str, float] = defaultdict(float)

    def watch(name: str):
        def record(module: nn.Module, args: tuple[Any, ...], spikes: Tensor) -> None:
            fired[name] += float(spikes.sum(dtype=torch.float64))
            places[name] += spikes.numel() * _valid_share(spikes, key_padding_mask)

        return record

    layers = {name: module for name, module in model.named_modules() if isinstance(module, BaseNode | Spike)}
    _run_hooked(model, inputs, [(module, watch(name)) for name, module in layers.items()])
    return {name: fired[name] / places[name] for name in fired}


def attention_maps(model: nn.Module, *inputs: Any) -> dict[str, Tensor]:
    """Who attends to whom: the map of each attention module during one forward pass.

    The modules hold no map in memory unless it fires and somebody looks; this makes them on demand.

    Args:
        model: Any module; its `SpikingSelfAttention`, `SpikingCrossAttention` and `DualSpikeSelfAttention` count, the
            others have no map. It runs once under ``no_grad``, in the mode (train or eval) it is in.
        inputs: What ``model`` is called with, masks too.

    Returns:
        [T, B, H, L, S] by the module's name, row i what token i sees, S = L in self-attention: where the output fires
        the counts Q K^T of spikes that a query and a key share, without the scale; where the map fires its spikes. Zero
        at padding, and at later keys if causal. A module that was called several times gives its last call.

    Example:
        >>> attention = SpikingSelfAttention(16, num_heads=2, fire="map")
        >>> attention_maps(attention, torch.randn(4, 3, 5, 16))[""].shape
        torch.Size([4, 3, 2, 5, 5])
    """
    seen: dict[tuple[str, str], Tensor] = {}

    def watch(name: str, part: str):
        def record(module: nn.Module, args: tuple[Any, ...], spikes: Tensor) -> None:
            seen[name, part] = spikes

        return record

    modules = {name: module for name, module in model.named_modules() if isinstance(module, _WITH_MAPS)}
    hooks = [
        (module.get_submodule(part), watch(name, part))
        for name, module in modules.items()
        for part in (("attn_lif",) if _map_fires(module) else ("q", "k"))
    ]
    _run_hooked(model, inputs, hooks)
    maps = {}
    for name, module in modules.items():
        if (name, "attn_lif") in seen:
            maps[name] = seen[name, "attn_lif"]
        elif (name, "q") in seen:
            # At least float32, also under autocast: so every count is exact.
            q, k = (split_heads(seen[name, part], module.num_heads) for part in "qk")
            with exact_sums(q):
                counts = q.to(state_dtype(q)) @ k.to(state_dtype(k)).transpose(-1, -2)
            maps[name] = counts.tril() if getattr(module, "is_causal", False) else counts
    return maps


def _run_hooked(model: nn.Module, inputs: tuple[Any, ...], hooks: list[tuple[nn.Module, Callable[..., None]]]) -> None:
    """Run ``model`` once under ``no_grad`` with forward hooks, and take them off again whatever happens."""
    handles = [module.register_forward_hook(hook) for module, hook in hooks]
    try:
        with torch.no_grad():
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()


def _map_fires(module: SpikingSelfAttention | SpikingCrossAttention | DualSpikeSelfAttention) -> bool:
    """Whether the neurons of an attention module are given its map."""
    return isinstance(module, DualSpikeSelfAttention) or module.fire == "map"


def _valid_share(spikes: Tensor, key_padding_mask: Tensor | None) -> float:
    """Share of ``spikes`` ([T, B, L, D], or a map [T, B, H, L, S]) that belongs to tokens of the mask's number."""
    if key_padding_mask is None or spikes.ndim not in (4, 5):
        return 1.0
    valid = (~key_padding_mask).double()
    share = torch.ones(len(valid), dtype=torch.float64, device=valid.device)
    for tokens in (spikes.shape[2],) if spikes.ndim == 4 else spikes.shape[3:]:
        if tokens == valid.shape[1]:
            share = share * valid.mean(1)
    return float(share.mean())
