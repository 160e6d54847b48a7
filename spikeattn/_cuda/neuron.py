"""How the settings of a neuron reach `Neuron` in spikeattn.cuh: compile-time constants and scalars."""

import math

import torch
from torch import Tensor

from spikeattn._leak import has_exact_reciprocal

Constants = tuple[tuple[str, int], ...]  # what a program is compiled with, by name

STORAGE = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
ELEMENT_BYTES = {"f32": 4, "f16": 2, "bf16": 2}

# The enum of spikeattn.cuh. Whoever brings a derivative of his own has "custom".
SURROGATES = ("sigmoid", "atan", "piecewise_quadratic", "piecewise_exp", "soft_sign", "super_spike", "erf", "rect")
CUSTOM = len(SURROGATES)


def neuron_constants(tau: float | None, decay_input: bool, v_reset: float | None) -> Constants:
    """What is compiled in for both directions; ``tau`` is None where a tensor holds 1 / tau."""
    return (
        ("kDecayInput", int(decay_input)),
        ("kHardReset", int(v_reset is not None)),
        ("kDivide", int(tau is not None and not has_exact_reciprocal(tau))),
    )


def gradient_constants(detach_reset: bool, surrogate: str, derivative: str | None) -> Constants:
    """What is compiled in for the backward only."""
    number = SURROGATES.index(surrogate) if derivative is None else CUSTOM
    return ("kDetachReset", int(detach_reset)), ("kSurrogate", number)


# The forward shares code with the backward, which has to compile.
NO_GRADIENT = (("kDetachReset", 0), ("kSurrogate", 0))


def surrogate_scalars(name: str, alpha: float) -> tuple[float, float]:
    """The ``a`` and ``b`` of ``derivative`` in spikeattn.cuh, in double as Python has them in ops/surrogate.py."""
    scalars = {
        "sigmoid": (alpha, alpha),
        "atan": (math.pi / 2 * alpha, alpha / 2),
        "piecewise_quadratic": (alpha * alpha, alpha),
        "piecewise_exp": (-alpha, alpha / 2),
        "soft_sign": (1 / alpha, 2 * alpha),
        "super_spike": (0.0, alpha),
        "erf": (alpha, alpha / math.sqrt(math.pi)),
        "rect": (0.5 / alpha, alpha),
    }
    return scalars.get(name, (0.0, 0.0))  # a derivative of one's own has its constants inside


def as_float(x: Tensor) -> Tensor:
    """``x`` in float32, contiguous."""
    return x.to(torch.float32).contiguous()


def are_aligned(*tensors: Tensor | None) -> bool:
    """A contiguous slice can start anywhere; 16-byte loads cannot."""
    return all(x is None or x.data_ptr() % 16 == 0 for x in tensors)


def as_start(v0: Tensor | None) -> tuple[Tensor | None, int]:
    """``(v0 in float32, kScalarV0)``: an expanded number stays one number, and rest stays None: nothing is written."""
    if v0 is None:
        return None, 1
    if any(v0.stride()):
        return as_float(v0), 0
    return as_float(v0.as_strided((1,), (1,))), 1
