"""GRUs of which a step, forward or backward, is a handful of operations.

The gates of a step lie side by side, ``[n, r, z, m]``: what the candidate takes from the input, reset, update, and what
the candidate takes from the state. Products with the input go to ``[n, r, z]``, those with the state to ``[r, z, m]``,
and add up in place. A GPU takes a few microseconds for each operation, whatever its size: their number is what counts.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad


def gru(
    x: Float[Tensor, "M B L E"],
    state: Float[Tensor, "M B D"],
    weight_ih: Float[Tensor, "M 3*D E"],
    weight_hh: Float[Tensor, "M 3*D D"],
    bias_ih: Float[Tensor, "M 3*D"],
    bias_hh: Float[Tensor, "M 3*D"],
) -> Float[Tensor, "M B L D"]:
    """States of M GRUs after each of the inputs ``x``; weights are those of M torch.nn.GRUCell. No second derivative.

    Under autocast products are of its type, and states are not.

    Example:
        >>> cell, x = torch.nn.GRUCell(3, 2), torch.randn(5, 3)
        >>> states = gru(x[None, :, None], torch.zeros(1, 5, 2), *(weight[None] for weight in cell.parameters()))
        >>> torch.allclose(states[0, :, 0], cell(x), atol=1e-6)
        True
    """
    weights = [for_products(weight) for weight in (candidate_first(weight_ih), weight_hh)]
    return _GRU.apply(x, state, *weights, gate_bias(bias_ih, bias_hh))


def for_products(weight: Tensor) -> Tensor:
    """``weight`` in the type of products: autocast's, if it is on."""
    device = weight.device.type
    return weight.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else weight


def candidate_first(weight: Tensor) -> Tensor:
    """Rows ``[r, z, n]`` of M torch.nn.GRUCells' weight or bias of the input [M, 3 D, ...] as ``[n, r, z]``."""
    return weight.roll(weight.shape[1] // 3, 1)


def gate_bias(bias_ih: Tensor, bias_hh: Tensor) -> Tensor:
    """Biases [M, 3 D] of M torch.nn.GRUCells, as they are added to the gates [M, 4 D]."""
    D = bias_ih.shape[1] // 3
    return pad(candidate_first(bias_ih), (0, D)) + pad(bias_hh, (D, 0))


def gru_step(gates: Float[Tensor, "... 4 D"], state: Float[Tensor, "... D"], out: Float[Tensor, "... D"]) -> None:
    """A step from ``state`` to ``out``; replaces what was added up in ``gates`` by n, r and z (m stays)."""
    new, reset, update, from_state = gates.unbind(-2)
    gates[..., 1:3, :].sigmoid_()
    new.addcmul_(reset, from_state).tanh_()
    torch.lerp(new, state, update, out=out)


def gate_derivatives(gates: Float[Tensor, "... 4 D"], state: Float[Tensor, "... D"]) -> Float[Tensor, "... 4 D"]:
    """Derivatives of what a step gives by what its gates add up; ``gates`` are as it leaves them.

    Its derivative by ``state`` alone is z.
    """
    new, reset, update, from_state = gates.unbind(-2)
    out = torch.empty_like(gates)
    by_new, by_reset, by_update, by_from_state = out.unbind(-2)
    torch.mul(1 - update, 1 - new * new, out=by_new)
    torch.mul(by_new, reset, out=by_from_state)
    torch.mul(by_from_state * from_state, 1 - reset, out=by_reset)
    torch.mul(state - new, update - update * update, out=by_update)
    return out


def weight_gradient(grad: Float[Tensor, "M N E"], x: Float[Tensor, "M N D"]) -> Float[Tensor, "M E D"]:
    """Gradient of a weight that ``x`` was multiplied with, by that of the products."""
    if grad.device.type == "cpu" and grad.dtype == torch.bfloat16:
        grad = grad.contiguous()  # else oneDNN takes up to eight times as long
    return torch.bmm(grad.mT, x)


def without_autocast(method: Callable[..., Any]) -> Callable[..., Any]:
    """The forward or backward method of a torch.autograd.Function that chooses its types itself."""

    @wraps(method)
    def wrapped(ctx: Any, *tensors: Tensor) -> Any:
        with torch.autocast(tensors[0].device.type, enabled=False):
            return method(ctx, *tensors)

    return wrapped


def first_derivative_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """The backward method of a torch.autograd.Function, which PyTorch cannot differentiate again.

    torch.autograd.function.once_differentiable says nothing where the gradient that comes in needs none itself.
    """

    @wraps(backward)
    def wrapped(ctx: Any, *grads: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("DialogueRNN: GRUs have no second derivative; call backward without create_graph=True.")
        return backward(ctx, *grads)

    return wrapped


class _GRU(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx, x, state, weight_ih, weight_hh, bias):
        (M, B, L, _), D = x.shape, state.shape[-1]
        x = x.to(weight_ih.dtype).flatten(1, 2)
        sums = bias.to(x.dtype)[:, None].expand(M, B * L, 4 * D).clone()
        sums[..., : 3 * D].baddbmm_(x, weight_ih.mT)
        sums = sums.view(M, B, L, 4 * D)
        gates = sums if sums.dtype == state.dtype else torch.empty_like(sums, dtype=state.dtype)
        states = state.new_empty(M, B, L + 1, D)
        states[:, :, 0] = state
        for t in range(L):
            sums[:, :, t, D:].baddbmm_(states[:, :, t].to(x.dtype), weight_hh.mT)
            if gates is not sums:
                gates[:, :, t] = sums[:, :, t]
            gru_step(gates[:, :, t].unflatten(-1, (4, D)), states[:, :, t], states[:, :, t + 1])
        ctx.save_for_backward(x, weight_ih, weight_hh, gates, states)
        return states[:, :, 1:].clone()  # no view, which could not be changed in place; backward reads the states

    @staticmethod
    @without_autocast
    @first_derivative_only
    def backward(ctx, grad):
        x, weight_ih, weight_hh, gates, states = ctx.saved_tensors
        M, B, L, D = grad.shape
        slopes = gate_derivatives(gates.unflatten(-1, (4, D)), states[:, :, :-1])
        d_sums = torch.empty_like(gates, dtype=x.dtype)
        d_states = pad(grad, (0, 0, 1, 0))
        for t in reversed(range(L)):
            after, before = d_states[:, :, t + 1], d_states[:, :, t]
            torch.mul(slopes[:, :, t], after.unsqueeze(-2), out=d_sums[:, :, t].unflatten(-1, (4, D)))
            before.addcmul_(gates[:, :, t, 2 * D : 3 * D], after)
            before += torch.bmm(d_sums[:, :, t, D:], weight_hh)
        d_sums = d_sums.view(M, B * L, 4 * D)
        d_input, d_state = d_sums[..., : 3 * D], d_sums[..., D:]
        wanted = ctx.needs_input_grad
        return (
            torch.bmm(d_input, weight_ih).unflatten(1, (B, L)) if wanted[0] else None,
            d_states[:, :, 0] if wanted[1] else None,
            weight_gradient(d_input, x) if wanted[2] else None,
            weight_gradient(d_state, states[:, :, :-1].to(x.dtype).flatten(1, 2)) if wanted[3] else None,
            d_sums.sum(1, dtype=gates.dtype) if wanted[4] else None,
        )
