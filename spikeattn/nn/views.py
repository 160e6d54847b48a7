"""Views of a spiking model that has run."""

from collections import defaultdict
from typing import Any

import torch
from spikingjelly.activation_based.neuron import BaseNode
from torch import Tensor, nn

from spikeattn.nn.neuron import Spike


def firing_rates(model: nn.Module, *inputs: Any, key_padding_mask: Tensor | None = None) -> dict[str, float]:
    """Firing rate of each spiking layer during one forward pass.

    Args:
        model: Any module; its layers of `LIF`, `IF`, `ParametricLIF`, `Spike` and of spikingjelly's neurons count.
            It runs once under ``no_grad``, in the mode (train or eval) it is in.
        inputs: What ``model`` is called with.
        key_padding_mask: [B, L], True at padding, as given to the model. Spiking layers of this package are silent
            at padding; with the mask given, the rates are those of the tokens alone.

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

    handles = [
        module.register_forward_hook(watch(name))
        for name, module in model.named_modules()
        if isinstance(module, BaseNode | Spike)
    ]
    try:
        with torch.no_grad():
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {name: fired[name] / places[name] for name in fired}


def _valid_share(spikes: Tensor, key_padding_mask: Tensor | None) -> float:
    """Share of ``spikes`` ([T, B, L, D], a map [T, B, H, L, L], or of all tokens [T, B, D]) that belongs to tokens."""
    if key_padding_mask is None or spikes.ndim == 3:
        return 1.0
    valid = (~key_padding_mask).double()
    if spikes.ndim == 5:
        return float((valid.mean(1) ** 2).mean())
    return float(valid.mean())
