"""The definition of `lif`, and its analytic backward. Equations: ``README.md`` of this folder."""

from collections.abc import Callable

import torch
from torch import Tensor

from spikeattn.ops.surrogate import Surrogate


def state_dtype(x: Tensor) -> torch.dtype:
    """The membrane is float32, except for float64 inputs."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def charge(x: Tensor, v: Tensor, tau: float, r_tau: Tensor | None, decay_input: bool, v_rest: float) -> Tensor:
    """H[t] of X[t] and V[t-1]; a tensor ``r_tau`` = 1 / tau multiplies where the float ``tau`` divides."""
    if decay_input:
        drive = x - (v - v_rest)
        return v + (drive / tau if r_tau is None else drive * r_tau)
    leak = v - v_rest
    return v - (leak / tau if r_tau is None else leak * r_tau) + x


def lif_reference(
    x: Tensor,
    v0: Tensor,
    r_tau: Tensor | None,
    time_steps: int,
    tau: float,
    decay_input: bool,
    v_threshold: float,
    v_reset: float | None,
    detach_reset: bool,
    surrogate: Callable[[Tensor], Tensor],
    return_v_seq: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(spikes [T, *N], v [*N], v_seq [T, *N])`` by a differentiable loop over T = ``time_steps``.

    ``x`` is [T, *N], or [1, *N] for the same current at every step. ``surrogate`` is any function that fires
    (`Surrogate` objects do); a smooth one makes the loop smooth. ``v_seq`` is empty unless asked for.
    """
    v_rest = 0.0 if v_reset is None else v_reset
    v = v0.to(state_dtype(x))
    spikes, v_seq = [], []
    for x_t in x.expand(time_steps, *x.shape[1:]):
        h = charge(x_t.to(v.dtype), v, tau, r_tau, decay_input, v_rest)
        s = surrogate(h - v_threshold)
        s_reset = s.detach() if detach_reset else s
        v = h - s_reset * v_threshold if v_reset is None else s_reset * v_reset + (1 - s_reset) * h
        spikes.append(s.to(x.dtype))
        if return_v_seq:
            v_seq.append(v)
    return torch.stack(spikes), v, torch.stack(v_seq) if return_v_seq else v.new_empty(0)


def lif_backward_reference(
    grad_spikes: Tensor,
    grad_v: Tensor,
    grad_v_seq: Tensor | None,
    x: Tensor,
    v0: Tensor,
    r_tau: Tensor | None,
    time_steps: int,
    tau: float,
    decay_input: bool,
    v_threshold: float,
    v_reset: float | None,
    detach_reset: bool,
    surrogate: Surrogate,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(grad_x, grad_v0 [*N], grad_r_tau [])``; ``h`` is computed again from ``x`` and ``v0``.

    ``grad_x`` has the shape of ``x``; where that has one step for all, the steps are summed from the last to the first.
    The order of operations is the one of spikingjelly 2.0.0 on a CPU, so that gradients agree bit for bit.
    """
    v_rest = 0.0 if v_reset is None else v_reset
    v = v0.to(state_dtype(x))
    v_before, h_seq = [], []
    static = x.shape[0] != time_steps
    for x_t in x.expand(time_steps, *x.shape[1:]):
        h = charge(x_t.to(v.dtype), v, tau, r_tau, decay_input, v_rest)
        s = (h >= v_threshold).to(h.dtype)
        v_before.append(v)
        h_seq.append(h)
        v = h - s * v_threshold if v_reset is None else s * v_reset + (1 - s) * h

    grad_x = torch.zeros(x.shape, dtype=v.dtype if static else x.dtype, device=x.device)
    grad_r_tau = torch.zeros((), dtype=v.dtype, device=x.device)
    carry = grad_v.to(v.dtype)  # dL/dV[t]
    for t in range(time_steps - 1, -1, -1):
        h = h_seq[t]
        s = (h >= v_threshold).to(h.dtype)
        sg = surrogate.derivative(h - v_threshold)
        grad_s = grad_spikes[t].to(h.dtype)
        if grad_v_seq is not None:
            carry = carry + grad_v_seq[t]
        if v_reset is None:
            grad_h = (grad_s if detach_reset else grad_s - carry * v_threshold) * sg + carry
        else:
            if not detach_reset:
                grad_s = (grad_s - carry * h) + carry * v_reset
            grad_h = grad_s * sg + carry * (1 - s)
        through = grad_h / tau if r_tau is None else grad_h * r_tau
        grad_current = through if decay_input else grad_h
        if static:
            grad_x[0] += grad_current
        else:
            grad_x[t] = grad_current
        if r_tau is not None:
            leak = v_before[t] - v_rest
            grad_r_tau += (grad_h * (x[0 if static else t].to(h.dtype) - leak if decay_input else -leak)).sum()
        carry = grad_h - through
    return grad_x.to(x.dtype), carry, grad_r_tau


def is_static(x: Tensor) -> bool:
    """Whether ``x`` [T, *N] is the same memory at every time step."""
    return x.shape[0] > 1 and x.stride(0) == 0
