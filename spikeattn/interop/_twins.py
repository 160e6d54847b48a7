"""What spikingjelly would have run in the place of a call of ours, for its counters: on a CPU, with the same inputs."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Protocol

import torch
from spikingjelly.activation_based import functional, surrogate
from torch import Tensor

from spikeattn.ops.event_linear.op import unpacked
from spikeattn.ops.lif.op import or_zero
from spikeattn.ops.spiking_attention.reference import product
from spikeattn.ops.surrogate import surrogate_of


class Twin(Protocol):
    """A call of ours, by the names of its arguments, made to run as spikingjelly's operations."""

    passed_over: Tensor | None  # a tensor whose operations are not counted

    def inputs(self) -> list[Tensor]:
        """What a gradient is asked for."""

    def run(self) -> tuple[Tensor | None, ...]:
        """The outputs."""

    def grads(self) -> tuple[Tensor | None, ...]:
        """Their gradients, in a backward."""


class NeuronTwin:
    """spikingjelly's neuron, after LayerNorm if the call has one."""

    def __init__(self, call: SimpleNamespace) -> None:
        self.call = call
        x = _leaf(call.x)
        self.x = x.detach().expand(call.time_steps, *x.shape[1:]).requires_grad_(x.requires_grad)
        self.weight, self.bias = _leaf_of(call, "weight"), _leaf_of(call, "bias")
        self.v0 = _leaf_of(call, "v0")
        if self.v0 is not None:
            self.v0 = self.v0.to(call.x.dtype)  # spikingjelly's potential has the dtype of its input
        r_tau = _leaf_of(call, "r_tau")
        self.w = None if r_tau is None else torch.logit(r_tau.detach()).requires_grad_(r_tau.requires_grad)
        self.passed_over: Tensor | None = self.w

    def inputs(self) -> list[Tensor]:
        """What a gradient is asked for."""
        tensors = (self.x, self.weight, self.bias, self.v0, self.w)
        return [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]

    def run(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """``(spikes, v, v_seq)``."""
        call, x, v = self.call, self.x, self.v0
        if self.weight is not None:
            x = torch.nn.functional.layer_norm(x, x.shape[-1:], self.weight, self.bias, getattr(call, "eps", 1e-5))
            if call.padding_mask is not None:
                x = x.masked_fill(call.padding_mask.cpu().unsqueeze(-1), 0.0)
        if v is None:
            v = _rest(x, call)
        reset = (call.v_threshold, call.v_reset)
        fire = (_spikingjelly_surrogate(call.surrogate, call.alpha), call.detach_reset)
        keep = getattr(call, "return_v_seq", getattr(call, "grad_v_seq", None) is not None)
        if self.w is not None:
            return functional.plif_multi_step(x, v, self.w, call.decay_input, *reset, *fire, keep)
        if math.isinf(call.tau) and not call.decay_input:
            return functional.if_multi_step(x, v, *reset, *fire, keep)
        return functional.lif_multi_step(x, v, call.tau, call.decay_input, *reset, *fire, keep)

    def grads(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Gradients of ``(spikes, v, v_seq)``."""
        call = self.call
        return call.grad_spikes, or_zero(call.grad_v, call.x), getattr(call, "grad_v_seq", None)


class AttentionTwin:
    """Products by matmul, in the order that the call takes, and spikingjelly's neuron."""

    passed_over: Tensor | None = None

    def __init__(self, call: SimpleNamespace) -> None:
        self.call = call
        self.q, self.k, self.v = _leaf(call.q), _leaf(call.k), _leaf(call.v)
        masks = (call.query_padding_mask, call.key_padding_mask, call.key_padding_mask)
        self.masks = [None if mask is None else mask.cpu()[:, None, :, None] for mask in masks]
        # One number is a number in spikingjelly, not a tensor to be read.
        scale = call.scale
        self.scale = scale.item() if scale.numel() == 1 else scale.cpu().to(self.q.dtype)

    def inputs(self) -> list[Tensor]:
        """What a gradient is asked for."""
        return [x for x in (self.q, self.k, self.v) if x.requires_grad]

    def run(self) -> tuple[Tensor]:
        """The output, [T, B, L, H, E] in memory as the call's, so that merging the heads is counted once."""
        call = self.call
        q, k, v = (
            x if mask is None else x.masked_fill(mask, 0.0)
            for x, mask in zip((self.q, self.k, self.v), self.masks, strict=True)
        )
        if call.fire == "map":
            counts = q @ k.transpose(-1, -2)
            out = self._fire((counts.tril() if call.is_causal else counts) * self.scale) @ v
        else:
            out = product(q, k, v, call.order, call.is_causal) * self.scale
            out = out if call.fire is None else self._fire(out)
        return (out.transpose(2, 3).contiguous().transpose(2, 3),)

    def _fire(self, current: Tensor) -> Tensor:
        call = self.call
        neuron = (call.tau, True, call.v_threshold, call.v_reset)
        fire = _spikingjelly_surrogate(call.surrogate, call.alpha)
        return functional.lif_multi_step(current, _rest(current, call), *neuron, fire, call.detach_reset, False)[0]

    def grads(self) -> tuple[Tensor]:
        """Gradient of the output."""
        return (self.call.grad,)


class LinearTwin:
    """``torch.nn.functional.linear``."""

    passed_over: Tensor | None = None

    def __init__(self, call: SimpleNamespace) -> None:
        self.call = call
        weight = call.weight
        forward = hasattr(call, "bias")
        x = unpacked(call.fired, weight.shape[1]) if call.x is None else call.x
        self.x = x.detach().requires_grad_(not forward and call.needs_x)
        self.weight = weight.detach().requires_grad_(not forward and call.needs_weight)
        self.bias = call.bias if forward else None

    def inputs(self) -> list[Tensor]:
        """What a gradient is asked for."""
        return [x for x in (self.x, self.weight) if x.requires_grad]

    def run(self) -> tuple[Tensor]:
        """The output."""
        return (torch.nn.functional.linear(self.x, self.weight, self.bias),)

    def grads(self) -> tuple[Tensor]:
        """Its gradient."""
        return (self.call.grad,)


def _leaf(tensor: Tensor) -> Tensor:
    """The same values on a CPU, cut off from the graph, wanting a gradient if the tensor does."""
    return tensor.detach().cpu().requires_grad_(tensor.requires_grad)


def _leaf_of(call: SimpleNamespace, name: str) -> Tensor | None:
    """`_leaf` of an argument that a call may lack."""
    tensor = getattr(call, name, None)
    return None if tensor is None else _leaf(tensor)


def _rest(current: Tensor, call: SimpleNamespace) -> Tensor:
    """The potential from which spikingjelly starts."""
    return torch.full_like(current[0], 0.0 if call.v_reset is None else call.v_reset, requires_grad=False)


def _spikingjelly_surrogate(name: str, alpha: float) -> Callable[[Tensor], Tensor]:
    """spikingjelly's surrogate of that name; ours if it has none."""
    ours = surrogate_of(name, alpha)
    cls = getattr(surrogate, type(ours).__name__, None)
    if cls is None:
        return ours
    theirs = cls(alpha)
    # Rect alone has no name in spikingjelly's operations and would be called as a module, which a counter's
    # hooks on modules would take for a part of the network.
    return theirs.forward if name == "rect" else theirs
