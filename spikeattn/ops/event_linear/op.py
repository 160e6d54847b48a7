"""The public function `event_linear`, and the registered operations behind it."""

import torch
from jaxtyping import Float
from torch import Tensor

from spikeattn import _checks
from spikeattn._autograd import differentiable, direct
from spikeattn._backends import Backend, resolve_backend
from spikeattn._compile import constant
from spikeattn._recycled import linear

_WORD = 64  # bits in which a kernel keeps what fired
# From this share of spikes on, the gradient of the weights is a plain matrix product, as it is for other numbers.
_DENSE = 0.5


def event_linear(
    x: Float[Tensor, "*N inputs"],
    weight: Float[Tensor, "outputs inputs"],
    bias: Float[Tensor, "outputs"] | None = None,
    *,
    backend: Backend = "auto",
) -> Float[Tensor, "*N outputs"]:
    r"""Linear layer that costs by the inputs that are not zero: ``y = x W^T + b``.

    ::

        y[o] = b[o] + sum of W[o, i] x[i] over the i with x[i] != 0

    Source: the sum over spikes that makes an SNN's synaptic operations additions (Roy et al. 2019, "Towards
    spike-based machine intelligence with neuromorphic computing", Nature 575).

    Args:
        x: Spikes, counts of them, or any numbers (dimensionless).
        weight: As in ``torch.nn.functional.linear``.
        bias: Likewise.
        backend: "numba", kernels for float32 on a CPU, or "torch", ``torch.nn.functional.linear``. "auto" takes the
            kernels where they run.

    Returns:
        Tensor: ``y`` [*N, outputs], dtype of ``x``, or that of autocast.

    Gradient:
        To ``x``, ``weight`` and ``bias``. Where ``x`` is nothing but 0 and 1, one bit a number is kept of it. No second
        derivative, no `torch.func`.

    Numerics:
        The kernels add in the order of the inputs, from the bias on, each product with one rounding: a row gives the
        same bits alone and in any batch, on any number of threads. ``torch.nn.functional.linear`` adds in an order that
        depends on the number of rows. All this for finite weights: others show in a row where its input is not zero,
        and may show where it is.

    Raises:
        ValueError: The last axis of ``x``, or ``bias``, does not fit ``weight``; tensors on different devices.
        TypeError: ``x`` is no floating tensor; dtypes differ (outside autocast).
        BackendUnavailableError: The named backend cannot run here; the message says why.

    Example:
        >>> event_linear(torch.tensor([0.0, 1.0, 1.0]), torch.tensor([[1.0, 2.0, 3.0]])).item()
        5.0
    """
    _checks.check_floating("event_linear", "x", x)
    _checks.check_linear("event_linear", x, weight, bias)
    chosen = resolve_backend(backend, x.device, "event_linear", lambda name: event_linear_kernels_take(name, x))
    if chosen == "torch" or not (x.numel() and weight.numel()):
        return linear(x, weight, bias)
    keep = torch.is_grad_enabled() and weight.requires_grad
    y, _, _ = _event_linear(x.reshape(-1, x.shape[-1]), weight, bias, keep)
    return y.view(*x.shape[:-1], weight.shape[0])


def event_linear_kernels_take(backend: Backend, x: Tensor) -> tuple[bool, str]:
    """Whether the kernels of ``backend`` take such a call, and if not why."""
    if backend == "cupy":
        return False, "on a GPU a dense product is faster"
    if x.dtype != torch.float32 or torch.is_autocast_enabled(x.device.type):
        return False, "only float32: a dense product of 16-bit numbers is as fast, and float64 is the plain definition"
    why_not = _why_no_vectors()
    return not why_not, why_not


@constant
def _why_no_vectors() -> str:
    from spikeattn._cpu.vectors import WHY_NOT

    return WHY_NOT


@torch.library.custom_op("spikeattn::event_linear_forward", mutates_args=(), device_types="cpu")
def event_linear_forward(x: Tensor, weight: Tensor, bias: Tensor | None, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(y, fired, tally)``.

    ``fired`` [rows, words], empty unless ``keep``: bit i % 64 of word i // 64 says that input i is not zero. ``tally``:
    how many inputs are not zero, and whether (1 or 0) all of them are 1.
    """
    from spikeattn.ops.event_linear.cpu import linear_cpu

    return linear_cpu(x, weight, bias, keep)


@event_linear_forward.register_fake
def _(x, weight, bias, keep):
    words = -(-x.shape[1] // _WORD)
    fired = x.new_empty((x.shape[0] if keep else 0, words), dtype=torch.int64)
    return x.new_empty(x.shape[0], weight.shape[0]), fired, x.new_empty(2, dtype=torch.int64)


@torch.library.custom_op("spikeattn::event_linear_backward", mutates_args=(), device_types="cpu")
def event_linear_backward(
    grad: Tensor, x: Tensor | None, fired: Tensor, tally: Tensor, weight: Tensor, needs_x: bool, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    """Return ``(grad_x, grad_weight)``, empty if not needed; without ``x``, ``fired`` is all of it."""
    from spikeattn.ops.event_linear.cpu import linear_cpu, weight_gradient_cpu

    grad = grad.contiguous()
    grad_x, grad_weight = grad.new_empty(0), grad.new_empty(0)
    if needs_x:
        grad_x, _, _ = linear_cpu(grad, weight.t(), None, False)
    if needs_weight:
        inputs = weight.shape[1]
        count, spikes = tally.tolist()
        if spikes and count <= _DENSE * grad.shape[0] * inputs:
            grad_weight = weight_gradient_cpu(grad, fired, inputs)
        else:
            grad_weight = grad.t() @ (unpacked(fired, inputs) if x is None else x)
    return grad_x, grad_weight


@event_linear_backward.register_fake
def _(grad, x, fired, tally, weight, needs_x, needs_weight):
    grad_x = grad.new_empty((grad.shape[0], weight.shape[1]) if needs_x else 0)
    return grad_x, grad.new_empty(weight.shape if needs_weight else 0)


def unpacked(fired: Tensor, inputs: int) -> Tensor:
    """Spikes [rows, inputs] of their bits."""
    bits = (fired[:, :, None] >> torch.arange(_WORD)) & 1
    return bits.flatten(1)[:, :inputs].float()


def _save(ctx, inputs, output, bits_will_do: bool = False) -> None:
    """Keep ``x`` and its bits, or the bits only."""
    x, weight, _, keep = inputs
    _, fired, tally = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(None if bits_will_do or not keep else x, fired, tally, weight)


def _run_eagerly(ctx, run, inputs):
    """Keep the bits only, where they are all that ``x`` is: a graph that is traced cannot look."""
    output = run(*inputs)
    _save(ctx, inputs, output, bits_will_do=bool(output[2][1]))
    return output


def _backward(ctx, grad, grad_fired, grad_tally):
    """Hand over to the registered backward."""
    if grad is None:
        return None, None, None, None
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    grad_x, grad_weight = _event_linear_backward(grad, *ctx.saved_tensors, needs_x, needs_weight)
    grad_bias = grad.sum(0) if needs_bias else None
    return grad_x if needs_x else None, grad_weight if needs_weight else None, grad_bias, None


_event_linear_backward = direct(event_linear_backward)
_event_linear = differentiable(event_linear_forward, _save, _backward, _run_eagerly)
