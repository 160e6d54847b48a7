"""spikingjelly's attention layers on our operations, inside a model that is built already."""

import logging
import math
from collections import Counter
from typing import TypeVar

from spikingjelly.activation_based import neuron
from spikingjelly.activation_based.layer import attention
from torch import Tensor, nn

from spikeattn._backends import Backend, logger
from spikeattn.nn.neuron import IF, LIF, ParametricLIF, fires_inside, is_watched
from spikeattn.ops.spiking_attention import spiking_attention
from spikeattn.ops.surrogate import Surrogate, as_surrogate

Model = TypeVar("Model", bound=nn.Module)

_LAYERS = (
    attention.SpikingSelfAttention,
    attention.QKAttention,
    attention.TokenQKAttention,
    attention.ChannelQKAttention,
    attention.SpikeDrivenSelfAttention,
)
_THEIRS = (neuron.LIFNode, neuron.IFNode, neuron.ParametricLIFNode)


class FusedSelfAttention(attention.SpikingSelfAttention):
    """spikingjelly's ``SpikingSelfAttention`` with its products in `spiking_attention`; made by `swap_attention`."""

    backend: Backend = "auto"

    def forward(self, x_seq: Tensor) -> Tensor:
        """Attend: [T, N, C, L] to spikes [T, N, C, L].

        Raises:
            ValueError: ``x_seq`` is not [T, N, C, L].
        """
        if x_seq.ndim != 4:
            raise ValueError(f"FusedSelfAttention: x_seq must be [T, N, C, L], got shape {tuple(x_seq.shape)}.")
        spikes = self.qkv_lif(self.qkv_conv_bn(x_seq))  # [T, N, 3 * C, L]
        q, k, v = spikes.unflatten(2, (3, self.num_heads, -1)).transpose(-1, -2).unbind(2)  # [T, N, H, L, E]
        lif = self.attn_lif
        if fires_inside(lif):
            attended = spiking_attention(
                q, k, v,
                scale=self.scale, tau=lif.tau, v_threshold=lif.v_threshold, v_reset=lif.v_reset,
                detach_reset=lif.detach_reset, surrogate=lif.surrogate_function, backend=lif.backend,
            ).transpose(-1, -2)  # fmt: skip
        else:
            currents = spiking_attention(q, k, v, scale=self.scale, fire=None, backend=self.backend)
            attended = lif(currents.transpose(-1, -2))  # [T, N, H, E, L], so its potential has spikingjelly's shape
        return self.proj_lif(self.proj_conv_bn(attended.flatten(2, 3)))


def swap_attention(model: Model, *, stateful: bool = True, backend: Backend = "auto") -> Model:
    """Run the attention layers of a spikingjelly model on our operations, in place.

    Of each ``SpikingSelfAttention``, ``QKAttention`` (token and channel) and ``SpikeDrivenSelfAttention`` in ``model``,
    at any depth, the ``LIFNode``, ``IFNode`` and ``ParametricLIFNode`` become our neurons, and the products of
    ``SpikingSelfAttention`` become `spiking_attention`. Its convolutions, norms and parameters stay the same objects
    under the same names, so optimisers and ``state_dict`` files remain valid both ways; layouts and step modes stay,
    and spikes are the same bits in float32 and float64. (In 16 bits our potentials and sums are float32.) What was
    swapped is logged.

    A neuron stays spikingjelly's if it is of another class, has a hook, a precision of its own, a threshold not above
    its reset, or a surrogate that has no name here. A ``SpikingSelfAttention`` whose ``qkv_lif`` may give other values
    than 0 and 1 stays as a whole, and so do subclasses of yours.

    Args:
        model: A network, or such a layer itself.
        stateful: Whether a call goes on from the last potentials, as spikingjelly's neurons do until
            ``functional.reset_net``. (One difference: an input of another shape raises instead of starting anew.)
            False starts from rest at each call, and ``SpikingSelfAttention``'s products and neurons are then one
            operation, which keeps only q, k and v for the backward. The rest of the model still needs its reset.
        backend: As in `lif`.

    Returns:
        ``model``.

    Raises:
        ValueError: Nothing in ``model`` could be swapped.

    Example:
        >>> import torch
        >>> layer = swap_attention(attention.SpikingSelfAttention(8, num_heads=2))
        >>> type(layer).__name__, layer(torch.ones(4, 1, 8, 5)).shape
        ('FusedSelfAttention', torch.Size([4, 1, 8, 5]))
    """
    swapped: Counter[str] = Counter()
    stayed: list[str] = []
    counterparts: dict[nn.Module, nn.Module] = {}
    for path, layer in list(model.named_modules()):
        if type(layer) not in _LAYERS:
            continue
        kind = type(layer).__name__
        products = type(layer) is attention.SpikingSelfAttention
        if products and not _gives_spikes(layer.qkv_lif):
            stayed.append(f"{path or kind} (qkv_lif is {type(layer.qkv_lif).__name__}, not known to give 0 and 1)")
            continue
        neurons = 0
        for name, child in list(layer._modules.items()):  # named_children would leave out a second name of a neuron
            if not isinstance(child, neuron.BaseNode) or type(child) in (LIF, IF, ParametricLIF):
                continue
            if child in counterparts or _has_counterpart(child):
                if child not in counterparts:
                    counterparts[child] = _counterpart(child, stateful, backend)
                setattr(layer, name, counterparts[child])
                neurons += 1
            else:
                stayed.append(f"{path}.{name}".lstrip("."))
        if products:
            # The object stays, so whoever holds it or has hooked it goes on doing so, also where it is the model.
            layer.__class__ = FusedSelfAttention
            layer.backend = backend
        if products or neurons:
            swapped[kind] += 1
    if not swapped:
        layers = "SpikingSelfAttention, QKAttention or SpikeDrivenSelfAttention"
        why = f" Left as they are: {', '.join(stayed)}." if stayed else ""
        raise ValueError(
            f"swap_attention: model must hold a {layers} of spikingjelly's, not swapped yet, "
            f"got none in {type(model).__name__}.{why}"
        )
    logger.info("swap_attention: swapped %s", ", ".join(f"{count} {kind}" for kind, count in swapped.items()))
    if stayed:
        logger.log(logging.WARNING, "swap_attention: left to spikingjelly: %s", ", ".join(stayed))
    return model


def _gives_spikes(node: nn.Module) -> bool:
    """Whether a neuron is known to give 0 and 1 only; without ``spiking`` its surrogate gives what is between."""
    known = type(node) in (*_THEIRS, LIF, IF, ParametricLIF)
    return known and getattr(node.surrogate_function, "spiking", True)


def _has_counterpart(node: neuron.BaseNode) -> bool:
    """Whether one of our neurons is the same as ``node``."""
    if type(node) not in _THEIRS or is_watched(node) or node._neuron_precision is not None:
        return False
    rest = 0.0 if node.v_reset is None else node.v_reset
    fires_above_rest = rest < node.v_threshold and math.isfinite(node.v_threshold) and math.isfinite(rest)
    return fires_above_rest and isinstance(as_surrogate(node.surrogate_function), Surrogate)


def _counterpart(node: neuron.BaseNode, stateful: bool, backend: Backend) -> LIF | IF | ParametricLIF:
    """Our neuron with the settings, the parameter and the potential of ``node``."""
    options = {
        "v_threshold": node.v_threshold,
        "v_reset": node.v_reset,
        "surrogate_function": node.surrogate_function,
        "detach_reset": node.detach_reset,
        "step_mode": node.step_mode,
        "store_v_seq": node.store_v_seq,
        "stateful": stateful,
        "backend": backend,
    }
    ours: LIF | IF | ParametricLIF
    if type(node) is neuron.IFNode:
        ours = IF(**options)
    elif type(node) is neuron.LIFNode:
        ours = LIF(node.tau, node.decay_input, **options)
    else:
        ours = ParametricLIF(decay_input=node.decay_input, **options)
        ours.w = node.w
    ours.v = node.v
    return ours.train(node.training)
