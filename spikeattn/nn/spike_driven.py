"""Spike-driven self-attention, of masks and additions."""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spikeattn import _checks
from spikeattn._backends import Backend
from spikeattn.nn.alive import attention_gain, count_gain, design_rate
from spikeattn.nn.attention import HeadedAttention, attend_and_fire, count_tokens, merge_heads
from spikeattn.nn.projection import Init, Norm, SpikingOptions
from spikeattn.ops.lif.reference import state_dtype
from spikeattn.ops.surrogate import ATan


class SpikeDrivenSelfAttention(HeadedAttention):
    """Self-attention of the spike-driven transformers: additions and masks, linear in the number of tokens.

    ::

        Q, K, V = LIF(norm(Linear(x)))                three projections
        A = Q * LIF(scale * sum over tokens of K * V)           version=1, per channel
        A = LIF(scale * Q (K^T V))                              version=3, per head
        out = LIF(norm(Linear(A)))

    Source: Yao et al. 2023 (Spike-driven Transformer, arXiv:2307.01694), SDSA, with Q and V in the places that the
    authors' code gives them; Yao et al. 2024 (its V2, arXiv:2404.03663), SDSA-3. Theirs are convolutions over pictures
    with BatchNorm, between membrane shortcuts: they fire before a projection, and ``out`` is a current. Here tokens are
    projected by Linear and ``out`` fires, as in `SpikingSelfAttention`, so any block can add it. What version 3 gives
    is then `SpikingSelfAttention` with ``fire="output"``; one name for each paper.

    Args:
        dim: Width D of a token.
        num_heads: Heads H; D is a multiple of it. Version 1 gives the same for any.
        version: 1 or 3, the equation above.
        scale: Multiplies the sums of spikes, once (dimensionless); None is the papers', 1 in version 1 and 0.125 in
            version 3. A power of two keeps them exact.
        norm, tau, v_threshold, attn_v_threshold, v_reset, surrogate_function, detach_reset, init, backend, device,
            dtype: As in `SpikingSelfAttention`.

    Gradient:
        To ``x`` and the parameters, through the surrogate.

    Raises:
        ValueError: D is not a multiple of ``num_heads``; an option outside its choices; ``x`` or the mask of
            another shape.

    Example:
        >>> spikes = SpikeDrivenSelfAttention(32, num_heads=4, version=1)(torch.randn(8, 2, 10, 32))
        >>> spikes.shape, sorted(spikes.unique().tolist())
        (torch.Size([8, 2, 10, 32]), [0.0, 1.0])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        version: Literal[1, 3] = 3,
        scale: float | None = None,
        norm: Norm = "layer",
        tau: float = 2.0,
        v_threshold: float = 1.0,
        attn_v_threshold: float = 0.5,
        v_reset: float | None = 0.0,
        surrogate_function: Callable[[Tensor], Tensor] = ATan(2.0),
        detach_reset: bool = True,
        init: Init = "alive",
        backend: Backend = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _checks.check_choice("SpikeDrivenSelfAttention", "version", version, (1, 3))
        options = SpikingOptions(
            norm, tau, v_threshold, v_reset, surrogate_function, detach_reset, init, backend, device, dtype
        )
        scale = {1: 1.0, 3: 0.125}[version] if scale is None else scale
        super().__init__(dim, num_heads, options, attn_v_threshold, scale, {"q": dim, "k": dim, "v": dim})
        self.version = version

    def forward(
        self, x: Float[Tensor, "T B L D"], key_padding_mask: Bool[Tensor, "B L"] | None = None
    ) -> Float[Tensor, "T B L D"]:
        """Spikes [T, B, L, D] of any real ``x`` [T, B, L, D]; zero where ``key_padding_mask`` [B, L] is True."""
        self.check(x, key_padding_mask)
        q, k, v = self.project("qkv", x, key_padding_mask)
        scale = self.scaled(lambda: self._gain(x, key_padding_mask))
        if self.version == 3:
            attended = attend_and_fire(
                self.attn_lif, q, k, v, fire="output", scale=scale,
                query_padding_mask=key_padding_mask, key_padding_mask=key_padding_mask,
            )  # fmt: skip
        else:
            # Padding is silent, so it adds nothing. The sum is never 16-bit, which would round it.
            counts = (k * v).sum(3, dtype=state_dtype(k)).flatten(2)  # [T, B, D]
            passed = self.attn_lif(counts * scale).to(q.dtype).unflatten(-1, (self.num_heads, -1))
            attended = q * passed.unsqueeze(3)
        return self.out(merge_heads(attended), key_padding_mask)

    def _gain(self, x: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        """Gain of the alive start, [1, B or 1, 1, ...], an axis for each of what the neurons are given."""
        keys, tau = count_tokens(x, key_padding_mask), self.tau
        if self.version == 3:
            return attention_gain(keys, self.dim // self.num_heads, tau, "output")[None, :, None, None, None]
        return count_gain(keys.clamp_min(1) * design_rate(tau) ** 2, tau, at_threshold=0.5)[None, :, None]

    def extra_repr(self) -> str:
        """Hyper-parameters, as printed in the module's repr."""
        return f"{super().extra_repr()}, version={self.version}"
