"""The registered operations behind `spiking_attention`: which kernels take a call, and else matrix products.

PyTorch wants their arguments one by one; behind them a call is two tuples (`call.py`).
"""

from functools import cache

import torch
from torch import Tensor

from spikeattn.ops.lif.op import lif_backward, lif_forward
from spikeattn.ops.lif.reference import state_dtype
from spikeattn.ops.spiking_attention.call import Inputs, Settings
from spikeattn.ops.spiking_attention.layout import room_for_gradient, steps_of_gradients
from spikeattn.ops.spiking_attention.reference import Neuron, attend, attend_backward, exact_sums


def _neuron(time_steps: int, settings: Settings) -> Neuron:
    """A LIF layer from rest on a backend."""
    reset = (settings.v_threshold, settings.v_reset, settings.detach_reset)
    own = (time_steps, settings.tau, True, *reset, settings.surrogate, settings.alpha)

    def fire(current: Tensor) -> Tensor:
        return lif_forward(current, None, None, *own, False, settings.backend)[0]

    def gradient(grad_spikes: Tensor, current: Tensor) -> Tensor:
        return lif_backward(grad_spikes, None, None, current, None, None, *own, settings.backend)[0]

    return Neuron(fire, gradient)


def _empty_like(x: Tensor) -> Tensor:
    """Room for [T, B, H, L, E], [T, B, L, H, E] in memory."""
    T, B, H, L, E = x.shape
    return x.new_empty((T, B, L, H, E)).transpose(2, 3)


def cupy_takes(q: Tensor, k: Tensor, backend: str) -> bool:
    """Whether the CUDA kernels of this operation run it; else products do, and the neurons' kernels."""
    if backend != "cupy" or not _has_tensor_cores(q.device):
        return False
    from spikeattn.ops.spiking_attention.cuda_plans import takes

    return q.numel() > 0 and k.numel() > 0 and takes(q.shape, k.shape[3])


@cache
def _has_tensor_cores(device: torch.device) -> bool:
    """Whether a device multiplies bytes and bfloat16: from Ampere on. The emulator of the tests does."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


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
    inputs = Inputs(q, k, v, scale, query_padding_mask, key_padding_mask)
    settings = Settings(fire, order, is_causal, tau, v_threshold, v_reset, detach_reset, surrogate, alpha, backend)
    if not (q.numel() and k.numel()):
        return _empty_like(q).zero_()
    if backend == "numba":
        from spikeattn.ops.spiking_attention import cpu

        if cpu.takes(q.shape, k.shape[3], q.dtype, scale, fire, is_causal):
            out = cpu.spiking_attention_forward_cpu((q, k, v), scale, inputs.masks, settings)
            if out is not None:
                return out
    if cupy_takes(q, k, backend):
        from spikeattn.ops.spiking_attention.cuda import attention_forward_cuda

        return attention_forward_cuda(inputs, settings)
    with exact_sums(q):
        out = attend(*inputs.masked(q, k, v), scale, fire, order, is_causal, _neuron(q.shape[0], settings))
    return out.to(q.dtype).transpose(2, 3).contiguous().transpose(2, 3)


@spiking_attention_forward.register_fake
def _(q, *_):
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
    inputs = Inputs(q, k, v, scale, query_padding_mask, key_padding_mask)
    settings = Settings(fire, order, is_causal, tau, v_threshold, v_reset, detach_reset, surrogate, alpha, backend)
    if not (q.numel() and k.numel()):
        grad_q, grad_k, grad_v = (room_for_gradient(x).zero_() for x in (q, k, v))
        return grad_q, grad_k, grad_v
    if backend == "numba":
        from spikeattn.ops.spiking_attention import cpu_backward
        from spikeattn.ops.spiking_attention.cpu_inputs import spikes_of

        if cpu_backward.takes_backward(q.shape, k.shape[3], q.dtype, scale, fire) and (spikes := spikes_of(q, k, v)):
            steps = steps_of_gradients(q, k, v)
            return cpu_backward.spiking_attention_backward_cpu(grad, spikes, steps, scale, inputs.masks, settings)
    if cupy_takes(q, k, backend):
        from spikeattn.ops.spiking_attention.cuda import attention_gradients_cuda

        return attention_gradients_cuda(grad, inputs, settings)
    own, neuron = inputs.masked(q, k, v), _neuron(q.shape[0], settings)
    with exact_sums(q):
        grads = attend_backward(grad.to(state_dtype(q)), *own, scale, fire, order, is_causal, neuron)
    grads = inputs.masked(*grads)
    grad_q, grad_k, grad_v = (room_for_gradient(x).copy_(g) for x, g in zip((q, k, v), grads, strict=True))
    return grad_q, grad_k, grad_v


@spiking_attention_backward.register_fake
def _(grad, q, k, v, *_):
    return room_for_gradient(q), room_for_gradient(k), room_for_gradient(v)
