"""Products with the same weights at every step of a recurrence, whose gradient is taken once."""

import torch
from torch import Tensor


class RepeatedProduct:
    """``x @ weight`` for M matrices at once, called at every step of a recurrence.

    Autograd would compute a gradient as large as ``weight`` at every step, and add them up. This keeps each step's
    ``x`` and gradient, and multiplies all of them in the end. Under autocast the weight is converted once.

    Args:
        weight: [M, D, E].

    Example:
        >>> weight = torch.ones(1, 3, 2, requires_grad=True)
        >>> product = RepeatedProduct(weight)
        >>> sum(product(torch.full((1, 1, 3), float(t))) for t in range(4)).sum().backward()
        >>> weight.grad.unique().item()  # 0 + 1 + 2 + 3
        6.0
    """

    def __init__(self, weight: Tensor) -> None:
        if torch.is_autocast_enabled(weight.device.type):
            weight = weight.to(torch.get_autocast_dtype(weight.device.type))
        self.weight = weight.detach()
        self.seen: list[tuple[Tensor, Tensor]] = []
        # Every step depends on this, so its backward comes after theirs.
        self._start = _Start.apply(weight, self)

    def __call__(self, x: Tensor) -> Tensor:
        """``x`` [M, B, D] times the weight, [M, B, E]."""
        return _Step.apply(x.to(self.weight.dtype), self._start, self)


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, product):
        ctx.product = product
        return weight.new_empty(0)

    @staticmethod
    def backward(ctx, _):
        seen, ctx.product.seen = ctx.product.seen, []
        x, grad = (torch.cat(parts, dim=1) for parts in zip(*seen, strict=True))
        return torch.bmm(x.mT, grad), None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, start, product):
        ctx.save_for_backward(x, start)
        ctx.product = product
        return torch.bmm(x, product.weight)

    @staticmethod
    def backward(ctx, grad):
        x, start = ctx.saved_tensors
        if ctx.needs_input_grad[1]:
            ctx.product.seen.append((x, grad))
        grad_x = torch.bmm(grad, ctx.product.weight.mT) if ctx.needs_input_grad[0] else None
        return grad_x, torch.zeros_like(start), None
