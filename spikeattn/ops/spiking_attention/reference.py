"""The definition of spiking attention: plain PyTorch, exact for spikes in any order of association."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from spikeattn.ops.lif.reference import lif_reference, state_dtype

Fire = Literal["output", "map"]
Order = Literal["auto", "map_first", "state_first"]

# Tokens of a chunk of causal attention, state first: between chunks only the state passes. kChunk in kernels.cu.
CHUNK = 64
# Where the map fires, so much of it is in memory at once.
MAP_BYTES = 32 << 20


def product(a: Tensor, b: Tensor, c: Tensor, order: str = "auto", is_causal: bool = False) -> Tensor:
    """``(A B^T) C``, [..., L, E] of [..., L, F], [..., S, F] and [..., S, E]; for j > i nothing if causal (L = S)."""
    if order == "auto":
        order = cheaper_order(a.shape[-2], b.shape[-2], a.shape[-1], c.shape[-1], is_causal)
    if order == "map_first":
        counts = a @ b.transpose(-1, -2)
        return (counts.tril() if is_causal else counts) @ c
    return _causal_state_first(a, b, c) if is_causal else a @ (b.transpose(-1, -2) @ c)


# Tokens for each channel up to which a causal gradient goes by way of the whole map.
_SHORT = 8


def cheaper_order(L: int, S: int, F: int, E: int, is_causal: bool) -> str:
    """The order with fewer multiplications: L S (F + E) map first, (L + S) F E state first."""
    states = (L + S) * F * E + (L * CHUNK * (F + E) if is_causal else 0)
    return "map_first" if states >= L * S * (F + E) else "state_first"


def _causal_state_first(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Causal `product` in chunks of tokens: the map inside a chunk, the sum of B^T C of those before it."""
    L = a.shape[-2]
    a, b, c = (torch.nn.functional.pad(x, (0, 0, 0, -L % CHUNK)).unflatten(-2, (-1, CHUNK)) for x in (a, b, c))
    inside = (a @ b.transpose(-1, -2)).tril() @ c
    states = b.transpose(-1, -2) @ c  # [..., L / CHUNK, F, E]
    before = states.cumsum(-3) - states
    return (inside + a @ before).flatten(-3, -2)[..., :L, :]


def spiking_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Tensor,
    query_padding_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    fire: str | None,
    order: str,
    is_causal: bool,
    tau: float,
    v_threshold: float,
    v_reset: float | None,
    detach_reset: bool,
    surrogate: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return [T, B, H, L, E], differentiable in ``q``, ``k`` and ``v``; equation: `spiking_attention`.

    ``scale`` is a tensor that broadcasts to [T, B, H, L, 1].
    """
    dtype = q.dtype
    q, k, v = masked(q, query_padding_mask), masked(k, key_padding_mask), masked(v, key_padding_mask)
    neuron = (q.shape[0], tau, True, v_threshold, v_reset, detach_reset, surrogate)
    rest = torch.full((), 0.0 if v_reset is None else v_reset, dtype=q.dtype, device=q.device)
    with exact_sums(q):
        if fire == "map":
            counts = q @ k.transpose(-1, -2)
            current = (counts.tril() if is_causal else counts) * scale
            spikes, _, _ = lif_reference(current, rest.expand(current.shape[1:]), None, *neuron)
            return (spikes @ v).to(dtype)
        current = product(q, k, v, order, is_causal) * scale
        if fire is None:
            return current.to(dtype)
        return lif_reference(current, rest.expand(current.shape[1:]), None, *neuron)[0].to(dtype)


def exact_sums(x: Tensor) -> AbstractContextManager:
    """Inside, matrix products are as wide as their inputs, also under autocast."""
    return nullcontext() if x.device.type == "meta" else torch.autocast(x.device.type, enabled=False)


def masked(x: Tensor, padding_mask: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
    """``x`` [T, B, H, L, E] in ``dtype``, or in that of the sums, zero at padding [B, L]."""
    x = x.to(dtype or state_dtype(x)).contiguous()  # once: each matrix product would copy it
    return x if padding_mask is None else x.masked_fill(padding_mask[:, None, :, None], 0.0)


class Neuron(NamedTuple):
    """A LIF layer from rest, by its two directions."""

    fire: Callable[[Tensor], Tensor]  # spikes [T, *N] of currents [T, *N]
    gradient: Callable[[Tensor, Tensor], Tensor]  # of the current, from that of the spikes, and the current


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Tensor,
    fire: str | None,
    order: str,
    is_causal: bool,
    neuron: Neuron,
) -> Tensor:
    """`spiking_attention_reference` of masked ``q``, ``k``, ``v``, with any implementation of the neurons."""
    if fire != "map":
        current = product(q, k, v, order, is_causal) * scale
        return current if fire is None else neuron.fire(current)
    out = torch.empty_like(q[..., :1].expand(*q.shape[:-1], v.shape[-1]), memory_format=torch.contiguous_format)
    for rows in map_tiles(q, k):
        out[..., rows, :] = neuron.fire(attention_map(q, k, scale, rows, is_causal)) @ v
    return out


def attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Tensor,
    fire: str | None,
    order: str,
    is_causal: bool,
    neuron: Neuron,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of masked ``q``, ``k``, ``v``; currents are computed again. Derivation: ``README.md``."""
    if fire == "map":
        return _map_backward(grad, q, k, v, scale, is_causal, neuron)
    if fire == "output":
        grad = neuron.gradient(grad, product(q, k, v, order, is_causal) * scale)
    return product_backward(grad * scale, q, k, v, is_causal)


def product_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``q``, ``k``, ``v`` from that of ``(Q K^T) V``, in the cheaper order."""
    order = cheaper_order(q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1], is_causal)
    if is_causal and k.shape[-2] <= _SHORT * q.shape[-1]:
        order = "map_first"  # a few large products; chunks are many small ones
    if order == "map_first":
        grad_map, counts = grad @ v.transpose(-1, -2), q @ k.transpose(-1, -2)
        if is_causal:
            grad_map, counts = grad_map.tril(), counts.tril()
        return grad_map @ k, grad_map.transpose(-1, -2) @ q, counts.transpose(-1, -2) @ grad
    if not is_causal:
        return product(grad, v, k), product(v, grad, q), product(k, q, grad)
    grad_q = product(grad, v, k, is_causal=True)
    # Token j is seen by tokens i >= j: the same product of reversed sequences.
    q, k, v, grad = (x.flip(-2) for x in (q, k, v, grad))
    return grad_q, product(v, grad, q, is_causal=True).flip(-2), product(k, q, grad, is_causal=True).flip(-2)


def _map_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: Tensor, is_causal: bool, neuron: Neuron
) -> tuple[Tensor, Tensor, Tensor]:
    """`attend_backward` where the map fires; a tile of queries at a time."""
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for rows in map_tiles(q, k):
        current = attention_map(q, k, scale, rows, is_causal)
        grad_v += neuron.fire(current).transpose(-1, -2) @ grad[..., rows, :]
        grad_map = neuron.gradient(grad[..., rows, :] @ v.transpose(-1, -2), current) * scale_of(scale, rows)
        if is_causal:
            grad_map = grad_map.tril(rows.start)
        grad_q[..., rows, :] = grad_map @ k
        grad_k += grad_map.transpose(-1, -2) @ q[..., rows, :]
    return grad_q, grad_k, grad_v


def attention_map(q: Tensor, k: Tensor, scale: Tensor, rows: slice, is_causal: bool) -> Tensor:
    """``scale Q K^T`` of the queries in ``rows``, [T, B, H, rows, S]; zero for j > i if causal."""
    counts = q[..., rows, :] @ k.transpose(-1, -2)
    return (counts.tril(rows.start) if is_causal else counts) * scale_of(scale, rows)


def scale_of(scale: Tensor, rows: slice) -> Tensor:
    """The part of ``scale`` that belongs to the queries in ``rows``."""
    return scale if scale.shape[-2] == 1 else scale[..., rows, :]


def map_tiles(q: Tensor, k: Tensor) -> list[slice]:
    """Queries in tiles whose maps, over all time steps, take no more than `MAP_BYTES`."""
    L, bytes_a_row = q.shape[-2], q[..., 0, 0].numel() * k.shape[-2] * q.element_size()
    rows = max(1, MAP_BYTES // max(1, bytes_a_row))
    return [slice(i, min(L, i + rows)) for i in range(0, L, rows)]
