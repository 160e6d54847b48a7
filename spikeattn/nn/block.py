"""Transformer blocks of spiking attention and a spiking MLP."""

from collections.abc import Callable
from typing import Literal, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from spikeattn import _checks
from spikeattn._backends import Backend
from spikeattn._recycled import added
from spikeattn.nn.attention import SpikingSelfAttention, StreamState
from spikeattn.nn.projection import Init, Norm, NormedLinear, SpikingLinear, SpikingNorm, SpikingOptions
from spikeattn.ops.spiking_attention.reference import Fire
from spikeattn.ops.surrogate import ATan

Residual = Literal["add", "membrane"]


class SpikingMLP(nn.Module):
    """Two spiking layers, ``LIF(norm(Linear(LIF(norm(Linear(x))))))``, wider between (Spikformer's MLP).

    Args:
        dim: Width D of a token.
        mlp_ratio: Width between the layers, as a multiple of ``dim``.
        norm, tau, v_threshold, v_reset, surrogate_function, detach_reset, init, backend, device, dtype: As in
            `SpikingSelfAttention`.

    Raises:
        ValueError: ``dim * mlp_ratio`` is below 1; an option outside its choices.

    Example:
        >>> SpikingMLP(16)(torch.randn(4, 2, 5, 16)).shape
        torch.Size([4, 2, 5, 16])
    """

    def __init__(
        self,
        dim: int,
        *,
        mlp_ratio: float = 4.0,
        norm: Norm = "layer",
        tau: float = 2.0,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function: Callable[[Tensor], Tensor] = ATan(2.0),
        detach_reset: bool = True,
        init: Init = "alive",
        backend: Backend = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        if hidden < 1:
            raise ValueError(f"SpikingMLP: dim * mlp_ratio must be at least 1, got {dim} * {mlp_ratio}.")
        options = SpikingOptions(
            norm, tau, v_threshold, v_reset, surrogate_function, detach_reset, init, backend, device, dtype
        )
        self.dim = dim
        self.fc1 = SpikingLinear(dim, hidden, options)
        self.fc2: SpikingLinear | NormedLinear = SpikingLinear(hidden, dim, options)

    def forward(
        self, x: Float[Tensor, "T B L D"], key_padding_mask: Bool[Tensor, "B L"] | None = None
    ) -> Float[Tensor, "T B L D"]:
        """Spikes [T, B, L, D] of any real ``x`` [T, B, L, D]; zero where ``key_padding_mask`` [B, L] is True."""
        _checks.check_tokens("SpikingMLP", x, self.dim)
        _checks.check_padding_mask("SpikingMLP", key_padding_mask, *x.shape[1:3])
        return self.fc2(self.fc1(x, key_padding_mask), key_padding_mask)


class SpikingTransformerBlock(nn.Module):
    """Spiking self-attention and a spiking MLP, each added to its input.

    ::

        x = x + SpikingSelfAttention(x)                      residual="add": spikes are added
        x = x + SpikingMLP(x)

        x = x + norm(Linear(A(LIF(norm(x)))))                residual="membrane": currents are added
        x = x + norm(Linear(LIF(norm(Linear(LIF(norm(x)))))))

    with A the attention without its last layer. With "membrane" x is a current: every Linear is given spikes (counts of
    them where the map fires), and what fires on the last x is the caller's choice.

    Source: Zhou et al. 2022 (Spikformer, arXiv:2209.15425), encoder block; Yao et al. 2023 (Spike-driven Transformer,
    arXiv:2307.01694), membrane shortcut, where the neurons on the shortcut have no norm before them. With it they fire
    at any scale of x and at any depth.

    Args:
        dim: Width D of a token.
        num_heads: Heads of the attention; D is a multiple of it.
        mlp_ratio: As in `SpikingMLP`.
        residual: What is added to the input, "add" (spikes) or "membrane" (currents).
        scale, fire, norm, tau, v_threshold, attn_v_threshold, v_reset, surrogate_function, detach_reset, is_causal,
            init, backend, device, dtype: As in `SpikingSelfAttention`.

    Raises:
        ValueError: An option outside its choices.

    Example:
        >>> SpikingTransformerBlock(16, num_heads=2)(torch.randn(4, 2, 5, 16)).shape
        torch.Size([4, 2, 5, 16])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        mlp_ratio: float = 4.0,
        residual: Residual = "add",
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
        super().__init__()
        _checks.check_choice("SpikingTransformerBlock", "residual", residual, ("add", "membrane"))
        self.attn = SpikingSelfAttention(
            dim,
            num_heads,
            scale=scale,
            fire=fire,
            norm=norm,
            tau=tau,
            v_threshold=v_threshold,
            attn_v_threshold=attn_v_threshold,
            v_reset=v_reset,
            surrogate_function=surrogate_function,
            detach_reset=detach_reset,
            is_causal=is_causal,
            init=init,
            backend=backend,
            device=device,
            dtype=dtype,
        )
        self.mlp = SpikingMLP(
            dim,
            mlp_ratio=mlp_ratio,
            norm=norm,
            tau=tau,
            v_threshold=v_threshold,
            v_reset=v_reset,
            surrogate_function=surrogate_function,
            detach_reset=detach_reset,
            init=init,
            backend=backend,
            device=device,
            dtype=dtype,
        )
        self.residual = residual
        if residual == "membrane":
            options = SpikingOptions(
                norm, tau, v_threshold, v_reset, surrogate_function, detach_reset, init, backend, device, dtype
            )
            self.attn_in, self.mlp_in = SpikingNorm(dim, options), SpikingNorm(dim, options)
            # What fires on these currents is the next neuron on the shortcut.
            self.attn.out = NormedLinear(dim, dim, options, self.mlp_in.lif)
            self.mlp.fc2 = NormedLinear(self.mlp.fc1.linear.out_features, dim, options, self.attn_in.lif)

    def forward(
        self, x: Float[Tensor, "T B L D"], key_padding_mask: Bool[Tensor, "B L"] | None = None
    ) -> Float[Tensor, "T B L D"]:
        """``x`` [T, B, L, D] plus spikes, or currents; unchanged where ``key_padding_mask`` [B, L] is True."""
        x = added(x, self.attn(self._given("attn_in", x, key_padding_mask), key_padding_mask))
        return added(x, self.mlp(self._given("mlp_in", x, key_padding_mask), key_padding_mask))

    def step(
        self,
        x: Float[Tensor, "T B L D"],
        state: StreamState | None = None,
        key_padding_mask: Bool[Tensor, "B L"] | None = None,
    ) -> tuple[Float[Tensor, "T B L D"], StreamState]:
        """Go on with a causal sequence by the next L tokens: see `SpikingSelfAttention.step`."""
        attended, state = self.attn.step(self._given("attn_in", x, key_padding_mask), state, key_padding_mask)
        x = added(x, attended)
        return added(x, self.mlp(self._given("mlp_in", x, key_padding_mask), key_padding_mask)), state

    def _given(self, neurons: str, x: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        """What a branch is given of ``x``: with a membrane shortcut the spikes of its ``neurons``, else ``x``."""
        return self.get_submodule(neurons)(x, key_padding_mask) if self.residual == "membrane" else x


class SpikingTransformer(nn.Module):
    """``depth`` spiking transformer blocks, one after another.

    Any real input; encoding before it and normalising after it belong to the caller.

    Args:
        dim: Width D of a token.
        depth: Number of blocks.
        num_heads: Heads of each attention; D is a multiple of it.
        mlp_ratio: As in `SpikingMLP`.
        residual: As in `SpikingTransformerBlock`.
        scale, fire, norm, tau, v_threshold, attn_v_threshold, v_reset, surrogate_function, detach_reset, is_causal,
            init, backend, device, dtype: As in `SpikingSelfAttention`.

    Raises:
        ValueError: ``depth`` is below 1.

    Example:
        >>> x = torch.randn(2, 5, 16).expand(4, 2, 5, 16)  # a static input, over 4 time steps
        >>> SpikingTransformer(16, depth=2, num_heads=2)(x).shape
        torch.Size([4, 2, 5, 16])
    """

    def __init__(
        self,
        dim: int,
        depth: int = 2,
        num_heads: int = 8,
        *,
        mlp_ratio: float = 4.0,
        residual: Residual = "add",
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
        super().__init__()
        if depth < 1:
            raise ValueError(f"SpikingTransformer: depth must be at least 1, got {depth}.")
        self.blocks = nn.ModuleList(
            SpikingTransformerBlock(
                dim,
                num_heads,
                mlp_ratio=mlp_ratio,
                residual=residual,
                scale=scale,
                fire=fire,
                norm=norm,
                tau=tau,
                v_threshold=v_threshold,
                attn_v_threshold=attn_v_threshold,
                v_reset=v_reset,
                surrogate_function=surrogate_function,
                detach_reset=detach_reset,
                is_causal=is_causal,
                init=init,
                backend=backend,
                device=device,
                dtype=dtype,
            )
            for _ in range(depth)
        )

    def forward(
        self, x: Float[Tensor, "T B L D"], key_padding_mask: Bool[Tensor, "B L"] | None = None
    ) -> Float[Tensor, "T B L D"]:
        """``x`` [T, B, L, D] plus spikes, or currents; unchanged where ``key_padding_mask`` [B, L] is True."""
        for block in self.blocks:
            x = block(x, key_padding_mask)
        return x

    def step(
        self,
        x: Float[Tensor, "T B L D"],
        states: list[StreamState] | None = None,
        key_padding_mask: Bool[Tensor, "B L"] | None = None,
    ) -> tuple[Float[Tensor, "T B L D"], list[StreamState]]:
        """Go on with a causal sequence by L tokens; a state for each block: see `SpikingSelfAttention.step`."""
        blocks = cast("list[SpikingTransformerBlock]", self.blocks)
        after = []
        for i, block in enumerate(blocks):
            x, state = block.step(x, None if states is None else states[i], key_padding_mask)
            after.append(state)
        return x, after
