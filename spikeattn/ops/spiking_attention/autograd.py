"""`spiking_attention` with its gradient, and what a call keeps for that: its inputs, or a bit for each spike."""

from collections.abc import Sequence

import torch
from torch import Tensor

from spikeattn._autograd import differentiable, direct, watched
from spikeattn.ops.spiking_attention.layout import steps_of_gradients
from spikeattn.ops.spiking_attention.registered import (
    cupy_takes,
    gradients_on_cuda,
    spiking_attention_backward,
    spiking_attention_forward,
)
from spikeattn.ops.surrogate import surrogate_of


def _save(ctx, inputs, output) -> None:
    """Keep the inputs only: the backward computes products and potentials again."""
    q, k, v, scale, query_padding_mask, key_padding_mask, *ctx.settings = inputs
    ctx.keeps = "numbers"
    ctx.save_for_backward(q, k, v, scale, query_padding_mask, key_padding_mask)


def _run_eagerly(ctx, run, inputs) -> Tensor:
    """Keep spikes as bits where kernels run, which attend to bits. What is kept is the same if somebody watches."""
    q, k, v, *_, backend = inputs
    if any(ctx.needs_input_grad) and cupy_takes(q, k, backend):
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
            grads = gradients_on_cuda(bits, grad, q, k, v, *inputs, *ctx.settings)
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
attention = differentiable(spiking_attention_forward, _save, _backward, _run_eagerly)
