"""The public function `lif`, and the registered operations behind it."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from spikeattn import _checks
from spikeattn._autograd import differentiable, direct
from spikeattn._backends import Backend, resolve_backend
from spikeattn.ops.lif.reference import is_static, lif_backward_reference, lif_reference, state_dtype
from spikeattn.ops.surrogate import CustomSurrogate, Sigmoid, Surrogate, as_surrogate, surrogate_of


class LIFOutput(NamedTuple):
    """What `lif` returns: spikes, the last potential and, if asked for, every potential."""

    spikes: Tensor
    v: Tensor
    v_seq: Tensor | None = None


def lif(
    x: Float[Tensor, "T *N"],
    v0: Float[Tensor, "*N"] | None = None,
    *,
    tau: float | Tensor = 2.0,
    v_threshold: float = 1.0,
    v_reset: float | None = 0.0,
    decay_input: bool = True,
    detach_reset: bool = False,
    surrogate: Callable[[Tensor], Tensor] = Sigmoid(alpha=4.0),
    return_v_seq: bool = False,
    backend: Backend = "auto",
) -> LIFOutput:
    r"""Leaky integrate-and-fire neurons over all T time steps.

    For t = 1 ... T, with V[0] = v0 (v_reset, or 0, if None) and v_rest = v_reset (0 if None)::

        H[t] = V[t-1] + (X[t] - (V[t-1] - v_rest)) / tau        charge, decay_input
        H[t] = V[t-1] - (V[t-1] - v_rest) / tau + X[t]          charge, not decay_input
        S[t] = 1 if H[t] >= v_threshold else 0                  fire (equality fires)
        V[t] = S[t] * v_reset + (1 - S[t]) * H[t]               hard reset
        V[t] = H[t] - S[t] * v_threshold                        soft reset (v_reset is None)

    Source: the equations, defaults and order of operations of spikingjelly 2.0.0 ``LIFNode``; with
    ``tau=math.inf, decay_input=False`` those of ``IFNode``.

    Args:
        x: Input current, any strides; in units of the threshold's scale (dimensionless). A time axis of stride 0
            (``expand``) is a static input: it is read once, and the sum of its steps' gradients arrives at step 0.
        v0: Initial potential, same unit.
        tau: Membrane time constant **in time steps**, > 1 (``math.inf``: no leak). Not seconds: there is no dt.
            A scalar tensor gets a gradient; its reciprocal is taken once and multiplies where a float divides.
        v_threshold: Firing threshold, above the reset, same unit as ``x``.
        v_reset: Potential after a spike (hard reset); None subtracts ``v_threshold`` instead (soft reset).
        decay_input: Whether the input, too, is divided by ``tau``.
        detach_reset: Whether the gradient ignores the reset.
        surrogate: Gives the gradient of the step: a `Surrogate`, a spikingjelly surrogate, or any function of
            ``H - v_threshold`` that fires (this one runs as a plain loop over T, and says so once).
        return_v_seq: Whether to return V[1 ... T].
        backend: "auto" takes the fused kernel of the tensor's device when usable, else plain PyTorch ("torch"),
            and says so once.

    Returns:
        LIFOutput: ``spikes`` [T, *N], 0 or 1, dtype of ``x``; ``v`` [*N], the potential after the last reset,
        float32 (float64 for float64 inputs); ``v_seq`` [T, *N] like ``v`` if asked for, else None.

    Gradient:
        To ``x``, ``v0`` and a tensor ``tau``; dS/dH is ``surrogate.derivative(H - v_threshold)``. The backward is
        analytic and keeps only ``x`` and ``v0``: derivation in ``ops/lif/README.md``. No second derivative, no
        `torch.func`.

    Numerics:
        State and arithmetic are float32 for float16 and bfloat16 inputs (``docs/numerics.md``). A NaN current never
        fires and its neuron's potential stays NaN.

    Raises:
        ValueError: ``x`` has no time axis or T is 0, ``v0`` does not have shape ``x.shape[1:]``, tau <= 1 (a tensor on
            a GPU is not looked at), the threshold is not above the reset.
        TypeError: ``x`` is not a floating tensor; ``surrogate`` is not callable.
        BackendUnavailableError: The named backend cannot run here; the message says why.

    Example:
        >>> spikes, v, _ = lif(torch.full((3, 1), 2.0), tau=2.0)
        >>> spikes.flatten().tolist()
        [1.0, 1.0, 1.0]
    """
    if isinstance(tau, Tensor):
        if tau.numel() != 1:
            raise ValueError(f"lif: tau must be a number or a tensor of one element, got shape {tuple(tau.shape)}.")
        if tau.device.type == "cpu" and not torch.compiler.is_compiling():  # a GPU would have to be waited for
            _checks.check_tau("lif", tau.item())
        r_tau, tau = tau.reshape(()).reciprocal(), 1.0
    else:
        _checks.check_tau("lif", tau)
        r_tau = None
    return integrate(
        x, v0, r_tau, float(tau), decay_input, v_threshold, v_reset, detach_reset, surrogate, return_v_seq, backend
    )


def integrate(
    x: Tensor,
    v0: Tensor | None,
    r_tau: Tensor | None,
    tau: float,
    decay_input: bool,
    v_threshold: float,
    v_reset: float | None,
    detach_reset: bool,
    surrogate: Callable[[Tensor], Tensor],
    return_v_seq: bool,
    backend: Backend,
) -> LIFOutput:
    """`lif` with the leak as a float that divides (``tau``) or a tensor that multiplies (``r_tau``)."""
    _checks.check_floating("lif", "x", x)
    _checks.check_time_major("lif", "x", x)
    _checks.check_potentials("lif", v_threshold, v_reset)
    _checks.check_initial_potential("lif", v0, x)
    surrogate = as_surrogate(surrogate)
    chosen = resolve_backend(backend, x.device, "lif", lambda name: lif_kernels_take(name, x, surrogate))
    T = x.shape[0]
    if is_static(x) and not (x.is_leaf and x.requires_grad):  # a leaf's gradient belongs to every step
        x = x[:1]
    if r_tau is not None:
        r_tau = r_tau.to(dtype=state_dtype(x), device=x.device)
    settings = (T, tau, decay_input, float(v_threshold), None if v_reset is None else float(v_reset), detach_reset)
    if isinstance(surrogate, Surrogate):
        name, alpha = surrogate.name, float(surrogate.alpha)
        spikes, v, v_seq = _lif(x, v0, r_tau, *settings, name, alpha, return_v_seq, chosen)
    else:
        spikes, v, v_seq = lif_reference(x, at_rest(v0, x, v_reset), r_tau, *settings, surrogate, return_v_seq)
    return LIFOutput(spikes, v, v_seq if return_v_seq else None)


def lif_kernels_take(backend: Backend, x: Tensor, surrogate: Callable[[Tensor], Tensor]) -> tuple[bool, str]:
    """Whether the fused kernels of ``backend`` take such a call, and if not why."""
    if x.dtype == torch.float64:
        return False, "float64 runs on the plain definition"
    if not isinstance(surrogate, Surrogate):
        return False, f"surrogate {type(surrogate).__name__} is a function of tensors; CustomSurrogate reaches kernels"
    if isinstance(surrogate, CustomSurrogate):
        spelling = "cuda" if backend == "cupy" else backend
        if getattr(surrogate, spelling) is None:
            return False, f"the CustomSurrogate has no {spelling}= spelling"
    return True, ""


@torch.library.custom_op("spikeattn::lif_forward", mutates_args=(), device_types=("cpu", "cuda"))
def lif_forward(
    x: Tensor,
    v0: Tensor | None,
    r_tau: Tensor | None,
    time_steps: int,
    tau: float,
    decay_input: bool,
    v_threshold: float,
    v_reset: float | None,
    detach_reset: bool,
    surrogate: str,
    alpha: float,
    return_v_seq: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(spikes, v, v_seq)``; ``v_seq`` is empty unless asked for. Without ``v0`` neurons start at rest."""
    if backend == "cupy":
        from spikeattn.ops.lif.cuda import lif_forward_cuda

        return lif_forward_cuda(x, v0, r_tau, time_steps, tau, decay_input, v_threshold, v_reset, return_v_seq)
    v0 = at_rest(v0, x, v_reset)
    if backend == "numba":
        from spikeattn.ops.lif.cpu import lif_forward_cpu

        return lif_forward_cpu(x, v0, r_tau, time_steps, tau, decay_input, v_threshold, v_reset, return_v_seq)
    fire = surrogate_of(surrogate, alpha)
    spikes, v, v_seq = lif_reference(
        x, v0, r_tau, time_steps, tau, decay_input, v_threshold, v_reset, detach_reset, fire, return_v_seq
    )
    return spikes, v.contiguous(), v_seq


@lif_forward.register_fake
def _(
    x, v0, r_tau,
    time_steps, tau, decay_input, v_threshold, v_reset, detach_reset, surrogate, alpha, return_v_seq, backend,
):  # fmt: skip
    dtype = state_dtype(x)
    shape = (time_steps, *x.shape[1:])
    v_seq_shape = shape if return_v_seq else (0,)
    return x.new_empty(shape), x.new_empty(x.shape[1:], dtype=dtype), x.new_empty(v_seq_shape, dtype=dtype)


@torch.library.custom_op("spikeattn::lif_backward", mutates_args=(), device_types=("cpu", "cuda"))
def lif_backward(
    grad_spikes: Tensor,
    grad_v: Tensor | None,
    grad_v_seq: Tensor | None,
    x: Tensor,
    v0: Tensor | None,
    r_tau: Tensor | None,
    time_steps: int,
    tau: float,
    decay_input: bool,
    v_threshold: float,
    v_reset: float | None,
    detach_reset: bool,
    surrogate: str,
    alpha: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(grad_x, grad_v0, grad_r_tau)``; empty without ``v0`` or ``r_tau``. No ``grad_v`` is a zero one."""
    neuron = (time_steps, tau, decay_input, v_threshold, v_reset, detach_reset)
    fire = surrogate_of(surrogate, alpha)
    if backend == "cupy":
        from spikeattn.ops.lif.cuda import lif_backward_cuda

        tensors = (grad_spikes, grad_v, grad_v_seq, x, v0, r_tau)
        return lif_backward_cuda(*tensors, *neuron, surrogate, alpha, getattr(fire, "cuda", None))
    own = (grad_spikes, or_zero(grad_v, x), grad_v_seq, x, at_rest(v0, x, v_reset), r_tau)
    if backend == "numba":
        from spikeattn.ops.lif.cpu import lif_backward_cpu

        grad_x, grad_v0, grad_r_tau = lif_backward_cpu(*own, *neuron, fire)
    else:
        grad_x, grad_v0, grad_r_tau = lif_backward_reference(*own, *neuron, fire)
    nothing = grad_v0.new_empty(0)
    return grad_x, nothing if v0 is None else grad_v0, nothing.clone() if r_tau is None else grad_r_tau


@lif_backward.register_fake
def _(
    grad_spikes, grad_v, grad_v_seq, x, v0, r_tau,
    time_steps, tau, decay_input, v_threshold, v_reset, detach_reset, surrogate, alpha, backend,
):  # fmt: skip
    dtype = state_dtype(x)
    grad_v0 = x.new_empty((0,) if v0 is None else v0.shape, dtype=dtype)
    return x.new_empty(x.shape), grad_v0, x.new_empty((0,) if r_tau is None else (), dtype=dtype)


def at_rest(v0: Tensor | None, x: Tensor, v_reset: float | None) -> Tensor:
    """``v0``, or one number in the place of [*N]: the reset potential, 0 if there is none."""
    if v0 is not None:
        return v0
    return torch.full((), v_reset or 0.0, dtype=state_dtype(x), device=x.device).expand(x.shape[1:])


def or_zero(grad_v: Tensor | None, x: Tensor) -> Tensor:
    """Gradient of the last potential; where nobody used that, one zero in the place of [*N]."""
    return x.new_zeros((), dtype=state_dtype(x)).expand(x.shape[1:]) if grad_v is None else grad_v


def or_zeros(grad_spikes: Tensor | None, x: Tensor, time_steps: int) -> Tensor:
    """Gradient of the spikes; where nobody used them, one zero in the place of [T, *N]."""
    return x.new_zeros(()).expand(time_steps, *x.shape[1:]) if grad_spikes is None else grad_spikes


def _save(ctx, inputs, output) -> None:
    """Keep the inputs only: the backward computes H again."""
    x, v0, r_tau, *ctx.settings, ctx.return_v_seq, ctx.backend = inputs
    ctx.set_materialize_grads(False)  # None for what nobody used
    ctx.save_for_backward(x, v0, r_tau)


def _backward(ctx, grad_spikes, grad_v, grad_v_seq):
    """Hand over to the registered backward; None for an input that needs no gradient."""
    x, v0, r_tau = ctx.saved_tensors
    grad_v_seq = grad_v_seq if ctx.return_v_seq else None
    grad_spikes = or_zeros(grad_spikes, x, ctx.settings[0])
    grads = _lif_backward(grad_spikes, grad_v, grad_v_seq, x, v0, r_tau, *ctx.settings, ctx.backend)
    needed = [grad if need else None for grad, need in zip(grads, ctx.needs_input_grad[:3], strict=True)]
    if needed[1] is not None:
        needed[1] = needed[1].to(v0.dtype)
    return (*needed, *(None,) * (len(ctx.settings) + 2))


_lif_backward = direct(lif_backward)
_lif = differentiable(lif_forward, _save, _backward)
