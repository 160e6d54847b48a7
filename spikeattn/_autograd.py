"""Registered operations with a backward, called at little cost."""

from collections.abc import Callable
from typing import Any

import torch


def differentiable(
    op: torch.library.CustomOpDef,
    save: Callable[..., None],
    gradient: Callable[..., Any],
    save_eagerly: Callable[..., None] | None = None,
) -> Callable[..., Any]:
    """Give the registered ``op`` a backward, and return what calls it.

    A call through the autograd of `torch.library` costs 80 µs more than one through a `torch.autograd.Function`, so
    only `torch.compile`, which needs that one, gets it.

    Args:
        op: Made by ``torch.library.custom_op``.
        save: ``save(ctx, inputs, output)``, as in ``torch.library.register_autograd``.
        gradient: ``gradient(ctx, *grads)``, likewise.
        save_eagerly: What saves where it may look at values: outside `torch.compile`, and with tensors that are real;
            ``save`` if None.
    """
    op.register_autograd(gradient, setup_context=save)

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):  # with a setup_context, PyTorch would inspect a signature at each call
            output = op(*inputs)
            first = output[0] if isinstance(output, tuple) else output
            (save_eagerly if save_eagerly and type(first) is torch.Tensor else save)(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx, *grads):
            return gradient(ctx, *grads)

    def call(*inputs):
        return op(*inputs) if torch.compiler.is_compiling() or not torch.is_grad_enabled() else Eager.apply(*inputs)

    return call
