"""The LIF neuron and the surrogates in compiled float32, operation by operation as in the definitions.

Flags are constants of the calling kernel, so only one branch of each ``if`` is compiled.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from torch import Tensor

from spikeattn._cpu.compiler import Kernel, helper, inline
from spikeattn._cpu.exponential import exp2
from spikeattn._leak import leak

F = np.float32
KINDS = (
    "sigmoid", "atan", "piecewise_quadratic", "piecewise_exp", "soft_sign", "super_spike", "erf", "rect",
)  # fmt: skip
SIGMOID, ATAN, PIECEWISE_QUADRATIC, PIECEWISE_EXP, SOFT_SIGN, SUPER_SPIKE, ERF, RECT = range(len(KINDS))


@inline
def charge(x, v, tau, v_rest, decay_input, divides):
    """H[t] of X[t] and V[t-1]; ``tau`` divides, or is the reciprocal that multiplies."""
    leak = v - v_rest
    drive = x - leak if decay_input else leak
    part = drive / tau if divides else drive * tau
    return v + part if decay_input else v - part + x


@inline
def fire(h, v_threshold):
    """S[t], 0 or 1."""
    return F(1.0) if h >= v_threshold else F(0.0)


@inline
def reset(h, s, v_threshold, v_rest, hard_reset):
    """V[t] of H[t] and S[t]."""
    return s * v_rest + (F(1.0) - s) * h if hard_reset else h - s * v_threshold


@inline
def grad_of_h(grad_s, sg, carry, h, s, v_threshold, v_rest, hard_reset, detach_reset):
    """dL/dH[t] of dL/dS[t], the surrogate's slope and ``carry`` = dL/dV[t]."""
    if hard_reset:
        if not detach_reset:
            grad_s = (grad_s - carry * h) + carry * v_rest
        return grad_s * sg + carry * (F(1.0) - s)
    if not detach_reset:
        grad_s = grad_s - carry * v_threshold
    return grad_s * sg + carry


@inline
def step_row(current, v, out, tau, v_threshold, v_rest, decay_input, divides, hard_reset, spikes):
    """One time step of a row: moves ``v`` on, and leaves S[t] (``spikes``) or H[t] in ``out``."""
    for i in range(v.size):
        h = charge(current[i], v[i], tau, v_rest, decay_input, divides)
        s = fire(h, v_threshold)
        out[i] = s if spikes else h
        v[i] = reset(h, s, v_threshold, v_rest, hard_reset)


@inline
def grad_row(grad_s, sg, h, carry, out, tau, v_threshold, v_rest, decay_input, divides, hard_reset, detach_reset):
    """One time step back: dL/dX[t] to ``out``, dL/dV[t-1] to ``carry``."""
    # One loop, two rows written: LLVM proves at most eight pairs of rows disjoint, and vectorises nothing beyond that.
    for i in range(h.size):
        s = fire(h[i], v_threshold)
        grad_h = grad_of_h(grad_s[i], sg[i], carry[i], h[i], s, v_threshold, v_rest, hard_reset, detach_reset)
        through = grad_h / tau if divides else grad_h * tau
        out[i] = through if decay_input else grad_h
        carry[i] = grad_h - through


def neuron_scalars(tau: float, r_tau: Tensor | None, v_threshold: float, v_reset: float | None) -> dict[str, float]:
    """What a frame takes for a neuron."""
    tau = leak(tau) if r_tau is None else r_tau.item()
    return {"tau": tau, "v_threshold": v_threshold, "v_rest": 0.0 if v_reset is None else v_reset}


def surrogate_scalars(name: str, alpha: float) -> dict[str, float]:
    """What a frame takes for a surrogate: which formula of `derivative_row`, and its two constants."""
    log2_e = math.log2(math.e)  # the exponentials have base 2
    constants = {
        "sigmoid": (alpha * log2_e, alpha),
        "atan": (math.pi / 2 * alpha, alpha / 2),
        "piecewise_quadratic": (alpha, alpha * alpha),
        "piecewise_exp": (-alpha * log2_e, alpha / 2),
        "soft_sign": (1 / alpha, 2 * alpha),
        "super_spike": (alpha, 0.0),
        "erf": (alpha * math.sqrt(log2_e), alpha / math.sqrt(math.pi)),
        "rect": (alpha, 0.5 / alpha),
    }
    a, b = constants.get(name, (0.0, 0.0))  # a derivative of one's own has its constants inside
    return {"kind": KINDS.index(name) if name in KINDS else -1, "a": a, "b": b}


@helper
def derivative_row(kind, h, v_threshold, a, b, sg):
    """Slope of the surrogate at ``h - v_threshold``; formulas, and but for exponentials the order, of `Surrogate`."""
    one = F(1.0)
    if kind == SIGMOID:
        for i in range(h.size):
            e = exp2(-abs(a * (h[i] - v_threshold)))  # the slope is even, and so written never a small difference
            sg[i] = b * e / ((one + e) * (one + e))
    elif kind == ATAN:
        for i in range(h.size):
            z = (h[i] - v_threshold) * a
            sg[i] = one / (one + z * z) * b
    elif kind == PIECEWISE_QUADRATIC:
        for i in range(h.size):
            y = a - b * abs(h[i] - v_threshold)
            sg[i] = F(0.0) if y < F(0.0) else y
    elif kind == PIECEWISE_EXP:
        for i in range(h.size):
            sg[i] = b * exp2(a * abs(h[i] - v_threshold))
    elif kind == SOFT_SIGN:
        for i in range(h.size):
            z = a + abs(h[i] - v_threshold)
            sg[i] = one / (b * z * z)
    elif kind == SUPER_SPIKE:
        for i in range(h.size):
            z = one + abs(h[i] - v_threshold)
            sg[i] = one / (z * z) * a
    elif kind == ERF:
        for i in range(h.size):
            z = a * (h[i] - v_threshold)
            sg[i] = b * exp2(-z * z)
    else:
        for i in range(h.size):
            sg[i] = a if abs(h[i] - v_threshold) < b else F(0.0)


@lru_cache(maxsize=64)
def custom_derivative_row(function: Callable[[float], float]) -> Any:
    """`derivative_row` of a user's function of one float32."""
    slope = helper(function)

    @helper
    def custom_row(kind, h, v_threshold, a, b, sg):
        for i in range(h.size):
            sg[i] = slope(h[i] - v_threshold)

    return custom_row


@lru_cache(maxsize=64)
def _with_spelling(factory: Callable[..., Kernel], plan: tuple, spelling: Callable[[float], float]) -> Kernel:
    """A backward whose slope is a user's function."""
    return factory(*plan).with_derivative(custom_derivative_row(spelling))


def for_surrogate(factory: Callable[..., Kernel], plan: tuple, surrogate: Any) -> Kernel:
    """The backward ``factory(*plan)`` for a surrogate, which may bring a spelling of its own."""
    spelling = getattr(surrogate, "numba", None)
    return factory(*plan) if spelling is None else _with_spelling(factory, plan, spelling)
