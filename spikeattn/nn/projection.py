"""Linear -> norm -> LIF, the unit of which spiking attention and its MLP are made, and its parts."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from spikeattn import _checks
from spikeattn._backends import Backend
from spikeattn.nn.alive import norm_gain
from spikeattn.nn.linear import EventLinear
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

    def linear(self, in_features: int, out_features: int) -> EventLinear:
        """A linear layer with these options; a backend that has no kernel for it leaves the choice open."""
        backend: Backend = "torch" if self.backend == "torch" else "auto"
        return EventLinear(in_features, out_features, device=self.device, dtype=self.dtype, backend=backend)

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


def _norm(features: int, options: SpikingOptions) -> nn.LayerNorm | TokenBatchNorm:
    """The norm that ``options`` name."""
    _checks.check_choice("SpikingLinear", "norm", options.norm, ("layer", "batch"))
    _checks.check_choice("SpikingLinear", "init", options.init, ("alive", "published"))
    norm = nn.LayerNorm if options.norm == "layer" else TokenBatchNorm
    return norm(features, device=options.device, dtype=options.dtype)


def _start(norm: nn.LayerNorm | TokenBatchNorm, lif: LIF, init: Init, linear: nn.Linear | None = None) -> None:
    """Set the parameters before ``lif`` to their start (`SpikingLinear`)."""
    alive = init == "alive"
    if linear is not None:
        nn.init.normal_(linear.weight, std=linear.in_features**-0.5 if alive else 0.02)
        nn.init.zeros_(linear.bias)
    norm.reset_parameters()
    if alive:
        v_rest = 0.0 if lif.v_reset is None else lif.v_reset
        nn.init.constant_(norm.weight, (lif.v_threshold - v_rest) * norm_gain(lif.tau))


class SpikingNorm(nn.Module):
    """Normalise and fire: ``LIF(norm(x))`` over all T time steps, with the gains of `SpikingLinear`.

    Args:
        features: Width of the input.
        options: What all layers of a model share.
    """

    def __init__(self, features: int, options: SpikingOptions) -> None:
        super().__init__()
        self.norm = _norm(features, options)
        self.lif = options.lif(options.v_threshold)
        self.init: Init = options.init
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the gain to its start."""
        _start(self.norm, self.lif, self.init)

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """Spikes [T, B, L, D] of ``x`` [T, B, L, D]; silent at padding."""
        if isinstance(self.norm, TokenBatchNorm):
            return self.lif(self.norm(x, key_padding_mask))
        # Through the module's call, not around it, so that hooks and monitors of the neuron see its spikes.
        return self.lif(x, self.norm, key_padding_mask)


class NormedLinear(nn.Module):
    """Project and normalise, ``norm(Linear(x))``: currents of ``lif``, which belongs to the caller.

    Args:
        in_features: Width of the input.
        out_features: Width of the output.
        options: What all layers of a model share.
        lif: The neurons that the currents drive; says how large the gain is to start.
    """

    def __init__(self, in_features: int, out_features: int, options: SpikingOptions, lif: LIF) -> None:
        super().__init__()
        self.linear = options.linear(in_features, out_features)
        self.norm = _norm(out_features, options)
        _start(self.norm, lif, options.init, self.linear)

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """Currents [T, B, L, out_features] of ``x`` [T, B, L, in_features]; zero at padding."""
        projected = self.linear(x)
        if isinstance(self.norm, TokenBatchNorm):
            return self.norm(projected, key_padding_mask)
        current = self.norm(projected)
        return current if key_padding_mask is None else current.masked_fill(key_padding_mask[None, :, :, None], 0.0)


class SpikingLinear(SpikingNorm):
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
        nn.Module.__init__(self)
        # Before the norm, as in the equation: parameters keep this order in every state and optimizer.
        self.linear = options.linear(in_features, out_features)
        self.norm = _norm(out_features, options)
        self.lif = options.lif(options.v_threshold)
        self.init = options.init
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set weights, biases and gains to their start (class docstring)."""
        _start(self.norm, self.lif, self.init, self.linear)

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """Spikes [T, B, L, out_features] of ``x`` [T, B, L, in_features]; silent at padding."""
        T = x.shape[0]
        # The same tensor at every step is projected once; a batch norm writes all steps out anyway.
        static = T > 1 and x.stride(0) == 0 and isinstance(self.norm, nn.LayerNorm)
        projected = self.linear(x[:1] if static else x)
        projected = projected.expand(T, *projected.shape[1:]) if static else projected
        return super().forward(projected, key_padding_mask)
