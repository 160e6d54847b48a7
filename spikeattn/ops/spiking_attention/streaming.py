"""Causal spiking attention over a sequence that arrives in pieces."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spikeattn import _checks
from spikeattn._backends import Backend
from spikeattn.ops.lif import lif
from spikeattn.ops.spiking_attention.op import as_scale
from spikeattn.ops.spiking_attention.reference import Fire, exact_sums, masked, product
from spikeattn.ops.surrogate import ATan


class AttentionState(NamedTuple):
    """What causal attention keeps of the tokens it has seen.

    ``sums`` is the running K^T V [T, B, H, E, E], whatever the number of tokens. Where the map fires there is no such
    sum: ``keys`` and ``values`` [T, B, H, tokens, E] are kept instead.
    """

    sums: Tensor | None = None
    keys: Tensor | None = None
    values: Tensor | None = None


def spiking_attention_step(
    q: Float[Tensor, "T B H L E"],
    k: Float[Tensor, "T B H L E"],
    v: Float[Tensor, "T B H L E"],
    state: AttentionState | None = None,
    *,
    scale: float | Tensor = 0.125,
    fire: Fire | None = "output",
    padding_mask: Bool[Tensor, "B L"] | None = None,
    tau: float = 2.0,
    v_threshold: float = 0.5,
    v_reset: float | None = 0.0,
    detach_reset: bool = True,
    surrogate: Callable[[Tensor], Tensor] = ATan(2.0),
    backend: Backend = "auto",
) -> tuple[Float[Tensor, "T B H L E"], AttentionState]:
    """Go on with causal `spiking_attention` by the next L tokens, one or more.

    ::

        sums = sum over all tokens j before these of k_j^T v_j
        out  = LIF(scale * (tril(Q K^T) V + Q sums))             fire="output"; None leaves out the LIF

    Source: the association of linear attention (Katharopoulos et al. 2020, arXiv:2006.16236, eqs. 16-20), which holds
    exactly here for want of a softmax.

    Args:
        q: Spikes of the next tokens [T, B, H, L, E]; all T time steps of a token come together.
        k: As ``q``.
        v: As ``q``.
        state: What the call before returned; None at the start of a sequence.
        scale: As in `spiking_attention`, for these tokens.
        fire: As in `spiking_attention`.
        padding_mask: [B, L], True where a sequence of the batch has no token: its output is zero, its state stays.
        tau, v_threshold, v_reset, detach_reset, surrogate, backend: As in `spiking_attention`.

    Returns:
        The output of these tokens [T, B, H, L, E], and the state with them.

    Gradient:
        As in `spiking_attention`, and through the state, which then holds the graph of all tokens so far: run inference
        under ``torch.no_grad()``, or detach the state to train on pieces.

    Numerics:
        However a sequence is cut, the outputs are bit for bit those of one causal call, as long as the sums stay below
        2**24 (tokens times E). The state takes 4 T B H E^2 bytes, for ``fire="map"`` two tensors like ``k`` so far.

    Raises:
        ValueError, TypeError: As `spiking_attention`; the state is of another shape or another ``fire``.

    Example:
        >>> from spikeattn import spiking_attention
        >>> q, k, v = torch.randint(0, 2, (3, 4, 1, 2, 6, 8)).float()
        >>> whole = spiking_attention(q, k, v, is_causal=True)
        >>> first, state = spiking_attention_step(q[..., :5, :], k[..., :5, :], v[..., :5, :])
        >>> last, _ = spiking_attention_step(q[..., 5:, :], k[..., 5:, :], v[..., 5:, :], state)
        >>> torch.equal(torch.cat([first, last], dim=3), whole)
        True
    """
    name = "spiking_attention_step"
    _checks.check_attention(name, q, k, v, padding_mask, padding_mask, is_causal=True)
    _checks.check_choice(name, "fire", fire, ("output", "map", None))
    _checks.check_tau(name, tau)
    _checks.check_potentials(name, v_threshold, v_reset)
    scale = as_scale(scale, q)
    dtype = q.dtype
    q, k, v = masked(q, padding_mask), masked(k, padding_mask), masked(v, padding_mask)
    state = AttentionState() if state is None else state
    _check_state(name, state, k, fire)
    neuron = partial(
        lif, tau=tau, v_threshold=v_threshold, v_reset=v_reset, detach_reset=detach_reset,
        surrogate=surrogate, backend=backend,
    )  # fmt: skip
    with exact_sums(q):
        if fire == "map":
            past = 0 if state.keys is None else state.keys.shape[3]
            keys = k if state.keys is None else torch.cat([state.keys, k], dim=3)
            values = v if state.values is None else torch.cat([state.values, v], dim=3)
            counts = (q @ keys.transpose(-1, -2)).tril(past)
            return (neuron(counts * scale).spikes @ values).to(dtype), AttentionState(keys=keys, values=values)
        current = product(q, k, v, is_causal=True)
        sums = k.transpose(-1, -2) @ v
        if state.sums is not None:
            current, sums = current + q @ state.sums, sums + state.sums
        current = current * scale
        out = current if fire is None else neuron(current).spikes
        return out.to(dtype), AttentionState(sums=sums)


def _check_state(op: str, state: AttentionState, k: Tensor, fire: Fire | None) -> None:
    """The state is of this kind of attention and of these sizes."""
    T, B, H, _, E = k.shape
    kept = state.sums if state.keys is None else state.keys
    if kept is None:
        return
    if (fire == "map") != (state.keys is not None):
        raise ValueError(f"{op}: the state is that of another fire than {fire!r}.")
    if (
        kept.ndim != 5
        or (*kept.shape[:3], kept.shape[4]) != (T, B, H, E)
        or (fire == "map") != (state.values is not None)
    ):
        raise ValueError(f"{op}: the state must be of [T, B, H, *, E] = {(T, B, H, '*', E)}, got {tuple(kept.shape)}.")
    if kept.dtype != k.dtype or kept.device != k.device:
        raise TypeError(f"{op}: the state must be {k.dtype} on {k.device}, got {kept.dtype} on {kept.device}.")
