"""Sums, conversions and products of large tensors, on a CPU with results in memory that is used again.

PyTorch gets fresh memory for them, and Linux fills it with zeros, which takes longer than they do. All have the bits of
what they stand for, which is what runs for small tensors, other layouts and devices, and wherever somebody has to see
the operation. Only, their results cannot be resized.
"""

import torch
from torch import Tensor
from torch.nn import functional

from spikeattn._autograd import watched

_LARGE = 1 << 20  # bytes of a result; the C library keeps smaller blocks


def _recycles(numbers: int, *tensors: Tensor | None) -> bool:
    """Whether a result of so many numbers, at least 16-bit ones, is made of these in memory that is used again."""
    return (
        2 * numbers >= _LARGE
        and all(x is None or (x.device.type == "cpu" and x.is_floating_point() and x.is_contiguous()) for x in tensors)
        and not watched(tensors)
    )


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    from spikeattn._cpu.memory import empty

    return empty(shape, dtype)


class _Converted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = x.dtype
        return _empty(x.shape, dtype).copy_(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return converted(grad, ctx.dtype), None


class _Added(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor) -> Tensor:
        ctx.dtypes = x.dtype, y.dtype
        out = _empty(x.shape, torch.promote_types(x.dtype, y.dtype))
        return torch.add(x, y, out=out) if x.dtype == y.dtype else out.copy_(y).add_(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return tuple(
            converted(grad, dtype) if need else None
            for dtype, need in zip(ctx.dtypes, ctx.needs_input_grad, strict=True)
        )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        y = _empty((x.shape[0], weight.shape[0]), x.dtype)
        return torch.mm(x, weight.t(), out=y) if bias is None else torch.addmm(bias, x, weight.t(), out=y)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        if torch.is_grad_enabled() or watched((grad, x, weight)):  # to be differentiated again, or in batches
            grad_x = grad @ weight
        else:
            grad_x = torch.mm(grad, weight, out=_empty(x.shape, x.dtype)) if needs_x else None
        return grad_x, grad.t() @ x if needs_weight else None, grad.sum(0) if needs_bias else None


def converted(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x.to(dtype)``."""
    return _Converted.apply(x, dtype) if x.dtype != dtype and _recycles(x.numel(), x) else x.to(dtype)


def added(x: Tensor, y: Tensor) -> Tensor:
    """``x + y``."""
    return _Added.apply(x, y) if x.shape == y.shape and _recycles(x.numel(), x, y) else x + y


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``torch.nn.functional.linear``, of float32 and float64 as it is there."""
    if not x.shape[-1] or not _recycles(x.numel() // x.shape[-1] * weight.shape[0], x, weight, bias):
        return functional.linear(x, weight, bias)
    dtype = x.dtype
    if torch.is_autocast_enabled("cpu") and dtype != torch.float64:
        dtype = torch.get_autocast_dtype("cpu")
    if dtype not in (torch.bfloat16, torch.float16):
        return functional.linear(x, weight, bias)
    own_bias = None if bias is None else bias.to(dtype)
    y = _Linear.apply(converted(x, dtype).view(-1, x.shape[-1]), weight.to(dtype), own_bias)
    return y.view(*x.shape[:-1], weight.shape[0])
