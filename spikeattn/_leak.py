"""When a kernel may multiply by the reciprocal of tau where the definition divides."""

import ctypes
import math


def as_float32(tau: float) -> float:
    """``tau`` as PyTorch takes a Python number beside float32 tensors."""
    return ctypes.c_float(tau).value


def has_exact_reciprocal(tau: float) -> bool:
    """Powers of two, and infinity: to multiply gives the bits of the division, in a tenth of the instructions."""
    tau = as_float32(tau)
    return math.isinf(tau) or math.frexp(tau)[0] == 0.5


def leak(tau: float | None) -> float:
    """The number that a kernel takes: the reciprocal of ``tau`` where that is exact, else ``tau``, which divides.

    0 for None, where a tensor takes its place.
    """
    if tau is None:
        return 0.0
    return 1 / as_float32(tau) if has_exact_reciprocal(tau) else tau
