"""Linear -> norm -> LIF, the unit of which spiking attention and its MLP are made."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from spikeattn import _checks
from spikeattn._backends import Backend
from spikeattn.nn.alive import norm_gain
from spikeattn.nn.neuron import LIF

Norm = Literal["layer", "batch"]
Init = Literal["alive", "published"]


class SpikingOptions(NamedTuple):
    """The options that every spiking layer of a transformer shares; meanings in `SpikingSelfAttention`."""

    norm: Norm
    tau: float
    v_threshold: float
    v_reset: float | None
    surrogate_function: Callable[[Tensor], Tensor]
    detach_reset: bool
    init: Init
    backend: Backend
    device: torch.device | str | None
    dtype: torch.dtype | None

    def lif(self, v_threshold: float) -> LIF:
        """A multi-step LIF layer with these options."""
        return LIF(
            self.tau,
            v_threshold=v_threshold,
            v_reset=self.v_reset,
            surrogate_function=self.surrogate_function,
            detach_reset=self.detach_reset,
            backend=self.backend,
        )


class TokenBatchNorm(nn.BatchNorm1d):
    """BatchNorm over the T, B and L axes of ``[T, B, L, D]`` whose statistics see no padding.

    Args and state of ``torch.nn.BatchNorm1d``. Padded tokens come out as zero.
    """

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """Normalise ``x`` [T, B, L, D]; ``key_padding_mask`` [B, L], True at padding."""
        if key_padding_mask is None:
            return super().forward(x.reshape(-1, x.shape[-1])).view(x.shape)
        valid = ~key_padding_mask
        out = x.new_zeros(x.shape)
        tokens = x[:, valid]  # [T, tokens, D]
        out[:, valid] = super().forward(tokens.flatten(0, 1)).view(tokens.shape).to(out.dtype)
        return out


class SpikingLinear(nn.Module):
    """Project, normalise and fire: ``LIF(norm(Linear(x)))`` over all T time steps.

    With ``init="alive"`` the norm's gain starts at ``(v_threshold - v_rest) * sqrt(2 tau - 1)``: white noise of
    that standard deviation drives a LIF membrane without reset to a standard deviation of one threshold, so that
    neurons fire from the first step of training (``docs/alive-start.md``). Linear weights start at variance
    1 / in_features and biases at zero. With ``init="published"`` weights are normal with standard deviation 0.02
    and the norm's gain is 1, as in SpikEmo's code.

    Args:
        in_features: Width of the input.
        out_features: Width of the output.
        options: What all layers of a model share.
    """

    def __init__(self, in_features: int, out_features: int, options: SpikingOptions) -> None:
        super().__init__()
        _checks.check_choice("SpikingLinear", "norm", options.norm, ("layer", "batch"))
        _checks.check_choice("SpikingLinear", "init", options.init, ("alive", "published"))
        device, dtype = options.device, options.dtype
        self.linear = nn.Linear(in_features, out_features, device=device, dtype=dtype)
        norm = nn.LayerNorm if options.norm == "layer" else TokenBatchNorm
        self.norm = norm(out_features, device=device, dtype=dtype)
        self.lif = options.lif(options.v_threshold)
        self.init = options.init
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set weights, biases and gains to their start (class docstring)."""
        alive = self.init == "alive"
        v_rest = 0.0 if self.lif.v_reset is None else self.lif.v_reset
        nn.init.normal_(self.linear.weight, std=self.linear.in_features**-0.5 if alive else 0.02)
        nn.init.zeros_(self.linear.bias)
        self.norm.reset_parameters()
        if alive:
            nn.init.constant_(self.norm.weight, (self.lif.v_threshold - v_rest) * norm_gain(self.lif.tau))

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """Spikes [T, B, L, out_features] of ``x`` [T, B, L, in_features]; silent at padding."""
        if isinstance(self.norm, TokenBatchNorm):
            current = self.norm(self.linear(x), key_padding_mask)
            if key_padding_mask is not None:
                current = current.masked_fill(key_padding_mask[None, :, :, None], 0.0)
            return self.lif(current)
        T = x.shape[0]
        static = T > 1 and x.stride(0) == 0  # the same tensor at every step: project it once
        projected = self.linear(x[:1] if static else x)
        projected = projected.expand(T, *projected.shape[1:]) if static else projected
        # Through the module's call, not around it, so that hooks and monitors of the neuron see its spikes.
        return self.lif(projected, self.norm, key_padding_mask)
