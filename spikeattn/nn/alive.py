"""A start at which every neuron fires: gains derived from the equations of the LIF neuron.

The derivation, with measured rates, is in ``docs/alive-start.md``.
"""

import math
from functools import cache

import torch
from torch import Tensor

from spikeattn._compile import constant

# Spikformer's attention fires at 0.5 behind a scale of 0.125: a count of 4 holds a neuron at its threshold.
_COUNT_AT_THRESHOLD = 0.5 / 0.125
# A constant current at which a LIF neuron fires every so many steps is what the gain aims at.
_STEPS_BETWEEN_SPIKES = 4


def norm_gain(tau: float) -> float:
    """Standard deviation of a current, in thresholds, that keeps a LIF layer firing: ``sqrt(2 tau - 1)``.

    White noise of standard deviation g moves a membrane without reset, V[t] = (1 - 1/tau) V[t-1] + X[t] / tau, with
    standard deviation g / sqrt(2 tau - 1). This g makes it one threshold.

    Args:
        tau: Membrane time constant in time steps.
    """
    if math.isinf(tau):
        raise ValueError('init="alive" needs a finite tau, in time steps, got inf; init="published" takes any.')
    return math.sqrt(2 * tau - 1)


@constant
def design_rate(tau: float) -> float:
    """Firing rate, in spikes a time step, of LIF neurons under constant currents from N(0, norm_gain(tau)^2).

    A constant current c, in thresholds, fires every n steps once c (1 - r^n) >= 1 with r = 1 - 1/tau. So the rate is
    the sum over n of P(fires within n steps) (1/n - 1/(n+1)).

    Args:
        tau: Membrane time constant in time steps.

    Example:
        >>> round(design_rate(10.0), 2), round(design_rate(2.0), 2)
        (0.12, 0.19)
    """
    return _design_rate(tau)


@cache
def _design_rate(tau: float) -> float:
    """The sum of `design_rate`."""
    r = 1 - 1 / tau
    rate = 0.0
    for n in range(1, 1000):
        needed = 1 / ((1 - r**n) * norm_gain(tau))
        rate += 0.5 * math.erfc(needed / math.sqrt(2)) * (1 / n - 1 / (n + 1))
    return rate


def attention_gain(keys: Tensor, E: int, tau: float, fire: str) -> Tensor:
    """Power of two by which attention's counts of coincident spikes are brought to where its neuron fires.

    With independent spikes at rate p, an entry of (Q K^T) V counts ``keys * E * p^3`` on average, one of Q K^T
    ``E * p^2``. The gain brings that to the count at which a neuron at threshold 0.5 behind a scale of 0.125 fires
    every 4 steps, rounded to a power of two, so that sums of spikes stay exact.

    Args:
        keys: How many keys a query sees, any shape; only for ``fire="output"``.
        E: Channels a head.
        tau: Membrane time constant in time steps.
        fire: "output" or "map".

    Returns:
        float32, the shape of ``keys``.
    """
    p = design_rate(tau)
    keys = keys.clamp_min(1).float()  # a fully padded row sees no key; its gain is never used
    expected = keys * (E * p**3) if fire == "output" else torch.full_like(keys, E * p**2)
    return count_gain(expected, tau)


def count_gain(expected: Tensor, tau: float, at_threshold: float = _COUNT_AT_THRESHOLD) -> Tensor:
    """Power of two that brings an expected count of spikes to where a neuron behind it fires every 4 steps.

    Args:
        expected: Counts that are to be expected, any shape, > 0.
        tau: Membrane time constant in time steps.
        at_threshold: The count that holds the neuron at its threshold: threshold over scale, as published.

    Returns:
        float32, the shape of ``expected``.
    """
    ratio = at_threshold / (1 - (1 - 1 / tau) ** _STEPS_BETWEEN_SPIKES) / expected.float()
    mantissa, _ = torch.frexp(ratio)  # ratio = mantissa * 2^exponent, mantissa in [0.5, 1)
    above = ratio / mantissa  # the division is exact: 2^exponent
    return torch.where(mantissa < math.sqrt(0.5), above / 2, above)
