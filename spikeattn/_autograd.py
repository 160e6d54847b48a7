"""Registered operations with a backward, called at little cost."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_PLAIN = (Tensor, torch.nn.Parameter)
_plain_keys: dict[int, bool] = {}  # whether so marked a tensor is plain


def watched(inputs: tuple) -> bool:
    """Whether somebody has to see a call as one operation, or a tensor's memory is not what it says."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0  # of this thread; PyTorch's own flag, of the process, can stay set
        or torch._C._len_torch_function_stack() > 0  # a default device, too, which would reach what kernels allocate
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
        or torch.autograd._profiler_enabled()
        or not all(_is_plain(x) for x in inputs if isinstance(x, Tensor))
    )


def _is_plain(x: Tensor) -> bool:
    """Whether ``x`` is PyTorch's own and its memory holds its values: no negative, batched or all-zero view."""
    if type(x) not in _PLAIN:
        return False
    keys = torch._C._dispatch_keys(x)
    mark = keys.raw_repr()
    if mark not in _plain_keys:
        names = {name.strip() for name in str(keys).partition("(")[2].rstrip(")").split(",")}
        backend = x.device.type.upper()
        _plain_keys[mark] = names <= {backend, "ADInplaceOrView", f"Autograd{backend}", f"Autocast{backend}"}
    return _plain_keys[mark]


def direct(op: torch.library.CustomOpDef) -> Callable[..., Any]:
    """Return what calls the registered ``op``, past PyTorch's dispatcher where nobody watches.

    A call through the dispatcher costs up to 0.1 ms, as much as a small kernel. It is taken where somebody has to see
    the call as one operation: `torch.compile`, a trace, a dispatch mode (counters, fake tensors), a transform of
    `torch.func`, a profiler, a tensor that is not PyTorch's own, and where a gradient would be asked of ``op``.
    """
    function = op._init_fn

    def call(*inputs):
        return op(*inputs) if torch.is_grad_enabled() or watched(inputs) else function(*inputs)

    return call


def differentiable(
    op: torch.library.CustomOpDef,
    save: Callable[..., None],
    gradient: Callable[..., Any],
    run_eagerly: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Give the registered ``op`` a backward, and return what calls it.

    A call through the autograd of `torch.library` costs 80 µs more than one through a `torch.autograd.Function`, so
    only `torch.compile`, which needs that one, gets it.

    Args:
        op: Made by ``torch.library.custom_op``.
        save: ``save(ctx, inputs, output)``, as in ``torch.library.register_autograd``.
        gradient: ``gradient(ctx, *grads)``, likewise.
        run_eagerly: ``run_eagerly(ctx, run, inputs)`` returns the output and saves, where it may look at values:
            outside `torch.compile`, and with tensors that are real. ``run(*inputs)`` calls ``op``. If None, that and
            ``save``.
    """
    op.register_autograd(gradient, setup_context=save)
    run = direct(op)

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):  # with a setup_context, PyTorch would inspect a signature at each call
            if run_eagerly and all(type(x) in _PLAIN for x in inputs if isinstance(x, Tensor)):
                return run_eagerly(ctx, run, inputs)
            output = run(*inputs)
            save(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx, *grads):
            return gradient(ctx, *grads)

    def call(*inputs):
        if torch.compiler.is_compiling():
            return op(*inputs)
        return Eager.apply(*inputs) if torch.is_grad_enabled() else run(*inputs)

    return call
