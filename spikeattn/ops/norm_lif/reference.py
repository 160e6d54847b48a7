"""The definition of `norm_lif`, with sums in a fixed order so that every backend has the same bits."""

from collections.abc import Callable

import torch
from torch import Tensor

from spikeattn.ops.lif.reference import lif_backward_reference, lif_reference, state_dtype
from spikeattn.ops.surrogate import Surrogate

# Partial sums of a row: element i goes to sum i modulo this, which a warp holds as 32 lanes of 4.
PARTIAL_SUMS = 128


def ordered_sum(x: Tensor) -> Tensor:
    """Sum over the last axis, [..., D] to [..., 1], in the order that kernels use.

    Element i is added to partial sum ``i % 128``, in rising order of i; then partial sums j and j + 64 are added, then
    j and j + 32, and so on down to j and j + 1. Missing elements count as zero.
    """
    D = x.shape[-1]
    x = torch.nn.functional.pad(x, (0, -D % PARTIAL_SUMS))
    first, *rest = x.split(PARTIAL_SUMS, dim=-1)
    total = first
    for part in rest:
        total = total + part
    width = PARTIAL_SUMS
    while width > 1:
        width //= 2
        total = total[..., :width] + total[..., width:]
    return total


def layer_norm_statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``(mean, rstd)`` [..., 1] of the last axis, ``rstd = 1 / sqrt(variance + eps)``, biased variance."""
    D = x.shape[-1]
    mean = ordered_sum(x) / D
    centred = x - mean
    variance = ordered_sum(centred * centred) / D
    # PyTorch's float32 square root is off by one unit for some numbers on some CPUs; by way of float64 it is exact.
    return mean, 1 / (variance + eps).double().sqrt().to(x.dtype)


def normalise(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, padding_mask: Tensor | None
) -> Tensor:
    """``(x - mean) * rstd * weight + bias``, from left to right; zero at padding."""
    current = (x - mean) * rstd * weight.to(x.dtype) + bias.to(x.dtype)
    return current if padding_mask is None else current.masked_fill(padding_mask.unsqueeze(-1), 0.0)


def norm_lif_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    padding_mask: Tensor | None,
    v0: Tensor,
    time_steps: int,
    eps: float,
    tau: float,
    decay_input: bool,
    v_threshold: float,
    v_reset: float | None,
    detach_reset: bool,
    surrogate: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ``(spikes [T, *N, D], v [*N, D], mean, rstd)``, differentiable; T = ``time_steps``.

    ``x`` is [T, *N, D], or [1, *N, D] for the same at every step; ``mean`` and ``rstd`` are [T or 1, *N, 1].
    """
    own = x.to(state_dtype(x))
    mean, rstd = layer_norm_statistics(own, eps)
    current = normalise(own, mean, rstd, weight, bias, padding_mask)
    settings = (time_steps, tau, decay_input, v_threshold, v_reset, detach_reset, surrogate)
    spikes, v, _ = lif_reference(current, v0, None, *settings)
    return spikes.to(x.dtype), v, mean, rstd


def norm_lif_backward_reference(
    grad_spikes: Tensor,
    grad_v: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    padding_mask: Tensor | None,
    v0: Tensor,
    mean: Tensor,
    rstd: Tensor,
    time_steps: int,
    tau: float,
    decay_input: bool,
    v_threshold: float,
    v_reset: float | None,
    detach_reset: bool,
    surrogate: Surrogate,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ``(grad_x, grad_weight [D], grad_bias [D], grad_v0)``; currents are computed again from ``x``.

    With n = (x - mean) * rstd and g the gradient of the current, means over the last axis:
    ``grad_x = rstd * (g w - mean(g w) - n mean(g w n))``.
    """
    own = x.to(state_dtype(x))
    current = normalise(own, mean, rstd, weight, bias, padding_mask)
    settings = (time_steps, tau, decay_input, v_threshold, v_reset, detach_reset, surrogate)
    grad, grad_v0, _ = lif_backward_reference(grad_spikes, grad_v, None, current, v0, None, *settings)
    if padding_mask is not None:  # also in what follows: at padding may lie what is no number
        padding = padding_mask.unsqueeze(-1)
        grad, own, mean, rstd = (part.masked_fill(padding, 0.0) for part in (grad, own, mean, rstd))
    normal = (own - mean) * rstd
    scaled = grad * weight.to(grad.dtype)
    grad_x = rstd * (scaled - scaled.mean(-1, keepdim=True) - normal * (scaled * normal).mean(-1, keepdim=True))
    rows = tuple(range(x.ndim - 1))
    grad_weight, grad_bias = (grad * normal).sum(rows), grad.sum(rows)
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype), grad_bias.to(bias.dtype), grad_v0
