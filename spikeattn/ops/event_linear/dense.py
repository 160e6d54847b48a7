"""``torch.nn.functional.linear`` of 16-bit numbers on a CPU, its large results in memory that is used again.

PyTorch gets fresh memory for them, and Linux fills it with zeros: that takes longer than the product.
"""

import torch
from torch import Tensor


class DenseLinear(torch.autograd.Function):
    """``x`` [rows, inputs] times ``weight`` [outputs, inputs], plus ``bias``; the bits of ``functional.linear``."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Keeps ``x`` and ``weight``."""
        from spikeattn._cpu.memory import empty

        ctx.save_for_backward(x, weight)
        y = empty((x.shape[0], weight.shape[0]), x.dtype)
        return torch.mm(x, weight.t(), out=y) if bias is None else torch.addmm(bias, x, weight.t(), out=y)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of the three, as of `torch.addmm`."""
        from spikeattn._cpu.memory import empty

        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        grad_x = torch.mm(grad, weight, out=empty(x.shape, x.dtype)) if needs_x else None
        return grad_x, grad.t() @ x if needs_weight else None, grad.sum(0) if needs_bias else None
