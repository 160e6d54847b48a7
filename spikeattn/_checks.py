"""Checks of shapes, dtypes and values at the public boundary, and their messages.

Each message reads ``<function>: <argument> must <rule>, got <value>.`` and, where there is one, the likely cure.
"""

import math

import torch
from torch import Tensor

_STORAGE = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def check_floating(op: str, name: str, x: Tensor) -> None:
    """``x`` is a tensor of a dtype that the ops store: float32, float64, float16 or bfloat16."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}.")
    if x.dtype not in _STORAGE:
        raise TypeError(f"{op}: {name} must be float32, float64, float16 or bfloat16, got {x.dtype}.")


def check_time_major(op: str, name: str, x: Tensor) -> None:
    """``x`` has a time axis with at least one step."""
    if x.ndim == 0 or x.shape[0] == 0:
        raise ValueError(f"{op}: {name} must be [T, ...] with T >= 1, got shape {tuple(x.shape)}.")


def check_initial_potential(op: str, v0: Tensor | None, x: Tensor) -> None:
    """``v0``, if there is one, fits one time step of ``x``."""
    if v0 is None:
        return
    if v0.shape != x.shape[1:]:
        raise ValueError(
            f"{op}: v0 must have shape x.shape[1:] = {tuple(x.shape[1:])}, got {tuple(v0.shape)}. "
            "Is x time-major [T, B, L, D]?"
        )
    if v0.device != x.device:
        raise ValueError(f"{op}: v0 must be on the device of x, {x.device}, got {v0.device}.")


def check_tau(op: str, tau: float, name: str = "tau") -> None:
    """A membrane time constant is a number larger than one time step; infinity means no leak."""
    if isinstance(tau, Tensor):
        raise TypeError(f"{op}: {name} must be a number, got a tensor; only lif and ParametricLIF learn it.")
    if not tau > 1.0:
        raise ValueError(f"{op}: {name} must be > 1 time step, got {tau}.")


def check_finite(op: str, name: str, value: float) -> None:
    """``value`` is neither NaN nor infinite."""
    if not -math.inf < value < math.inf:  # isfinite does not trace
        raise ValueError(f"{op}: {name} must be finite, got {value}.")


def check_eps(op: str, eps: float) -> None:
    """What is added to a variance is a number that cannot make it negative; with 0 a constant row becomes NaN."""
    check_finite(op, "eps", eps)
    if eps < 0:
        raise ValueError(f"{op}: eps must be >= 0, got {eps}.")


def check_potentials(op: str, v_threshold: float, v_reset: float | None) -> None:
    """The threshold is finite and lies above the reset, so that a neuron at rest is silent."""
    rest = 0.0 if v_reset is None else v_reset
    if not (-math.inf < v_threshold < math.inf and -math.inf < rest < math.inf):
        raise ValueError(f"{op}: v_threshold and v_reset must be finite, got {v_threshold} and {v_reset}.")
    if v_threshold <= rest:
        raise ValueError(f"{op}: v_threshold must be above v_reset, got {v_threshold} and {rest}.")


def check_heads(op: str, dim: int, num_heads: int) -> None:
    """The width splits into heads of equal width."""
    if dim < 1 or num_heads < 1 or dim % num_heads != 0:
        raise ValueError(
            f"{op}: dim must be a positive multiple of num_heads, got dim = {dim} and num_heads = {num_heads}."
        )


def check_tokens(op: str, x: Tensor, dim: int, name: str = "x", axes: str = "[T, B, L, D]") -> None:
    """``x`` is floating ``[T, B, L, dim]``."""
    check_floating(op, name, x)
    if x.ndim != 4 or x.shape[-1] != dim:
        cure = ""
        if x.ndim == 5:
            cure = f" Merge the axes of a picture into one of tokens, before the channels: {axes}."
        elif x.ndim == 4 and x.shape[2] == dim:
            cure = f" Tokens come before channels: {axes}, not [T, B, D, L]."
        width = axes.rpartition(" ")[2].rstrip("]")
        raise ValueError(f"{op}: {name} must be {axes} with {width} = {dim}, got shape {tuple(x.shape)}.{cure}")
    check_time_major(op, name, x)


def check_memory(op: str, memory: Tensor, x: Tensor) -> None:
    """``memory`` has the time steps, the dialogues, the dtype and the device of ``x``."""
    if memory.shape[:2] != x.shape[:2]:
        raise ValueError(
            f"{op}: memory must be [T, B, S, Dk] with the T and B of x, {tuple(x.shape[:2])}, "
            f"got {tuple(memory.shape[:2])}. Is it time-major?"
        )
    if memory.dtype != x.dtype or memory.device != x.device:
        raise TypeError(f"{op}: memory must be {x.dtype} on {x.device} as x is, got {memory.dtype} on {memory.device}.")


def check_chunk(op: str, chunk: int, T: int | None = None) -> None:
    """Chunks have at least one time step, and fill the T steps."""
    if chunk < 1:
        raise ValueError(f"{op}: chunk must be at least 1 time step, got {chunk}.")
    if T is not None and T % chunk != 0:
        raise ValueError(f"{op}: x must have a multiple of chunk = {chunk} time steps, got T = {T}.")


def check_padding_mask(op: str, mask: Tensor | None, B: int, L: int, name: str = "key_padding_mask") -> None:
    """``mask`` is boolean ``[B, L]``."""
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise TypeError(f"{op}: {name} must be bool with True at padding, got {mask.dtype}.")
    if mask.shape != (B, L):
        raise ValueError(f"{op}: {name} must be [B, L] = {(B, L)}, got {tuple(mask.shape)}.")


def check_norm(op: str, x: Tensor, weight: Tensor, bias: Tensor, padding_mask: Tensor | None) -> None:
    """``x`` is [T, *N, D] with ``weight`` and ``bias`` [D] and a boolean ``padding_mask`` [*N]."""
    if x.ndim < 2 or x.shape[-1] == 0:
        raise ValueError(f"{op}: x must be [T, *N, D] with D >= 1, got shape {tuple(x.shape)}.")
    D = x.shape[-1]
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor.shape != (D,):
            raise ValueError(f"{op}: {name} must have shape (D,) = {(D,)}, got {tuple(tensor.shape)}.")
    if padding_mask is not None:
        if padding_mask.dtype != torch.bool:
            raise TypeError(f"{op}: padding_mask must be bool with True at padding, got {padding_mask.dtype}.")
        if padding_mask.shape != x.shape[1:-1]:
            raise ValueError(
                f"{op}: padding_mask must have shape x.shape[1:-1] = {tuple(x.shape[1:-1])}, "
                f"got {tuple(padding_mask.shape)}."
            )
    for name, other in (("weight", weight), ("bias", bias), ("padding_mask", padding_mask)):
        if other is not None and other.device != x.device:
            raise ValueError(f"{op}: {name} must be on the device of x, {x.device}, got {other.device}.")


def check_linear(op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """``x`` [*N, inputs], ``weight`` [outputs, inputs] and ``bias`` [outputs] fit."""
    if weight.ndim != 2 or x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        shapes = f"{tuple(x.shape)} and {tuple(weight.shape)}"
        raise ValueError(f"{op}: x must be [*N, inputs] and weight [outputs, inputs], got {shapes}.")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{op}: bias must have shape {tuple(weight.shape[:1])}, got {tuple(bias.shape)}.")
    for name, other in (("weight", weight), ("bias", bias)):
        if other is None:
            continue
        if other.device != x.device:
            raise ValueError(f"{op}: {name} must be on the device of x, {x.device}, got {other.device}.")
        if other.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"{op}: {name} must be {x.dtype} as x is, got {other.dtype}. Is autocast off?")


def check_attention(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_padding_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
) -> None:
    """``q`` [T, B, H, L, E], ``k`` and ``v`` [T, B, H, S, E], masks [B, L] and [B, S]."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_floating(op, name, x)
        if x.ndim != 5 or x.shape[0] == 0 or x.shape[4] == 0:
            raise ValueError(f"{op}: {name} must be [T, B, H, L, E] with T, E >= 1, got shape {tuple(x.shape)}.")
        if x.dtype != q.dtype or x.device != q.device:
            raise TypeError(f"{op}: {name} must be {q.dtype} on {q.device} as q is, got {x.dtype} on {x.device}.")
    T, B, H, L, E = q.shape
    S = k.shape[3]
    for name, x in (("k", k), ("v", v)):
        if x.shape != (T, B, H, S, E):
            raise ValueError(
                f"{op}: {name} must be [T, B, H, S, E] = {(T, B, H, S, E)} beside q {tuple(q.shape)}, "
                f"got {tuple(x.shape)}. Tokens come before channels: [T, B, H, L, E], not [T, B, H, E, L]."
            )
    if is_causal and L != S:
        raise ValueError(f"{op}: is_causal needs as many keys as queries, got L = {L} and S = {S}.")
    check_padding_mask(op, query_padding_mask, B, L, "query_padding_mask")
    check_padding_mask(op, key_padding_mask, B, S, "key_padding_mask")
    for name, mask in (("query_padding_mask", query_padding_mask), ("key_padding_mask", key_padding_mask)):
        if mask is not None and mask.device != q.device:
            raise ValueError(f"{op}: {name} must be on the device of q, {q.device}, got {mask.device}.")


def check_scale(op: str, scale: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """``scale`` is real, on ``device``, and broadcasts to ``shape``."""
    if scale.is_complex() or scale.device != device:
        raise ValueError(f"{op}: scale must be real and on {device}, got {scale.dtype} on {scale.device}.")
    fits = scale.ndim <= len(shape) and all(
        own in (1, whole) for own, whole in zip(scale.shape[::-1], shape[::-1], strict=False)
    )
    if not fits:
        raise ValueError(
            f"{op}: scale must broadcast to [T, B, H, L, 1] = {tuple(shape)}, got shape {tuple(scale.shape)}."
        )


def check_spikes(op: str, name: str, x: Tensor) -> None:
    """``x`` holds nothing but 0 and 1."""
    spikes = (x == 0) | (x == 1)
    if not spikes.all():
        raise ValueError(f"{op}: {name} must hold spikes, 0 or 1, got {x[~spikes][0].item()}.")


def check_choice(op: str, name: str, value: object, choices: tuple[object, ...]) -> None:
    """``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")
