"""Spiking attention from one sequence to another."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spikeattn import _checks
from spikeattn._backends import Backend
from spikeattn.nn.alive import attention_gain
from spikeattn.nn.attention import HeadedAttention, attend_and_fire, count_tokens, merge_heads
from spikeattn.nn.projection import Init, Norm, SpikingOptions
from spikeattn.ops.spiking_attention.reference import Fire
from spikeattn.ops.surrogate import ATan


class SpikingCrossAttention(HeadedAttention):
    """Attention between spikes of two sequences: queries of one look at keys and values of the other.

    ::

        Q = LIF(norm(Linear(x)));  K, V = LIF(norm(Linear(memory)))
        A = LIF(scale * (Q K^T) V)                    fire="output"
        A = LIF(scale * Q K^T) V                      fire="map"
        out = LIF(norm(Linear(A)))

    Source: ours; the self-attention of Zhou et al. 2022 (Spikformer, arXiv:2209.15425) with keys and values of another
    sequence. The equation of the attention is in ``ops.spiking_attention``.

    Args:
        dim: Width D of a token of ``x``, and of the output.
        num_heads: Heads H; D is a multiple of it.
        kv_dim: Width Dk of a token of ``memory``; None is D.
        scale: Multiplies the sums of spikes, once (dimensionless). A power of two keeps them exact.
        fire: What fires, the output or the map.
        norm, tau, v_threshold, attn_v_threshold, v_reset, surrogate_function, detach_reset, init, backend, device,
            dtype: As in `SpikingSelfAttention`.

    Gradient:
        To ``x``, ``memory`` and the parameters, through the surrogate.

    Raises:
        ValueError: D is not a multiple of ``num_heads``; an option outside its choices; an input or a mask of another
            shape.
        TypeError: The inputs differ in dtype or device.

    Example:
        >>> attention = SpikingCrossAttention(32, num_heads=4, kv_dim=48)
        >>> text, audio = torch.randn(8, 2, 5, 32), torch.randn(8, 2, 20, 48)
        >>> attention(text, audio).shape
        torch.Size([8, 2, 5, 32])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        kv_dim: int | None = None,
        *,
        scale: float = 0.125,
        fire: Fire = "output",
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
        _checks.check_choice("SpikingCrossAttention", "fire", fire, ("output", "map"))
        options = SpikingOptions(
            norm, tau, v_threshold, v_reset, surrogate_function, detach_reset, init, backend, device, dtype
        )
        self.kv_dim = dim if kv_dim is None else kv_dim
        if self.kv_dim < 1:
            raise ValueError(f"SpikingCrossAttention: kv_dim must be at least 1, got {kv_dim}.")
        widths = {"q": dim, "k": self.kv_dim, "v": self.kv_dim}
        super().__init__(dim, num_heads, options, attn_v_threshold, scale, widths)
        self.fire: Fire = fire

    def forward(
        self,
        x: Float[Tensor, "T B L D"],
        memory: Float[Tensor, "T B S Dk"],
        query_padding_mask: Bool[Tensor, "B L"] | None = None,
        key_padding_mask: Bool[Tensor, "B S"] | None = None,
    ) -> Float[Tensor, "T B L D"]:
        """Attend.

        Args:
            x: What asks, spikes or currents [T, B, L, D].
            memory: What is looked at, spikes or currents [T, B, S, Dk].
            query_padding_mask: [B, L], True at padding of ``x``.
            key_padding_mask: [B, S], True at padding of ``memory``.

        Returns:
            Spikes [T, B, L, D]; zero at padding of ``x``, and elsewhere what unpadded inputs give.
        """
        name = type(self).__name__
        _checks.check_tokens(name, x, self.dim)
        _checks.check_tokens(name, memory, self.kv_dim, "memory", "[T, B, S, Dk]")
        _checks.check_memory(name, memory, x)
        (_, B, L, _), S = x.shape, memory.shape[2]
        _checks.check_padding_mask(name, query_padding_mask, B, L, "query_padding_mask")
        _checks.check_padding_mask(name, key_padding_mask, B, S)
        (q,) = self.project("q", x, query_padding_mask)
        k, v = self.project("kv", memory, key_padding_mask)
        attended = attend_and_fire(
            self.attn_lif, q, k, v,
            scale=self.scaled(lambda: self._gain(memory, key_padding_mask)), fire=self.fire,
            query_padding_mask=query_padding_mask, key_padding_mask=key_padding_mask,
        )  # fmt: skip
        return self.out(merge_heads(attended), query_padding_mask)

    def _gain(self, memory: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        """Gain of the alive start, [1, B or 1, 1, 1, 1]."""
        keys = count_tokens(memory, key_padding_mask)
        return attention_gain(keys, self.dim // self.num_heads, self.tau, self.fire)[None, :, None, None, None]

    def extra_repr(self) -> str:
        """Hyper-parameters, as printed in the module's repr."""
        return f"{super().extra_repr()}, kv_dim={self.kv_dim}, fire={self.fire!r}"
