"""The public function `spiking_attention`, which checks its arguments; and its map, to be looked at."""

import logging
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spikeattn import _checks
from spikeattn._backends import Backend, resolve_backend, say_once
from spikeattn.ops.lif.op import lif_kernels_take
from spikeattn.ops.lif.reference import state_dtype
from spikeattn.ops.spiking_attention.autograd import attention
from spikeattn.ops.spiking_attention.reference import (
    Fire,
    Order,
    attention_map,
    exact_sums,
    masked,
    spiking_attention_reference,
)
from spikeattn.ops.surrogate import ATan, Surrogate, as_surrogate

EXACT = 2**24  # float32 holds every integer up to here


def spiking_attention(
    q: Float[Tensor, "T B H L E"],
    k: Float[Tensor, "T B H S E"],
    v: Float[Tensor, "T B H S E"],
    *,
    scale: float | Tensor = 0.125,
    fire: Fire | None = "output",
    order: Order = "auto",
    query_padding_mask: Bool[Tensor, "B L"] | None = None,
    key_padding_mask: Bool[Tensor, "B S"] | None = None,
    is_causal: bool = False,
    tau: float = 2.0,
    v_threshold: float = 0.5,
    v_reset: float | None = 0.0,
    detach_reset: bool = True,
    surrogate: Callable[[Tensor], Tensor] = ATan(2.0),
    validate: bool = False,
    backend: Backend = "auto",
) -> Float[Tensor, "T B H L E"]:
    r"""Attention between spikes, without a softmax, and the neurons that follow it, over all T time steps.

    ::

        fire="output":  LIF(scale * (Q K^T) V)      Spikformer, and SpikEmo's code
        fire="map":     LIF(scale * Q K^T) V        SpikEmo, eq. (1)
        fire=None:      scale * (Q K^T) V

    Source: Zhou et al. 2022 (Spikformer, arXiv:2209.15425), spiking self-attention; Yu et al. (SpikEmo), eq. (1), with
    its tau as ``scale`` and its step as the LIF. The equation of the neuron is in `lif`; it starts at rest.

    Args:
        q: Spikes of queries [T, B, H, L, E], any strides; 0 or 1.
        k: Spikes of keys [T, B, H, S, E]; S may differ from L (cross-attention).
        v: Spikes of values, as ``k``.
        scale: A number, or a tensor that broadcasts to [T, B, H, L, 1] and gets no gradient; applied once, after the
            sums (dimensionless). A power of two keeps every result exact.
        fire: What fires: the product, the map, or nothing.
        order: "map_first" is (Q K^T) V, "state_first" Q (K^T V), "auto" the cheaper. With "map" only the first exists.
            The CPU kernels have one order each, and the same bits.
        query_padding_mask: [B, L], True at padding: those rows of the output are zero.
        key_padding_mask: [B, S], True at padding: those keys and values count for nothing. Self-attention gives both.
        is_causal: Token i sees tokens j <= i; needs S = L.
        tau: Membrane time constant **in time steps**, > 1.
        v_threshold: Firing threshold, above the reset, in units of ``scale`` times a count of spikes.
        v_reset: Potential after a spike (hard reset); None subtracts ``v_threshold`` instead (soft reset).
        detach_reset: Whether the gradient ignores the reset.
        surrogate: Gives the gradient of the step, as in `lif`.
        validate: Look whether q, k and v hold 0 and 1 only; costs a pass over them, and on CUDA a synchronisation.
        backend: As in `lif`.

    Returns:
        [T, B, H, L, E] in the dtype of ``q``: spikes for "output", counts of spikes for "map", real numbers for None.
        In memory [T, B, L, H, E], so that merging the heads copies nothing.

    Gradient:
        To ``q``, ``k`` and ``v``, in memory linear in L: these are kept, on a CPU as one bit a spike, on CUDA as bits,
        too; products and potentials are computed again. Derivation in ``ops/spiking_attention/README.md``. No second
        derivative, no `torch.func`.

    Numerics:
        Sums of products of 0 and 1 are integers, at most S * E; float32 holds them exactly up to 2**24. So with a power
        of two as ``scale`` every order and every backend gives the same bits, and so do padded and unpadded inputs.
        Sums are never 16-bit, also under autocast. A row all of whose keys are padding is zero.

    Raises:
        ValueError: Shapes do not fit; "state_first" with ``fire="map"``; ``is_causal`` with S != L; tau <= 1; the
            threshold is not above the reset; ``validate`` found a value besides 0 and 1.
        TypeError: An input is not a floating tensor, or they differ in dtype; a mask is not bool.
        BackendUnavailableError: The named backend cannot run here; the message says why.

    Example:
        >>> ones = torch.ones(2, 1, 1, 3, 4)
        >>> spiking_attention(ones, ones, ones, fire=None).unique().tolist()  # 3 keys with 4 channels each, times 0.125
        [1.5]
    """
    _checks.check_attention("spiking_attention", q, k, v, query_padding_mask, key_padding_mask, is_causal)
    _checks.check_choice("spiking_attention", "fire", fire, ("output", "map", None))
    _checks.check_choice("spiking_attention", "order", order, ("auto", "map_first", "state_first"))
    if fire == "map" and order == "state_first":
        raise ValueError('spiking_attention: order must be "map_first" where the map fires, got "state_first".')
    _checks.check_tau("spiking_attention", tau)
    _checks.check_potentials("spiking_attention", v_threshold, v_reset)
    if k.shape[3] * k.shape[4] > EXACT:
        counts = f"S * E = {k.shape[3]} * {k.shape[4]}"
        say_once(f"spiking_attention: sums of spikes can pass 2**24 ({counts}) and are then rounded", logging.WARNING)
    if validate:
        for name, x in (("q", q), ("k", k), ("v", v)):
            _checks.check_spikes("spiking_attention", name, x)
    surrogate = as_surrogate(surrogate)
    chosen = resolve_backend(backend, q.device, "spiking_attention", lambda name: lif_kernels_take(name, q, surrogate))
    scale = as_scale(scale, q)
    v_reset = None if v_reset is None else float(v_reset)
    settings = (fire, order, is_causal, float(tau), float(v_threshold), v_reset, detach_reset)
    inputs = (q, k, v, scale, query_padding_mask, key_padding_mask)
    if isinstance(surrogate, Surrogate):
        return attention(*inputs, *settings, surrogate.name, float(surrogate.alpha), chosen)
    return spiking_attention_reference(
        q, k, v, scale, query_padding_mask, key_padding_mask, *settings, surrogate
    )  # fmt: skip


def attend_by_map(
    neuron: Callable[[Tensor], Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | Tensor,
    query_padding_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
) -> Tensor:
    """``fire="map"`` with a ``neuron`` that is given the whole map [T, B, H, L, S] and can be looked at."""
    dtype = q.dtype
    q, k, v = masked(q, query_padding_mask), masked(k, key_padding_mask), masked(v, key_padding_mask)
    with exact_sums(q):
        spikes = neuron(attention_map(q, k, as_scale(scale, q), slice(0, q.shape[3]), is_causal))
        return (spikes @ v).to(dtype)


def as_scale(scale: float | Tensor, q: Tensor) -> Tensor:
    """``scale`` as a tensor of five axes in the dtype of the sums."""
    dtype = state_dtype(q)
    if not isinstance(scale, Tensor):
        _checks.check_finite("spiking_attention", "scale", scale)
        return torch.full((1, 1, 1, 1, 1), scale, dtype=dtype, device=q.device)
    _checks.check_scale("spiking_attention", scale, (*q.shape[:-1], 1), q.device)
    return scale.detach().to(dtype)[(None,) * (5 - scale.ndim)]
