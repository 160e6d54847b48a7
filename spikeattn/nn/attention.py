"""Spiking self-attention as a module."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from spikeattn import _checks
from spikeattn._backends import Backend
from spikeattn._recycled import converted
from spikeattn.nn.alive import attention_gain
from spikeattn.nn.neuron import LIF, fires_inside
from spikeattn.nn.projection import Init, Norm, NormedLinear, SpikingLinear, SpikingOptions, TokenBatchNorm
from spikeattn.ops.lif.reference import is_static, state_dtype
from spikeattn.ops.spiking_attention import AttentionState, spiking_attention, spiking_attention_step
from spikeattn.ops.spiking_attention.op import attend_by_map
from spikeattn.ops.spiking_attention.reference import Fire
from spikeattn.ops.surrogate import ATan


class StreamState(NamedTuple):
    """What a causal module keeps between two calls of ``step``: attention's state, and tokens so far [B or 1]."""

    attention: AttentionState
    tokens: Tensor


def attend_and_fire(
    neuron: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    fire: Fire,
    scale: float | Tensor,
    query_padding_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """`spiking_attention` with the settings of ``neuron``, [T, B, H, L, E].

    Where somebody looks at ``neuron`` (a hook, a monitor, ``store_v_seq``), or it is another than this package puts
    there, it is called itself, with its currents in memory: the same bits.
    """
    if fires_inside(neuron):
        return spiking_attention(
            q, k, v, fire=fire, scale=scale, is_causal=is_causal,
            query_padding_mask=query_padding_mask, key_padding_mask=key_padding_mask,
            tau=neuron.tau, v_threshold=neuron.v_threshold, v_reset=neuron.v_reset, detach_reset=neuron.detach_reset,
            surrogate=neuron.surrogate_function, backend=neuron.backend,
        )  # fmt: skip
    if fire == "map":
        return attend_by_map(neuron, q, k, v, scale, query_padding_mask, key_padding_mask, is_causal)
    current = attention_current(neuron, q, k, v, scale, query_padding_mask, key_padding_mask, is_causal)
    return split_heads(neuron(merge_heads(current)).to(q.dtype), q.shape[2])


def attention_current(
    neuron: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | Tensor,
    query_padding_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool = False,
) -> Tensor:
    """What ``neuron`` is to be given, [T, B, H, L, E], as wide as inside the operation, never 16-bit."""
    wide = (x.to(state_dtype(x)) for x in (q, k, v))
    return spiking_attention(
        *wide, fire=None, scale=scale, is_causal=is_causal,
        query_padding_mask=query_padding_mask, key_padding_mask=key_padding_mask,
        backend=neuron.backend if isinstance(neuron, LIF) else "auto",
    )  # fmt: skip


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """[T, B, H, L, E] of [T, B, L, D], a view."""
    return x.unflatten(-1, (num_heads, -1)).transpose(2, 3)


def merge_heads(x: Tensor) -> Tensor:
    """[T, B, L, D] of [T, B, H, L, E]."""
    return x.transpose(2, 3).flatten(3)


def count_tokens(x: Tensor, key_padding_mask: Tensor | None) -> Tensor:
    """How many tokens of ``x`` [T, B, L, D] are no padding, [B], or [1] without a mask."""
    if key_padding_mask is None:
        return torch.full((1,), x.shape[2], device=x.device)
    return (~key_padding_mask).sum(1)


def as_autocast(x: Tensor) -> Tensor:
    """``x`` [T, ...] in autocast's dtype, converted once for all projections of it; a static one stays static."""
    device = x.device.type
    if x.dtype != torch.float32 or not torch.is_autocast_enabled(device):
        return x
    dtype = torch.get_autocast_dtype(device)
    return converted(x[:1], dtype).expand_as(x) if is_static(x) else converted(x, dtype)


class HeadedAttention(nn.Module):
    """What the attention modules share: heads, projections to them, the attention's neurons, the way out.

    Args:
        dim: Width D of a token.
        num_heads: Heads H; D is a multiple of it.
        options: What all layers of a model share.
        attn_v_threshold: Threshold of the attention's neurons.
        scale: Multiplies what the attention's neurons are given.
        projections: Name and width of the input of each `SpikingLinear` to D.
    """

    q: SpikingLinear
    k: SpikingLinear
    v: SpikingLinear
    out: SpikingLinear | NormedLinear  # the latter in a block with a membrane shortcut

    def __init__(
        self,
        dim: int,
        num_heads: int,
        options: SpikingOptions,
        attn_v_threshold: float,
        scale: float,
        projections: dict[str, int],
    ) -> None:
        super().__init__()
        _checks.check_heads(type(self).__name__, dim, num_heads)
        _checks.check_finite(type(self).__name__, "scale", scale)
        self.dim, self.num_heads, self.scale, self.init = dim, num_heads, scale, options.init
        for name, width in projections.items():
            self.add_module(name, SpikingLinear(width, dim, options))
        self.attn_lif = options.lif(attn_v_threshold)
        self.tau = options.tau
        self.out = SpikingLinear(dim, dim, options)

    def check(self, x: Tensor, key_padding_mask: Tensor | None) -> None:
        """``x`` is [T, B, L, D], and the mask fits."""
        _checks.check_tokens(type(self).__name__, x, self.dim)
        _checks.check_padding_mask(type(self).__name__, key_padding_mask, *x.shape[1:3])

    def project(self, names: str, x: Tensor, key_padding_mask: Tensor | None) -> list[Tensor]:
        """Spikes [T, B, H, L, E] of ``x`` by each projection in ``names``."""
        x = as_autocast(x)
        return [split_heads(self.get_submodule(name)(x, key_padding_mask), self.num_heads) for name in names]

    def scaled(self, gain: Callable[[], Tensor]) -> float | Tensor:
        """``scale``, times the ``gain`` of the alive start."""
        return self.scale * gain() if self.init == "alive" else self.scale

    def extra_repr(self) -> str:
        """Hyper-parameters, as printed in the module's repr."""
        return f"{self.dim}, num_heads={self.num_heads}, scale={self.scale}, init={self.init!r}"


class SpikingSelfAttention(HeadedAttention):
    """Self-attention between spikes, without a softmax, over all T time steps at once.

    ::

        Q, K, V = LIF(norm(Linear(x)))                three projections
        A = LIF(scale * (Q K^T) V)                    fire="output"
        A = LIF(scale * Q K^T) V                      fire="map"
        out = LIF(norm(Linear(A)))

    Source: Zhou et al. 2022 (Spikformer, arXiv:2209.15425), with LayerNorm as in SpikEmo's code; "map" is eq. (1) of
    SpikEmo as printed. The equation of the attention is in ``ops.spiking_attention``, the one of the neuron in
    `ops.lif`.

    Args:
        dim: Width D of a token.
        num_heads: Heads H; D is a multiple of it.
        scale: Multiplies the sums of spikes, once (dimensionless). A power of two keeps them exact.
        fire: What fires, the output or the map.
        norm: "layer", or "batch" (statistics over T, B and L that see no padding).
        tau: Membrane time constant of every LIF, in time steps, > 1.
        v_threshold: Threshold of the projections' neurons (dimensionless).
        attn_v_threshold: Threshold of the attention's neurons.
        v_reset: Potential after a spike; None subtracts the threshold (soft reset).
        surrogate_function: Gives the gradient of the step.
        detach_reset: Whether the gradient ignores the reset.
        is_causal: Token i sees tokens j <= i.
        init: "alive" starts with gains at which every neuron fires (``docs/alive-start.md``): a norm gain of
            ``sqrt(2 tau - 1)`` thresholds, and a power of two on ``scale`` that depends on the number of keys a
            query sees. "published" is the start of SpikEmo's code: weights of standard deviation 0.02, gains of 1.
        backend: As in `ops.lif`.
        device: Where the parameters are made.
        dtype: Of the parameters.

    Gradient:
        To ``x`` and the parameters, through the surrogate.

    Raises:
        ValueError: D is not a multiple of ``num_heads``; an option outside its choices; ``x`` or the mask of
            another shape.

    Example:
        >>> attention = SpikingSelfAttention(64, num_heads=4)
        >>> spikes = attention(torch.randn(8, 2, 10, 64))
        >>> spikes.shape, sorted(spikes.unique().tolist())
        (torch.Size([8, 2, 10, 64]), [0.0, 1.0])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
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
        is_causal: bool = False,
        init: Init = "alive",
        backend: Backend = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _checks.check_choice("SpikingSelfAttention", "fire", fire, ("output", "map"))
        options = SpikingOptions(
            norm, tau, v_threshold, v_reset, surrogate_function, detach_reset, init, backend, device, dtype
        )
        super().__init__(dim, num_heads, options, attn_v_threshold, scale, {"q": dim, "k": dim, "v": dim})
        self.fire: Fire = fire
        self.is_causal = is_causal

    def forward(
        self, x: Float[Tensor, "T B L D"], key_padding_mask: Bool[Tensor, "B L"] | None = None
    ) -> Float[Tensor, "T B L D"]:
        """Attend.

        Args:
            x: Spikes or currents [T, B, L, D]. A time axis of stride 0 (``expand``) is projected once.
            key_padding_mask: [B, L], True at padding (PyTorch's convention).

        Returns:
            Spikes [T, B, L, D]; zero at padding, and elsewhere what the unpadded input gives.
        """
        self.check(x, key_padding_mask)
        q, k, v = self.project("qkv", x, key_padding_mask)
        keys = self._seen(x, key_padding_mask, 0)
        attended = attend_and_fire(
            self.attn_lif, q, k, v,
            scale=self._scale(keys if self.is_causal else keys[:, -1:]), fire=self.fire, is_causal=self.is_causal,
            query_padding_mask=key_padding_mask, key_padding_mask=key_padding_mask,
        )  # fmt: skip
        return self.out(merge_heads(attended), key_padding_mask)

    def step(
        self,
        x: Float[Tensor, "T B L D"],
        state: StreamState | None = None,
        key_padding_mask: Bool[Tensor, "B L"] | None = None,
    ) -> tuple[Float[Tensor, "T B L D"], StreamState]:
        """Attend for the next L tokens of a sequence, one or more, to them and to all before; only if causal.

        Args:
            x: The tokens [T, B, L, D], all T time steps of each.
            state: What the call before returned; None at the start.
            key_padding_mask: [B, L], True where a sequence of the batch has no token.

        Returns:
            Spikes [T, B, L, D], those of one call with the whole sequence (how exactly: ``docs/numerics.md``), and
            the state, whose size does not depend on the number of tokens unless the map fires.

        Raises:
            ValueError: The module is not causal, or normalises by the statistics of a batch it does not see, or its
                ``attn_lif`` is watched or another than its own.

        Example:
            >>> attention = SpikingSelfAttention(16, num_heads=2, is_causal=True)
            >>> state = None
            >>> with torch.no_grad():  # with gradients, the state would keep every token's graph
            ...     for token in torch.randn(10, 4, 1, 1, 16):
            ...         spikes, state = attention.step(token, state)
            >>> spikes.shape, state.tokens.item()
            (torch.Size([4, 1, 1, 16]), 10)
        """
        if not self.is_causal:
            raise ValueError("SpikingSelfAttention: step needs is_causal=True: later tokens would change earlier ones.")
        if self.training and isinstance(self.q.norm, TokenBatchNorm):
            raise ValueError('SpikingSelfAttention: step with norm="batch" needs eval(): a piece has other statistics.')
        self.check(x, key_padding_mask)
        q, k, v = self.project("qkv", x, key_padding_mask)
        keys = self._seen(x, key_padding_mask, 0 if state is None else state.tokens[:, None])
        neuron = self.attn_lif
        if not fires_inside(neuron):
            raise ValueError("SpikingSelfAttention: step fires a plain LIF inside attention; take hooks off attn_lif.")
        attended, kept = spiking_attention_step(
            q, k, v, None if state is None else state.attention,
            scale=self._scale(keys), fire=self.fire, padding_mask=key_padding_mask,
            tau=neuron.tau, v_threshold=neuron.v_threshold, v_reset=neuron.v_reset, detach_reset=neuron.detach_reset,
            surrogate=neuron.surrogate_function, backend=neuron.backend,
        )  # fmt: skip
        out = self.out(merge_heads(attended), key_padding_mask)
        return out, StreamState(kept, keys[:, -1])

    @staticmethod
    def _seen(x: Tensor, key_padding_mask: Tensor | None, before: Tensor | int) -> Tensor:
        """Keys at or before each token, [B or 1, L]: ``before`` [B, 1] of them came earlier."""
        if key_padding_mask is None:
            key_padding_mask = torch.zeros(1, x.shape[2], dtype=torch.bool, device=x.device)
        return before + (~key_padding_mask).cumsum(1)

    def _scale(self, keys: Tensor) -> float | Tensor:
        """``scale``, times the gain of the alive start for so many ``keys`` [B or 1, L or 1]: [1, B, 1, L, 1]."""
        E, tau = self.dim // self.num_heads, self.tau
        return self.scaled(lambda: attention_gain(keys, E, tau, self.fire)[None, :, None, :, None])

    def extra_repr(self) -> str:
        """Hyper-parameters, as printed in the module's repr."""
        return f"{super().extra_repr()}, fire={self.fire!r}, is_causal={self.is_causal}"
