"""Attention of queries and keys alone, which masks tokens or channels."""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spikeattn import _checks
from spikeattn._backends import Backend
from spikeattn.nn.alive import count_gain, design_rate
from spikeattn.nn.attention import HeadedAttention, count_tokens, merge_heads
from spikeattn.nn.projection import Init, Norm, SpikingOptions
from spikeattn.ops.lif.reference import state_dtype
from spikeattn.ops.surrogate import ATan


class QKAttention(HeadedAttention):
    """Attention without values: the queries say which tokens, or which channels, of the keys pass.

    ::

        Q, K = LIF(norm(Linear(x)))                   two projections
        A = LIF(scale * sum over channels of Q) * K   kind="token": each head passes or drops a token
        A = LIF(scale * sum over tokens of Q) * K     kind="channel": passes or drops a channel for all tokens
        out = LIF(norm(Linear(A)))

    Source: Zhou et al. 2024 (QKFormer, arXiv:2403.16552), Q-K token attention and Q-K channel attention, the sum over
    channels within a head as in the authors' code. Theirs are 1 x 1 convolutions with BatchNorm over pictures.

    Args:
        dim: Width D of a token.
        num_heads: Heads H; D is a multiple of it. With "channel" the same for any.
        kind: What is masked, "token" or "channel".
        scale: Multiplies the sums of spikes, once (dimensionless); the paper has none. A power of two keeps them exact.
        norm, tau, v_threshold, attn_v_threshold, v_reset, surrogate_function, detach_reset, init, backend, device,
            dtype: As in `SpikingSelfAttention`.

    Gradient:
        To ``x`` and the parameters, through the surrogate.

    Raises:
        ValueError: D is not a multiple of ``num_heads``; an option outside its choices; ``x`` or the mask of
            another shape.

    Example:
        >>> spikes = QKAttention(32, num_heads=4, kind="channel")(torch.randn(8, 2, 10, 32))
        >>> spikes.shape, sorted(spikes.unique().tolist())
        (torch.Size([8, 2, 10, 32]), [0.0, 1.0])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        kind: Literal["token", "channel"] = "token",
        scale: float = 1.0,
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
        _checks.check_choice("QKAttention", "kind", kind, ("token", "channel"))
        options = SpikingOptions(
            norm, tau, v_threshold, v_reset, surrogate_function, detach_reset, init, backend, device, dtype
        )
        super().__init__(dim, num_heads, options, attn_v_threshold, scale, {"q": dim, "k": dim})
        self.kind = kind

    def forward(
        self, x: Float[Tensor, "T B L D"], key_padding_mask: Bool[Tensor, "B L"] | None = None
    ) -> Float[Tensor, "T B L D"]:
        """Spikes [T, B, L, D] of any real ``x`` [T, B, L, D]; zero where ``key_padding_mask`` [B, L] is True."""
        self.check(x, key_padding_mask)
        q, k = self.project("qk", x, key_padding_mask)
        scale = self.scaled(lambda: self._gain(x, key_padding_mask))
        # Padding is silent, so it adds nothing. The sums are never 16-bit, which would round them.
        if self.kind == "token":
            counts = q.sum(-1, dtype=state_dtype(q)).transpose(2, 3)  # [T, B, L, H]
            passed = self.attn_lif(counts * scale).transpose(2, 3).unsqueeze(-1)
        else:
            counts = q.sum(3, dtype=state_dtype(q)).flatten(2)  # [T, B, D]
            passed = self.attn_lif(counts * scale).unflatten(-1, (self.num_heads, -1)).unsqueeze(3)
        return self.out(merge_heads(passed.to(k.dtype) * k), key_padding_mask)

    def _gain(self, x: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        """Gain of the alive start, [1, B or 1, 1], and an axis more where tokens pass."""
        tau = self.tau
        if self.kind == "token":
            expected = torch.full((1, 1, 1, 1), self.dim // self.num_heads * design_rate(tau), device=x.device)
        else:
            expected = count_tokens(x, key_padding_mask)[None, :, None].clamp_min(1) * design_rate(tau)
        return count_gain(expected, tau, at_threshold=0.5)

    def extra_repr(self) -> str:
        """Hyper-parameters, as printed in the module's repr."""
        return f"{super().extra_repr()}, kind={self.kind!r}"
