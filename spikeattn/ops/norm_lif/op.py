"""The public function `norm_lif`, and the registered operations behind it."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spikeattn import _checks
from spikeattn._autograd import differentiable, direct
from spikeattn._backends import Backend, resolve_backend, say_once
from spikeattn.ops.lif.op import LIFOutput, at_rest, lif_kernels_take, or_zero, or_zeros
from spikeattn.ops.lif.reference import is_static, state_dtype
from spikeattn.ops.norm_lif.cuda import fits
from spikeattn.ops.norm_lif.reference import norm_lif_backward_reference, norm_lif_reference
from spikeattn.ops.surrogate import Sigmoid, Surrogate, as_surrogate, surrogate_of


def norm_lif(
    x: Float[Tensor, "T *N D"],
    weight: Float[Tensor, " D"],
    bias: Float[Tensor, " D"],
    v0: Float[Tensor, "*N D"] | None = None,
    *,
    padding_mask: Bool[Tensor, "*N"] | None = None,
    eps: float = 1e-5,
    tau: float = 2.0,
    v_threshold: float = 1.0,
    v_reset: float | None = 0.0,
    decay_input: bool = True,
    detach_reset: bool = False,
    surrogate: Callable[[Tensor], Tensor] = Sigmoid(alpha=4.0),
    backend: Backend = "auto",
) -> LIFOutput:
    r"""LayerNorm over the last axis, then leaky integrate-and-fire neurons over all T time steps.

    ::

        mean, var = mean and biased variance of X[t] over D
        I[t] = (X[t] - mean) / sqrt(var + eps) * weight + bias      zero where padding_mask
        S, V = lif(I, v0)

    Source: Ba et al. 2016 (Layer Normalization, arXiv:1607.06450), as ``torch.nn.functional.layer_norm``; then `lif`,
    which holds the equation of the neuron. In one pass over memory; I is never stored.

    Args:
        x: Input [T, *N, D], any strides and scale. A time axis of stride 0 (``expand``) is normalised once, and the
            sum of its steps' gradients arrives at step 0.
        weight: Gain of the norm [D], in units of the threshold's scale (dimensionless).
        bias: Offset of the norm [D], same unit.
        v0: Initial potential [*N, D], same unit; ``v_reset``, or 0, if None.
        padding_mask: [*N], True where the current is zero at every step and no gradient flows to ``x``.
        eps: Added to the variance, in units of ``x`` squared.
        tau: Membrane time constant **in time steps**, > 1.
        v_threshold: Firing threshold, above the reset.
        v_reset: Potential after a spike (hard reset); None subtracts ``v_threshold`` instead (soft reset).
        decay_input: Whether the current, too, is divided by ``tau``.
        detach_reset: Whether the gradient ignores the reset.
        surrogate: Gives the gradient of the step, as in `lif`.
        backend: As in `lif`.

    Returns:
        LIFOutput: ``spikes`` [T, *N, D], 0 or 1, dtype of ``x``; ``v`` [*N, D], the potential after the last reset,
        float32 (float64 for float64 inputs); ``v_seq`` is None.

    Gradient:
        To ``x``, ``weight``, ``bias`` and ``v0``. Keeps these, and mean and reciprocal deviation of each row:
        derivation in ``ops/norm_lif/README.md``. No second derivative, no `torch.func`.

    Numerics:
        Arithmetic is float32 for float16 and bfloat16 inputs, also under autocast. Sums run in an order that every
        backend keeps, so spikes are the same bits everywhere (``docs/numerics.md``).

    Raises:
        ValueError: ``x`` has no time or feature axis or T is 0; ``weight``, ``bias``, ``v0`` or ``padding_mask``
            does not fit it; eps < 0; tau <= 1; the threshold is not above the reset.
        TypeError: ``x`` is not a floating tensor; ``padding_mask`` is not bool; ``surrogate`` is not callable.
        BackendUnavailableError: The named backend cannot run here; the message says why.

    Example:
        >>> spikes, v, _ = norm_lif(torch.tensor([[1.0, -1.0], [1.0, -1.0]]), torch.full((2,), 3.0), torch.zeros(2))
        >>> spikes.tolist()
        [[1.0, 0.0], [1.0, 0.0]]
    """
    _checks.check_floating("norm_lif", "x", x)
    _checks.check_time_major("norm_lif", "x", x)
    _checks.check_norm("norm_lif", x, weight, bias, padding_mask)
    _checks.check_eps("norm_lif", eps)
    _checks.check_tau("norm_lif", tau)
    _checks.check_potentials("norm_lif", v_threshold, v_reset)
    _checks.check_initial_potential("norm_lif", v0, x)
    surrogate = as_surrogate(surrogate)
    chosen = resolve_backend(backend, x.device, "norm_lif", lambda name: norm_lif_kernels_take(name, x, surrogate))
    T = x.shape[0]
    if is_static(x) and not (x.is_leaf and x.requires_grad):  # a leaf's gradient belongs to every step
        x = x[:1]
    v_reset = None if v_reset is None else float(v_reset)
    neuron = (float(tau), decay_input, float(v_threshold), v_reset, detach_reset)
    if isinstance(surrogate, Surrogate):
        inputs = (x, weight, bias, padding_mask, v0, T, float(eps), *neuron)
        spikes, v, _, _ = _norm_lif(*inputs, surrogate.name, float(surrogate.alpha), chosen)
    else:
        say_once(f"norm_lif: surrogate {type(surrogate).__name__} has no analytic backward; it runs as a loop over T")
        inputs = (x, weight, bias, padding_mask, at_rest(v0, x, v_reset), T, float(eps), *neuron)
        spikes, v, _, _ = norm_lif_reference(*inputs, surrogate)
    return LIFOutput(spikes, v)


def norm_lif_kernels_take(backend: Backend, x: Tensor, surrogate: Callable[[Tensor], Tensor]) -> tuple[bool, str]:
    """Whether the fused kernels of ``backend`` take such a call, and if not why."""
    if backend == "cupy" and not fits(x.shape[-1]):
        return False, f"rows of D = {x.shape[-1]} elements are too wide for the CUDA kernels"
    return lif_kernels_take(backend, x, surrogate)


@torch.library.custom_op("spikeattn::norm_lif_forward", mutates_args=(), device_types=("cpu", "cuda"))
def norm_lif_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    padding_mask: Tensor | None,
    v0: Tensor | None,
    time_steps: int,
    eps: float,
    tau: float,
    decay_input: bool,
    v_threshold: float,
    v_reset: float | None,
    detach_reset: bool,
    surrogate: str,
    alpha: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ``(spikes, v, mean, rstd)``; the last two, [T or 1, *N, 1], are for the backward."""
    settings = (time_steps, eps, tau, decay_input, v_threshold, v_reset)
    if backend == "cupy":
        from spikeattn.ops.norm_lif.cuda import norm_lif_forward_cuda

        return norm_lif_forward_cuda(x, weight, bias, padding_mask, v0, *settings)
    inputs = (x, weight, bias, padding_mask, at_rest(v0, x, v_reset), *settings)
    if backend == "numba":
        from spikeattn.ops.norm_lif.cpu import norm_lif_forward_cpu

        return norm_lif_forward_cpu(*inputs)
    spikes, v, mean, rstd = norm_lif_reference(*inputs, detach_reset, surrogate_of(surrogate, alpha))
    return spikes.contiguous(), v.contiguous(), mean.contiguous(), rstd.contiguous()


@norm_lif_forward.register_fake
def _(
    x, weight, bias, padding_mask, v0,
    time_steps, eps, tau, decay_input, v_threshold, v_reset, detach_reset, surrogate, alpha, backend,
):  # fmt: skip
    dtype = state_dtype(x)
    mean, rstd = (x.new_empty((*x.shape[:-1], 1), dtype=dtype) for _ in range(2))
    return x.new_empty((time_steps, *x.shape[1:])), x.new_empty(x.shape[1:], dtype=dtype), mean, rstd


@torch.library.custom_op("spikeattn::norm_lif_backward", mutates_args=(), device_types=("cpu", "cuda"))
def norm_lif_backward(
    grad_spikes: Tensor,
    grad_v: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    padding_mask: Tensor | None,
    v0: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    time_steps: int,
    tau: float,
    decay_input: bool,
    v_threshold: float,
    v_reset: float | None,
    detach_reset: bool,
    surrogate: str,
    alpha: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ``(grad_x, grad_weight, grad_bias, grad_v0)``; ``grad_v0`` is empty without ``v0``."""
    neuron = (time_steps, tau, decay_input, v_threshold, v_reset, detach_reset)
    fire = surrogate_of(surrogate, alpha)
    if backend == "cupy":
        from spikeattn.ops.norm_lif.cuda import norm_lif_backward_cuda

        tensors = (grad_spikes, grad_v, x, weight, bias, padding_mask, v0, mean, rstd)
        return norm_lif_backward_cuda(*tensors, *neuron, surrogate, alpha, getattr(fire, "cuda", None))
    start = at_rest(v0, x, v_reset)
    own = (grad_spikes, or_zero(grad_v, x), x, weight, bias, padding_mask, start, mean, rstd)
    if backend == "numba":
        from spikeattn.ops.norm_lif.cpu import norm_lif_backward_cpu

        grad_x, grad_weight, grad_bias, grad_v0 = norm_lif_backward_cpu(*own, *neuron, fire)
    else:
        grad_x, grad_weight, grad_bias, grad_v0 = norm_lif_backward_reference(*own, *neuron, fire)
    grad_v0 = grad_v0.new_empty(0) if v0 is None else grad_v0.contiguous()
    return grad_x.contiguous(), grad_weight, grad_bias, grad_v0


@norm_lif_backward.register_fake
def _(
    grad_spikes, grad_v, x, weight, bias, padding_mask, v0, mean, rstd,
    time_steps, tau, decay_input, v_threshold, v_reset, detach_reset, surrogate, alpha, backend,
):  # fmt: skip
    grad_weight, grad_bias = weight.new_empty(weight.shape), bias.new_empty(bias.shape)
    grad_v0 = x.new_empty((0,) if v0 is None else v0.shape, dtype=state_dtype(x))
    return x.new_empty(x.shape), grad_weight, grad_bias, grad_v0


def _save(ctx, inputs, output) -> None:
    """Keep the inputs and the statistics of rows: the backward computes currents and potentials again."""
    x, weight, bias, padding_mask, v0, time_steps, _, *settings, ctx.backend = inputs
    ctx.settings = (time_steps, *settings)
    ctx.set_materialize_grads(False)  # None for what nobody used
    _, _, mean, rstd = output
    ctx.save_for_backward(x, weight, bias, padding_mask, v0, mean, rstd)


def _backward(ctx, grad_spikes, grad_v, grad_mean, grad_rstd):
    """Hand over to the registered backward; mean and rstd are no outputs of the public function."""
    saved = ctx.saved_tensors  # once: non-reentrant checkpointing allows no second look
    x, v0 = saved[0], saved[4]
    grad_spikes = or_zeros(grad_spikes, x, ctx.settings[0])
    grads = _norm_lif_backward(grad_spikes, grad_v, *saved, *ctx.settings, ctx.backend)
    grad_x, grad_weight, grad_bias, grad_v0 = (
        grad if need else None
        for grad, need in zip(grads, (*ctx.needs_input_grad[:3], ctx.needs_input_grad[4]), strict=True)
    )
    grad_v0 = None if grad_v0 is None else grad_v0.to(v0.dtype)
    return grad_x, grad_weight, grad_bias, None, grad_v0, *(None,) * (len(ctx.settings) + 2)


_norm_lif_backward = direct(norm_lif_backward)
_norm_lif = differentiable(norm_lif_forward, _save, _backward)
