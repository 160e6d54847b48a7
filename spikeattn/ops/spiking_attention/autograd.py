"""`spiking_attention` with its gradient, and what a call keeps for that: its inputs, or a bit for each spike."""

from collections.abc import Sequence

import torch
from torch import Tensor

from spikeattn._autograd import differentiable, direct, watched
from spikeattn.ops.spiking_attention.call import Inputs, Settings, as_call
from spikeattn.ops.spiking_attention.layout import steps_of_gradients
from spikeattn.ops.spiking_attention.registered import (
    cupy_takes,
    spiking_attention_backward,
    spiking_attention_forward,
)


def _save(ctx, inputs, output) -> None:
    """Keep the inputs only: the backward computes products and potentials again."""
    tensors, ctx.settings = as_call(inputs)
    ctx.keeps = "numbers"
    ctx.save_for_backward(*tensors)


def _run_eagerly(ctx, run, arguments) -> Tensor:
    """Keep spikes as bits where kernels run, which attend to bits. What is kept is the same if somebody watches."""
    inputs, settings = as_call(arguments)
    q, k, v, *_ = inputs
    if any(ctx.needs_input_grad) and cupy_takes(q, k, settings.backend):
        return _run_on_cuda(ctx, run, inputs, settings)
    if any(ctx.needs_input_grad) and settings.backend == "numba":
        from spikeattn.ops.spiking_attention.cpu_inputs import spikes_of

        if spikes := spikes_of(q, k, v):
            return _run_on_cpu(ctx, run, inputs, settings, spikes)
    out = run(*arguments)
    _save(ctx, arguments, out)
    return out


def _run_on_cuda(ctx, run, inputs: Inputs, settings: Settings) -> Tensor:
    """Keep bits besides ``q``, ``k`` and ``v``: only the device knows whether these hold numbers that are no spikes."""
    from spikeattn.ops.spiking_attention.cuda import attention_bits_cuda, attention_forward_cuda

    rows = inputs.in_one_piece()
    bits = attention_bits_cuda(rows, settings, True)
    out = run(*inputs, *settings) if watched(inputs) else attention_forward_cuda(rows, settings, bits)
    ctx.settings, ctx.keeps = settings, "bits and numbers"
    ctx.save_for_backward(*bits, *inputs)
    return out


def _run_on_cpu(ctx, run, inputs: Inputs, settings: Settings, spikes) -> Tensor:
    """Keep bits instead of ``q``, ``k`` and ``v``."""
    from spikeattn.ops.spiking_attention import cpu

    q, k, v, scale, *masks = inputs
    out, takes = None, cpu.takes(q.shape, k.shape[3], q.dtype, scale, settings.fire, settings.is_causal)
    if takes and not watched(inputs):
        out = cpu.spiking_attention_forward_cpu(spikes, scale, inputs.masks, settings)
    if out is None:
        out = run(*inputs, *settings)
    ctx.settings, ctx.keeps = settings, "bits"
    ctx.layouts, ctx.steps = [x[1:] for x in spikes], steps_of_gradients(q, k, v)
    ctx.save_for_backward(*(x.bits for x in spikes), scale, *masks)
    return out


def _backward(ctx, grad):
    """Hand over to the registered backward, or bits to kernels; None for an input that needs no gradient."""
    kept = ctx.saved_tensors  # once: checkpointing allows no second look
    grads = _backward_of_bits(ctx, grad, kept) if ctx.keeps == "bits" else _backward_of_numbers(ctx, grad, kept)
    needed = [g if need else None for g, need in zip(grads, ctx.needs_input_grad[:3], strict=True)]
    return (*needed, *(None,) * (3 + len(ctx.settings)))


def _backward_of_numbers(ctx, grad: Tensor, kept) -> Sequence[Tensor]:
    """Gradients of ``q``, ``k`` and ``v``; with their bits, if these were kept and nobody has to see the operation."""
    count = len(Inputs._fields)
    bits, inputs = kept[:-count], Inputs(*kept[-count:])
    # Where there is a graph to be made, the registered operation says that it has no second derivative.
    if not bits or torch.is_grad_enabled() or watched((grad, *inputs)):
        return _attention_backward(grad, *inputs, *ctx.settings)
    from spikeattn.ops.spiking_attention.cuda import Bits, attention_gradients_cuda

    return attention_gradients_cuda(grad, inputs, ctx.settings, Bits(*bits))


def _backward_of_bits(ctx, grad: Tensor, kept) -> Sequence[Tensor]:
    """Gradients of spikes of which bits were kept; as numbers, where somebody has to see the operation."""
    from spikeattn._cpu.packed import Packed, unpacked
    from spikeattn.ops.spiking_attention import cpu_backward
    from spikeattn.ops.spiking_attention.cpu_inputs import Spikes

    *bits, scale, query_padding_mask, key_padding_mask = kept
    masks = (query_padding_mask, key_padding_mask)
    spikes = Spikes(*(Packed(own, *layout) for own, layout in zip(bits, ctx.layouts, strict=True)))
    q, k, _ = spikes
    twice = torch.is_grad_enabled()  # the registered operation says that it has no second derivative
    takes = cpu_backward.takes_backward(q.shape, k.shape[3], q.dtype, scale, ctx.settings.fire)
    if takes and not (twice or watched((grad, scale, *masks))):
        return cpu_backward.spiking_attention_backward_cpu(grad, spikes, ctx.steps, scale, masks, ctx.settings)
    # Whether they want a gradient is what counters of operations ask.
    numbers = (unpacked(x).requires_grad_(need) for x, need in zip(spikes, ctx.needs_input_grad, strict=False))
    return _attention_backward(grad, *numbers, scale, *masks, *ctx.settings)


_attention_backward = direct(spiking_attention_backward)
attention = differentiable(spiking_attention_forward, _save, _backward, _run_eagerly)
