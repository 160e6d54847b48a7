"""Attention between spikes and projections of the same spikes, scaled by firing rates."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from spikeattn import _checks
from spikeattn._backends import Backend
from spikeattn.nn.alive import design_rate
from spikeattn.nn.attention import attend_and_fire, count_tokens, merge_heads, split_heads
from spikeattn.nn.projection import Init, Norm, NormedLinear, SpikingLinear, SpikingNorm, SpikingOptions
from spikeattn.ops.surrogate import ATan

MOMENTUM = 0.999  # of the running firing rates, as published
# A rate below this counts as this, so that a layer that never fired gives no infinite scale.
_LEAST_RATE = 1e-4


class DualSpikeSelfAttention(nn.Module):
    """Self-attention in which spikes meet currents made of them, with scales that follow the firing rates.

    ::

        X = LIF(norm(x))                              spikes
        Y, Z = norm(Linear(X))                        currents, two projections
        A = LIF(s1 * X Y^T)          s1 = 1 / sqrt(f_X E)         f_X: firing rate of X, of a head
        M = LIF(s2 * A Z)            s2 = 1 / sqrt(f_A L)         f_A: firing rate of A; L tokens without padding
        out = LIF(norm(Linear(M)))

    Each product is of spikes and currents, so it needs additions only. With Y and Z of variance 1 the scaled products
    have variance 1 (times the square of the norms' gain). f_X and f_A are running means with momentum 0.999; a training
    step updates them before it uses them, and the first one sets them.

    Source: Shi et al. 2024 (SpikingResformer, arXiv:2403.14302), DSSA and its scaling factors, as in the authors' code;
    their convolution of size and stride p is a Linear here, p = 1. They fire on the residual stream without a norm,
    give a current to a membrane shortcut where ``out`` fires here, and divide by an L that is fixed.

    Args:
        dim: Width D of a token.
        num_heads: Heads H; D is a multiple of it.
        norm, tau, v_threshold, v_reset, surrogate_function, detach_reset, init, backend, device, dtype: As in
            `SpikingSelfAttention`. With ``init="alive"`` the norms of Y and Z, too, start with the gain at which the
            neurons behind them fire.
        attn_v_threshold: Threshold of the map's neurons.

    State:
        ``firing_rate_x``, ``firing_rate_map`` [H], spikes a neuron and time step without padding; ``batches``, how many
        training steps they have seen. Buffers, in ``state_dict``. Before the first step the rates are those that the
        alive start is designed for.

    Gradient:
        To ``x`` and the parameters, through the surrogate; none through the scales.

    Numerics:
        Y and Z are real, so their sums are rounded: padding, a batch or another order of summation may change a last
        bit, and flip a spike at a tie.

    Raises:
        ValueError: D is not a multiple of ``num_heads``; an option outside its choices; ``x`` or the mask of
            another shape.

    Example:
        >>> spikes = DualSpikeSelfAttention(32, num_heads=4)(torch.randn(8, 2, 10, 32))
        >>> spikes.shape, sorted(spikes.unique().tolist())
        (torch.Size([8, 2, 10, 32]), [0.0, 1.0])
    """

    firing_rate_x: Tensor
    firing_rate_map: Tensor
    batches: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        norm: Norm = "layer",
        tau: float = 2.0,
        v_threshold: float = 1.0,
        attn_v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function: Callable[[Tensor], Tensor] = ATan(2.0),
        detach_reset: bool = True,
        init: Init = "alive",
        backend: Backend = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _checks.check_heads("DualSpikeSelfAttention", dim, num_heads)
        options = SpikingOptions(
            norm, tau, v_threshold, v_reset, surrogate_function, detach_reset, init, backend, device, dtype
        )
        self.dim, self.num_heads, self.init = dim, num_heads, init
        self.x = SpikingNorm(dim, options)
        self.attn_lif, self.mix_lif = options.lif(attn_v_threshold), options.lif(v_threshold)
        self.y = NormedLinear(dim, dim, options, self.attn_lif)
        self.z = NormedLinear(dim, dim, options, self.mix_lif)
        self.out = SpikingLinear(dim, dim, options)
        for name in ("firing_rate_x", "firing_rate_map"):
            self.register_buffer(name, torch.full((num_heads,), design_rate(tau), device=device))
        self.register_buffer("batches", torch.zeros((), dtype=torch.long, device=device))

    def forward(
        self, x: Float[Tensor, "T B L D"], key_padding_mask: Bool[Tensor, "B L"] | None = None
    ) -> Float[Tensor, "T B L D"]:
        """Spikes [T, B, L, D] of any real ``x`` [T, B, L, D]; zero where ``key_padding_mask`` [B, L] is True."""
        _checks.check_tokens("DualSpikeSelfAttention", x, self.dim)
        _checks.check_padding_mask("DualSpikeSelfAttention", key_padding_mask, *x.shape[1:3])
        T, B = x.shape[:2]
        spikes = self.x(x, key_padding_mask)
        y, z = (split_heads(part(spikes, key_padding_mask), self.num_heads) for part in (self.y, self.z))
        spikes = split_heads(spikes, self.num_heads).to(y.dtype)  # [T, B, H, L, E]
        E, L = spikes.shape[-1], count_tokens(x, key_padding_mask).expand(B)
        self._follow(self.firing_rate_x, spikes, T * E * L.sum())
        scale = (self.firing_rate_x.clamp_min(_LEAST_RATE) * E).rsqrt()
        if self.training:
            # A channel of ones beside Z counts, in the same product, the spikes of each row of the map.
            spikes, y = (nn.functional.pad(part, (0, 1)) for part in (spikes, y))
            z = nn.functional.pad(z.to(y.dtype), (0, 1), value=1.0)
        attended = attend_and_fire(
            self.attn_lif, spikes, y, z.to(y.dtype), fire="map", scale=scale[:, None, None],
            query_padding_mask=key_padding_mask, key_padding_mask=key_padding_mask,
        )  # fmt: skip
        self._follow(self.firing_rate_map, attended[..., E:], T * L.square().sum())
        scale = (self.firing_rate_map.clamp_min(_LEAST_RATE) * L.clamp_min(1)[:, None]).rsqrt()  # [B, H]
        mixed = self.mix_lif(merge_heads(attended[..., :E] * scale[:, :, None, None]))
        if self.training:
            self.batches.add_(L.sum() > 0)  # a batch of padding alone says nothing
        return self.out(mixed.to(x.dtype), key_padding_mask)

    @torch.no_grad()
    def _follow(self, running: Tensor, spikes: Tensor, places: Tensor) -> None:
        """Move the ``running`` rate of each head towards that of ``spikes`` [T, B, H, L, any]; in training only."""
        if self.training:
            rate = spikes.sum((0, 1, 3, 4), dtype=running.dtype) / places.clamp_min(1)
            kept = torch.where(self.batches == 0, 0.0, MOMENTUM)
            followed = kept * running + (1 - kept) * rate
            running.copy_(torch.where((places > 0) & followed.isfinite(), followed, running))

    def extra_repr(self) -> str:
        """Hyper-parameters, as printed in the module's repr."""
        return f"{self.dim}, num_heads={self.num_heads}, init={self.init!r}"
