"""The definition of spiking attention: plain PyTorch, exact for spikes in any order of association."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from spikeattn import _checks

Fire = Literal["output", "map"]
Order = Literal["auto", "map_first", "state_first"]


def spiking_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | Tensor,
    fire: Fire,
    neuron: Callable[[Tensor], Tensor],
    order: Order = "auto",
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """Attention between spikes, without a softmax, fired over T.

    ::

        fire="output":  neuron(scale * (Q K^T) V)      SpikEmo's code, as Spikformer
        fire="map":     neuron(scale * Q K^T) V        SpikEmo, eq. (1)

    Source: Zhou et al. 2022 (Spikformer, arXiv:2209.15425), spiking self-attention; Yu et al. (SpikEmo), eq. (1),
    with its tau as ``scale`` and its step as ``neuron``.

    Args:
        q: Spikes [T, B, H, L, E].
        k: Spikes [T, B, H, L, E].
        v: Spikes [T, B, H, L, E].
        scale: A number, or a tensor that broadcasts to [T, B, H, L, 1]; applied once, after the sums. A power of
            two keeps every result exact.
        fire: What fires, the product or the map.
        neuron: Fires over T (axis 0), e.g. a `LIF`. It is given [T, B, L, H * E] for "output" and
            [T, B, H, L, L] for "map".
        order: "map_first" is (Q K^T) V, 4 L^2 E operations a head; "state_first" is Q (K^T V), 4 L E^2; "auto" the
            cheaper. With "map" only the first exists.
        key_padding_mask: [B, L], True at padding: queries, keys and values there count as zero.
        is_causal: Token i sees tokens j <= i.

    Returns:
        [T, B, L, H * E] in the dtype of ``q``: spikes for "output", counts of spikes for "map".

    Numerics:
        Sums of 0/1 products are integers, at most L * E: float32 holds them exactly, so that both orders, and any
        padding, give the same bits. Inside autocast the products stay float32.

    Raises:
        ValueError: L * E > 2**24; "state_first" with ``fire="map"``.
    """
    L, E = q.shape[-2:]
    _checks.check_exact_products("spiking_attention", L, E)
    if fire == "map" and order == "state_first":
        raise ValueError('spiking_attention: order must be "map_first" where the map fires, got "state_first".')
    if order == "auto":
        order = "map_first" if fire == "map" or is_causal or L <= E else "state_first"
    dtype = q.dtype
    with torch.autocast(q.device.type, enabled=False):
        q, k, v = (s if s.dtype == torch.float64 else s.float() for s in (q, k, v))
        if key_padding_mask is not None:
            valid = ~key_padding_mask[None, :, None, :, None]  # [1, B, 1, L, 1]
            q, k, v = q * valid, k * valid, v * valid
        if fire == "map":
            fired = neuron(attention_map(q, k, is_causal) * scale)
            return _merge_heads(fired @ v).to(dtype)
        if order == "map_first":
            product = attention_map(q, k, is_causal) @ v
        elif is_causal:
            state = torch.cumsum(k.unsqueeze(-1) * v.unsqueeze(-2), dim=-3)  # [T, B, H, L, E, E]
            product = (q.unsqueeze(-2) @ state).squeeze(-2)
        else:
            product = q @ (k.transpose(-1, -2) @ v)
        return neuron(_merge_heads(product * scale)).to(dtype)


def attention_map(q: Tensor, k: Tensor, is_causal: bool = False) -> Tensor:
    """Q K^T, [T, B, H, L, L]: how many channels fire in query i and key j together; zero for j > i if causal."""
    counts = q @ k.transpose(-1, -2)
    return counts.tril() if is_causal else counts


def _merge_heads(x: Tensor) -> Tensor:
    """[T, B, H, L, E] to [T, B, L, H * E]."""
    return x.transpose(2, 3).flatten(3)
