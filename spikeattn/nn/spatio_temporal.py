"""Spiking attention over tokens and time steps together."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spikeattn import _checks
from spikeattn._backends import Backend
from spikeattn.nn.alive import attention_gain
from spikeattn.nn.attention import HeadedAttention, attention_current, count_tokens, merge_heads
from spikeattn.nn.projection import Init, Norm, SpikingOptions
from spikeattn.ops.surrogate import ATan


class SpatioTemporalAttention(HeadedAttention):
    """Self-attention in which a token sees all tokens of all time steps of its chunk of time.

    ::

        Q, K, V = LIF(norm(Linear(x)))                three projections
        C = scale * Q (K^T V)                         among the chunk * L tokens of each chunk of time steps
        A = LIF(C)                                    over all T time steps
        out = LIF(norm(Linear(A)))

    A time step sees later steps of its chunk, so the module is not causal in time.

    Source: Lee et al. 2025 (STAtten, arXiv:2409.19764). Theirs are convolutions with BatchNorm over pictures, and their
    scale is 1 over the height of the feature map (on event data, 1 over chunk * L); here it is a number, by default
    Spikformer's. Their T that is no multiple of the chunk ends in an error of shapes, ours in one that says so.

    Args:
        dim: Width D of a token.
        num_heads: Heads H; D is a multiple of it.
        chunk: Time steps that are attended together; T is a multiple of it. With 1 this is `SpikingSelfAttention`.
        scale: Multiplies the sums of spikes, once (dimensionless). A power of two keeps them exact.
        norm, tau, v_threshold, attn_v_threshold, v_reset, surrogate_function, detach_reset, init, backend, device,
            dtype: As in `SpikingSelfAttention`.

    Gradient:
        To ``x`` and the parameters, through the surrogate.

    Raises:
        ValueError: T is not a multiple of ``chunk``, or D of ``num_heads``; an option outside its choices; ``x`` or
            the mask of another shape.

    Example:
        >>> spikes = SpatioTemporalAttention(32, num_heads=4, chunk=4)(torch.randn(8, 2, 10, 32))
        >>> spikes.shape, sorted(spikes.unique().tolist())
        (torch.Size([8, 2, 10, 32]), [0.0, 1.0])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        chunk: int = 2,
        scale: float = 0.125,
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
        _checks.check_chunk("SpatioTemporalAttention", chunk)
        options = SpikingOptions(
            norm, tau, v_threshold, v_reset, surrogate_function, detach_reset, init, backend, device, dtype
        )
        super().__init__(dim, num_heads, options, attn_v_threshold, scale, {"q": dim, "k": dim, "v": dim})
        self.chunk = chunk

    def forward(
        self, x: Float[Tensor, "T B L D"], key_padding_mask: Bool[Tensor, "B L"] | None = None
    ) -> Float[Tensor, "T B L D"]:
        """Spikes [T, B, L, D] of any real ``x`` [T, B, L, D]; zero where ``key_padding_mask`` [B, L] is True."""
        self.check(x, key_padding_mask)
        _checks.check_chunk("SpatioTemporalAttention", self.chunk, x.shape[0])
        q, k, v = (self._to_chunks(spikes) for spikes in self.project("qkv", x, key_padding_mask))
        mask = None if key_padding_mask is None else key_padding_mask.repeat(1, self.chunk)
        scale = self.scaled(lambda: self._gain(x, key_padding_mask))
        current = attention_current(self.attn_lif, q, k, v, scale, mask, mask)
        spikes = self.attn_lif(merge_heads(self._from_chunks(current)))
        return self.out(spikes.to(x.dtype), key_padding_mask)

    def _to_chunks(self, spikes: Tensor) -> Tensor:
        """[T / chunk, B, H, chunk * L, E] of [T, B, H, L, E]."""
        return spikes.unflatten(0, (-1, self.chunk)).permute(0, 2, 3, 1, 4, 5).flatten(3, 4)

    def _from_chunks(self, current: Tensor) -> Tensor:
        """[T, B, H, L, E] of [T / chunk, B, H, chunk * L, E]."""
        return current.unflatten(3, (self.chunk, -1)).permute(0, 3, 1, 2, 4, 5).flatten(0, 1)

    def _gain(self, x: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        """Gain of the alive start, [1, B or 1, 1, 1, 1]."""
        keys = self.chunk * count_tokens(x, key_padding_mask)
        gain = attention_gain(keys, self.dim // self.num_heads, self.tau, "output")
        return gain[None, :, None, None, None]

    def extra_repr(self) -> str:
        """Hyper-parameters, as printed in the module's repr."""
        return f"{super().extra_repr()}, chunk={self.chunk}"
