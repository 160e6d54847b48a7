"""The public function `spiking_attention`, and the registered operations behind it."""

import logging
from collections.abc import Callable, Sequence
from functools import cache

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spikeattn import _checks
from spikeattn._autograd import differentiable, direct, watched
from spikeattn._backends import Backend, resolve_backend, say_once
from spikeattn.ops.lif.op import lif_backward, lif_forward, lif_kernels_take
from spikeattn.ops.lif.reference import state_dtype
from spikeattn.ops.spiking_attention.layout import room_for_gradient, steps_of_gradients
from spikeattn.ops.spiking_attention.reference import (
    Fire,
    Neuron,
    Order,
    attend,
    attend_backward,
    attention_map,
    exact_sums,
    masked,
    spiking_attention_reference,
)
from spikeattn.ops.surrogate import ATan, Surrogate, as_surrogate, surrogate_of

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
        return _attention(*inputs, *settings, surrogate.name, float(surrogate.alpha), chosen)
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


def _neuron(
    q: Tensor,
    tau: float,
    v_threshold: float,
    v_reset: float | None,
    detach_reset: bool,
    surrogate: str,
    alpha: float,
    backend: str,
) -> Neuron:
    """A LIF layer from rest on a backend."""
    settings = (q.shape[0], tau, True, v_threshold, v_reset, detach_reset, surrogate, alpha)

    def fire(current: Tensor) -> Tensor:
        return lif_forward(current, None, None, *settings, False, backend)[0]

    def gradient(grad_spikes: Tensor, current: Tensor) -> Tensor:
        return lif_backward(grad_spikes, None, None, current, None, None, *settings, backend)[0]

    return Neuron(fire, gradient)


def _empty_like(x: Tensor) -> Tensor:
    """Room for [T, B, H, L, E], [T, B, L, H, E] in memory."""
    T, B, H, L, E = x.shape
    return x.new_empty((T, B, L, H, E)).transpose(2, 3)


def _cupy_takes(q: Tensor, k: Tensor, backend: str) -> bool:
    """Whether the CUDA kernels of this operation run it; else products do, and the neurons' kernels."""
    if backend != "cupy" or not _has_tensor_cores(q.device):
        return False
    from spikeattn.ops.spiking_attention.cuda_plans import takes

    return q.numel() > 0 and k.numel() > 0 and takes(q.shape, k.shape[3])


@cache
def _has_tensor_cores(device: torch.device) -> bool:
    """Whether a device multiplies bytes and bfloat16: from Ampere on. The emulator of the tests does."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def _gradients_on_cuda(
    bits, grad, q, k, v, scale, query_padding_mask, key_padding_mask,
    fire, order, is_causal, tau, v_threshold, v_reset, detach_reset, surrogate, alpha, backend,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from spikeattn.ops.spiking_attention.cuda import Bits, attention_gradients_cuda

    return attention_gradients_cuda(
        grad, q, k, v, scale, query_padding_mask, key_padding_mask,
        fire, order, is_causal, tau, v_threshold, v_reset, detach_reset, surrogate, alpha,
        getattr(surrogate_of(surrogate, alpha), "cuda", None), None if bits is None else Bits(*bits),
    )  # fmt: skip


@torch.library.custom_op("spikeattn::spiking_attention_forward", mutates_args=(), device_types=("cpu", "cuda"))
def spiking_attention_forward(
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
    surrogate: str,
    alpha: float,
    backend: str,
) -> Tensor:
    """Return [T, B, H, L, E], [T, B, L, H, E] in memory."""
    if not (q.numel() and k.numel()):
        return _empty_like(q).zero_()
    if backend == "numba":
        from spikeattn.ops.spiking_attention import cpu
        from spikeattn.ops.spiking_attention.cpu_inputs import spikes_of

        if cpu.takes(q.shape, k.shape[3], q.dtype, scale, fire, is_causal) and (spikes := spikes_of(q, k, v)):
            masks = (query_padding_mask, key_padding_mask)
            return cpu.spiking_attention_forward_cpu(
                spikes, scale, *masks, fire, is_causal, tau, v_threshold, v_reset
            )  # fmt: skip
    if _cupy_takes(q, k, backend):
        from spikeattn.ops.spiking_attention.cuda import attention_forward_cuda

        inputs = (q, k, v, scale, query_padding_mask, key_padding_mask)
        return attention_forward_cuda(*inputs, fire, order, is_causal, tau, v_threshold, v_reset)
    own = (masked(q, query_padding_mask), masked(k, key_padding_mask), masked(v, key_padding_mask))
    neuron = _neuron(q, tau, v_threshold, v_reset, detach_reset, surrogate, alpha, backend)
    with exact_sums(q):
        out = attend(*own, scale, fire, order, is_causal, neuron)
    return out.to(q.dtype).transpose(2, 3).contiguous().transpose(2, 3)


@spiking_attention_forward.register_fake
def _(
    q, k, v, scale, query_padding_mask, key_padding_mask,
    fire, order, is_causal, tau, v_threshold, v_reset, detach_reset, surrogate, alpha, backend,
):  # fmt: skip
    return _empty_like(q)


@torch.library.custom_op("spikeattn::spiking_attention_backward", mutates_args=(), device_types=("cpu", "cuda"))
def spiking_attention_backward(
    grad: Tensor,
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
    surrogate: str,
    alpha: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(grad_q, grad_k, grad_v)``, each laid out as its input, if that is in one piece."""
    if not (q.numel() and k.numel()):
        grad_q, grad_k, grad_v = (room_for_gradient(x).zero_() for x in (q, k, v))
        return grad_q, grad_k, grad_v
    if backend == "numba":
        from spikeattn.ops.spiking_attention import cpu_backward
        from spikeattn.ops.spiking_attention.cpu_inputs import spikes_of

        if cpu_backward.takes_backward(q.shape, k.shape[3], q.dtype, scale, fire) and (spikes := spikes_of(q, k, v)):
            return cpu_backward.spiking_attention_backward_cpu(
                grad, spikes, steps_of_gradients(q, k, v), scale, query_padding_mask, key_padding_mask,
                fire, is_causal, tau, v_threshold, v_reset, detach_reset, surrogate_of(surrogate, alpha),
            )  # fmt: skip
    if _cupy_takes(q, k, backend):
        return _gradients_on_cuda(
            None, grad, q, k, v, scale, query_padding_mask, key_padding_mask,
            fire, order, is_causal, tau, v_threshold, v_reset, detach_reset, surrogate, alpha, backend,
        )  # fmt: skip
    masks = (query_padding_mask, key_padding_mask, key_padding_mask)
    own_q, own_k, own_v = (masked(x, mask) for x, mask in zip((q, k, v), masks, strict=True))
    with exact_sums(q):
        neuron = _neuron(q, tau, v_threshold, v_reset, detach_reset, surrogate, alpha, backend)
        grads = attend_backward(grad.to(state_dtype(q)), own_q, own_k, own_v, scale, fire, order, is_causal, neuron)
    own = (masked(g, mask) for g, mask in zip(grads, masks, strict=True))
    grad_q, grad_k, grad_v = (room_for_gradient(x).copy_(g) for g, x in zip(own, (q, k, v), strict=True))
    return grad_q, grad_k, grad_v


@spiking_attention_backward.register_fake
def _(
    grad, q, k, v, scale, query_padding_mask, key_padding_mask,
    fire, order, is_causal, tau, v_threshold, v_reset, detach_reset, surrogate, alpha, backend,
):  # fmt: skip
    return room_for_gradient(q), room_for_gradient(k), room_for_gradient(v)


def _save(ctx, inputs, output) -> None:
    """Keep the inputs only: the backward computes products and potentials again."""
    q, k, v, scale, query_padding_mask, key_padding_mask, *ctx.settings = inputs
    ctx.keeps = "numbers"
    ctx.save_for_backward(q, k, v, scale, query_padding_mask, key_padding_mask)


def _run_eagerly(ctx, run, inputs) -> Tensor:
    """Keep spikes as bits where kernels run, which attend to bits. What is kept is the same if somebody watches."""
    q, k, v, *_, backend = inputs
    if any(ctx.needs_input_grad) and _cupy_takes(q, k, backend):
        return _run_on_cuda(ctx, run, inputs)
    if any(ctx.needs_input_grad) and backend == "numba":
        from spikeattn.ops.spiking_attention.cpu_inputs import spikes_of

        if spikes := spikes_of(q, k, v):
            return _run_on_cpu(ctx, run, inputs, spikes)
    out = run(*inputs)
    _save(ctx, inputs, out)
    return out


def _run_on_cuda(ctx, run, inputs) -> Tensor:
    """Keep bits besides ``q``, ``k`` and ``v``: only the device knows whether these hold numbers that are no spikes."""
    from spikeattn.ops.spiking_attention.cuda import attention_bits_cuda, attention_forward_cuda

    q, k, v, scale, query_padding_mask, key_padding_mask, *settings = inputs
    fire, order, is_causal, tau, v_threshold, v_reset, *_ = settings
    masks = (query_padding_mask, key_padding_mask)
    bits = attention_bits_cuda(q, k, v, *masks, fire, order, is_causal, True)
    if watched(inputs):
        out = run(*inputs)
    else:
        out = attention_forward_cuda(
            q, k, v, scale, *masks, fire, order, is_causal, tau, v_threshold, v_reset, bits
        )  # fmt: skip
    ctx.settings, ctx.keeps = settings, "bits and numbers"
    ctx.save_for_backward(*bits, q, k, v, scale, *masks)
    return out


def _run_on_cpu(ctx, run, inputs, spikes) -> Tensor:
    """Keep bits instead of ``q``, ``k`` and ``v``."""
    from spikeattn.ops.spiking_attention import cpu

    q, k, v, scale, query_padding_mask, key_padding_mask, *settings = inputs
    fire, _, is_causal, tau, v_threshold, v_reset, *_ = settings
    masks = (query_padding_mask, key_padding_mask)
    if cpu.takes(q.shape, k.shape[3], q.dtype, scale, fire, is_causal) and not watched(inputs):
        out = cpu.spiking_attention_forward_cpu(
            spikes, scale, *masks, fire, is_causal, tau, v_threshold, v_reset
        )  # fmt: skip
    else:
        out = run(*inputs)
    ctx.settings, ctx.keeps = settings, "bits"
    ctx.layouts, ctx.steps = [x[1:] for x in spikes], steps_of_gradients(q, k, v)
    ctx.save_for_backward(*(x.bits for x in spikes), scale, *masks)
    return out


def _backward(ctx, grad):
    """Hand over to the registered backward, or bits to kernels; None for an input that needs no gradient."""
    *kept, scale, query_padding_mask, key_padding_mask = ctx.saved_tensors  # once: checkpointing allows no second look
    inputs: tuple[Tensor, Tensor | None, Tensor | None] = (scale, query_padding_mask, key_padding_mask)
    if ctx.keeps == "bits":
        grads = _backward_of_bits(ctx, grad, kept, inputs)
    else:
        *bits, q, k, v = kept
        if bits and not (torch.is_grad_enabled() or watched((grad, q, k, v, *inputs))):
            grads = _gradients_on_cuda(bits, grad, q, k, v, *inputs, *ctx.settings)
        else:  # where there is a graph to be made, it says that it has no second derivative
            grads = _attention_backward(grad, q, k, v, *inputs, *ctx.settings)
    needed = [g if need else None for g, need in zip(grads, ctx.needs_input_grad[:3], strict=True)]
    return (*needed, *(None,) * (3 + len(ctx.settings)))


def _backward_of_bits(
    ctx, grad: Tensor, kept: Sequence[Tensor], inputs: tuple[Tensor, Tensor | None, Tensor | None]
) -> Sequence[Tensor]:
    """Gradients of spikes of which bits were kept; as numbers, where somebody has to see the operation."""
    from spikeattn._cpu.packed import Packed, unpacked
    from spikeattn.ops.spiking_attention import cpu_backward
    from spikeattn.ops.spiking_attention.cpu_inputs import Spikes

    spikes = Spikes(*(Packed(bits, *layout) for bits, layout in zip(kept, ctx.layouts, strict=True)))
    fire, _, is_causal, tau, v_threshold, v_reset, detach_reset, surrogate, alpha, _ = ctx.settings
    q, k, _ = spikes
    twice = torch.is_grad_enabled()  # the registered operation says that it has no second derivative
    takes = cpu_backward.takes_backward(q.shape, k.shape[3], q.dtype, inputs[0], fire)
    if takes and not (twice or watched((grad, *inputs))):
        return cpu_backward.spiking_attention_backward_cpu(
            grad, spikes, ctx.steps, *inputs,
            fire, is_causal, tau, v_threshold, v_reset, detach_reset, surrogate_of(surrogate, alpha),
        )  # fmt: skip
    # Whether they want a gradient is what counters of operations ask.
    numbers = (unpacked(x).requires_grad_(need) for x, need in zip(spikes, ctx.needs_input_grad, strict=False))
    return _attention_backward(grad, *numbers, *inputs, *ctx.settings)


_attention_backward = direct(spiking_attention_backward)
_attention = differentiable(spiking_attention_forward, _save, _backward, _run_eagerly)
