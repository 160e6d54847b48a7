"""Products with the same weights at every step of a recurrence, whose gradient is taken once."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class RepeatedProduct:
    """``x @ weight`` for M matrices at once, called at every step of a recurrence.

    Autograd would compute a gradient as large as ``weight`` at every step, and add them up. Here a step hands its ``x``
    and gradient on, as the gradient of a slot of its own, and all slots together are multiplied in the end. Under
    autocast the weight is converted once. No second derivative.

    Args:
        weight: [M, D, E].
        steps: How often it is called at most.
        rows: Rows B of every ``x``.

    Example:
        >>> weight = torch.ones(1, 3, 2, requires_grad=True)
        >>> product = RepeatedProduct(weight, steps=4, rows=1)
        >>> sum(product(torch.full((1, 1, 3), float(t))) for t in range(4)).sum().backward()
        >>> weight.grad.unique().item()  # 0 + 1 + 2 + 3
        6.0
    """

    def __init__(self, weight: Tensor, steps: int, rows: int) -> None:
        if torch.is_autocast_enabled(weight.device.type):
            weight = weight.to(torch.get_autocast_dtype(weight.device.type))
        self._weight = weight.detach()
        self._slots = iter(_Slots.apply(weight, steps, rows).unbind())

    def __call__(self, x: Tensor) -> Tensor:
        """``x`` [M, B, D] times the weight, [M, B, E]."""
        return _Step.apply(x.to(self._weight.dtype), next(self._slots), self._weight)


class _Slots(torch.autograd.Function):
    """A slot a step, [steps, M, B, D + E], which hold nothing: their gradients are ``x`` and that of the product."""

    @staticmethod
    def forward(ctx, weight, steps, rows):
        M, D, E = weight.shape
        ctx.widths = [D, E]
        return weight.new_zeros(()).expand(steps, M, rows, D + E)

    @staticmethod
    @once_differentiable
    def backward(ctx, seen):
        x, grad = seen.transpose(0, 1).flatten(1, 2).split(ctx.widths, dim=-1)
        return torch.bmm(x.mT, grad), None, None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, slot, weight):
        ctx.save_for_backward(x, weight)
        return torch.bmm(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x = torch.bmm(grad, weight.mT) if ctx.needs_input_grad[0] else None
        seen = torch.cat([x, grad], dim=-1) if ctx.needs_input_grad[1] else None
        return grad_x, seen, None
