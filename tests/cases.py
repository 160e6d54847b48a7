"""The cases that all tests of an op share, by what they are for."""

import itertools

import torch

from spikeattn import ATan, Erf, PiecewiseExp, PiecewiseQuadratic, Rect, Sigmoid, SoftSign, SuperSpike

SURROGATES = [Sigmoid(), ATan(), PiecewiseQuadratic(), PiecewiseExp(), SoftSign(), SuperSpike(), Erf(), Rect()]
SMOOTH = [s for s in SURROGATES if s.name not in ("rect", "piecewise_quadratic")]
RATIONAL = [ATan(), SoftSign(), SuperSpike(), PiecewiseQuadratic()]  # no exp: the same bits everywhere

# (v_reset, detach_reset, decay_input, tau): both resets, both gradients through them, both charges.
DYNAMICS = list(itertools.product([0.0, 0.25, None], [True, False], [True, False], [1.5, 2.0, 10.0]))

# (T, N): one step, the scan, blocks of neurons that do and do not fill.
SIZES = [(1, 1), (2, 31), (7, 33), (32, 129), (64, 5)]


def ids(case) -> str:
    """Readable name of a case."""
    return "-".join(map(str, case)) if isinstance(case, tuple) else type(case).__name__


def currents(T: int, *N: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Input that makes about a fifth of the neurons fire."""
    return (torch.randn(T, *N, dtype=torch.float64) * 3 + 0.5).to(dtype)
