"""Step functions whose gradient is that of a smooth function.

The forward pass of a spiking neuron is the step ``s = 1 if x >= 0 else 0``, whose derivative is zero almost
everywhere. Training replaces that derivative by the one of a smooth `Surrogate.primitive`.

The eight formulas, their names and their defaults are those of spikingjelly 2.0.0
(``spikingjelly.activation_based.surrogate``), in its order of operations, so that gradients agree.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Surrogate:
    """A step function with the gradient of a smooth one.

    Calling it is `spike`: the step forward, ``derivative`` backward. So an instance serves wherever
    spikingjelly takes a ``surrogate_function``.

    Args:
        alpha: Sharpness, > 0 and finite, dimensionless. The larger, the closer to the step.

    Raises:
        ValueError: ``alpha`` is not a positive finite number.
    """

    alpha: float
    name: ClassVar[str]

    def __post_init__(self) -> None:
        """Refuse an ``alpha`` for which the derivative is not defined."""
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise ValueError(f"{type(self).__name__}: alpha must be positive and finite, got {self.alpha}.")

    def primitive(self, x: Tensor) -> Tensor:
        """Smooth stand-in for the step; ``derivative`` is its derivative."""
        raise NotImplementedError

    def derivative(self, x: Tensor) -> Tensor:
        """Gradient that stands in for the one of the step."""
        raise NotImplementedError

    def __call__(self, x: Tensor) -> Tensor:
        """Return `spike` of ``x``."""
        return spike(x, self)


@dataclass(frozen=True)
class Sigmoid(Surrogate):
    r"""``derivative = alpha * (1 - sigmoid(alpha x)) * sigmoid(alpha x)``."""

    alpha: float = 4.0
    name: ClassVar[str] = "sigmoid"

    def primitive(self, x: Tensor) -> Tensor:
        """``sigmoid(alpha x)``."""
        return torch.sigmoid(self.alpha * x)

    def derivative(self, x: Tensor) -> Tensor:
        """``alpha * (1 - s) * s`` with ``s = sigmoid(alpha x)``."""
        s = torch.sigmoid(self.alpha * x)
        return (1 - s) * s * self.alpha


@dataclass(frozen=True)
class ATan(Surrogate):
    r"""``derivative = alpha / (2 (1 + (pi alpha x / 2)^2))``."""

    alpha: float = 2.0
    name: ClassVar[str] = "atan"

    def primitive(self, x: Tensor) -> Tensor:
        """``arctan(pi alpha x / 2) / pi + 1/2``."""
        return torch.atan(x * (math.pi / 2 * self.alpha)) / math.pi + 0.5

    def derivative(self, x: Tensor) -> Tensor:
        """``alpha / 2 / (1 + z^2)`` with ``z = pi alpha x / 2``."""
        z = x * (math.pi / 2 * self.alpha)
        return (self.alpha / 2) / (1 + z * z)


@dataclass(frozen=True)
class PiecewiseQuadratic(Surrogate):
    r"""``derivative = max(0, alpha - alpha^2 |x|)``, a triangle."""

    alpha: float = 1.0
    name: ClassVar[str] = "piecewise_quadratic"

    def primitive(self, x: Tensor) -> Tensor:
        """0 left of ``-1/alpha``, 1 right of ``1/alpha``, two parabolas between."""
        z = (self.alpha * x).clamp(-1, 1)
        return 0.5 + z - 0.5 * z * z.abs()

    def derivative(self, x: Tensor) -> Tensor:
        """``max(0, alpha - alpha^2 |x|)``."""
        return (self.alpha - self.alpha * self.alpha * x.abs()).clamp_min(0)


@dataclass(frozen=True)
class PiecewiseExp(Surrogate):
    r"""``derivative = alpha / 2 * exp(-alpha |x|)``."""

    alpha: float = 1.0
    name: ClassVar[str] = "piecewise_exp"

    def primitive(self, x: Tensor) -> Tensor:
        """``exp(alpha x) / 2`` left of 0, ``1 - exp(-alpha x) / 2`` right of it."""
        tail = torch.exp(-self.alpha * x.abs()) / 2
        return torch.where(x < 0, tail, 1 - tail)

    def derivative(self, x: Tensor) -> Tensor:
        """``alpha / 2 * exp(-alpha |x|)``."""
        return (self.alpha / 2) * torch.exp(-self.alpha * x.abs())


@dataclass(frozen=True)
class SoftSign(Surrogate):
    r"""``derivative = 1 / (2 alpha (1/alpha + |x|)^2)``."""

    alpha: float = 2.0
    name: ClassVar[str] = "soft_sign"

    def primitive(self, x: Tensor) -> Tensor:
        """``(softsign(alpha x) + 1) / 2``."""
        return (torch.nn.functional.softsign(self.alpha * x) + 1) / 2

    def derivative(self, x: Tensor) -> Tensor:
        """``1 / (2 alpha z^2)`` with ``z = 1/alpha + |x|``."""
        z = 1 / self.alpha + x.abs()
        return 1 / (2 * self.alpha * z * z)


@dataclass(frozen=True)
class SuperSpike(Surrogate):
    r"""``derivative = alpha / (1 + |x|)^2``; here ``alpha`` is a height, not a sharpness."""

    alpha: float = 1.0
    name: ClassVar[str] = "super_spike"

    def primitive(self, x: Tensor) -> Tensor:
        """``alpha x / (1 + |x|) + 1/2``; its range is as wide as ``2 alpha``."""
        return self.alpha * torch.nn.functional.softsign(x) + 0.5

    def derivative(self, x: Tensor) -> Tensor:
        """``alpha / (1 + |x|)^2``."""
        z = 1 + x.abs()
        return self.alpha / (z * z)


@dataclass(frozen=True)
class Erf(Surrogate):
    r"""``derivative = alpha / sqrt(pi) * exp(-(alpha x)^2)``."""

    alpha: float = 2.0
    name: ClassVar[str] = "erf"

    def primitive(self, x: Tensor) -> Tensor:
        """``erfc(-alpha x) / 2``."""
        return torch.erfc(-self.alpha * x) / 2

    def derivative(self, x: Tensor) -> Tensor:
        """``alpha / sqrt(pi) * exp(-(alpha x)^2)``."""
        z = self.alpha * x
        return (self.alpha / math.sqrt(math.pi)) * torch.exp(-z * z)


@dataclass(frozen=True)
class Rect(Surrogate):
    r"""``derivative = alpha where |x| < 1 / (2 alpha), else 0``."""

    alpha: float = 1.0
    name: ClassVar[str] = "rect"

    def primitive(self, x: Tensor) -> Tensor:
        """``clamp(alpha x + 1/2, 0, 1)``."""
        return torch.clamp(self.alpha * x + 0.5, min=0.0, max=1.0)

    def derivative(self, x: Tensor) -> Tensor:
        """``alpha`` within half a width ``1 / alpha`` of 0, else 0."""
        return self.alpha * (x.abs() < 0.5 / self.alpha).to(x.dtype)


SURROGATES: dict[str, type[Surrogate]] = {
    cls.name: cls for cls in (Sigmoid, ATan, PiecewiseQuadratic, PiecewiseExp, SoftSign, SuperSpike, Erf, Rect)
}
_BY_CLASS_NAME = {cls.__name__: cls for cls in SURROGATES.values()}


@dataclass(frozen=True, init=False)
class CustomSurrogate(Surrogate):
    """A surrogate of your own, with a spelling for each kind of kernel that it should reach.

    Without a spelling for the device's kernels a neuron runs on the plain definition, and says so once. Surrogates
    with equal parts are equal. One that a neuron has used is kept until the process ends: make it once, not per call.

    Args:
        primitive: Smooth stand-in for the step, of a tensor.
        derivative: Its derivative, of a tensor; this is the gradient of the step.
        cuda: The derivative as a C expression of ``float x``, for CUDA kernels, e.g. ``"1.0f / (1.0f + x * x)"``.
        numba: The derivative as a Python function of one number, which numba compiles into the CPU kernels. It is
            given a float32; constants that are ``numpy.float32`` keep its arithmetic so.

    Raises:
        TypeError: A function is not callable, or ``cuda`` is no string.

    Example:
        >>> cauchy = CustomSurrogate(
        ...     primitive=lambda x: torch.atan(x) / math.pi + 0.5,
        ...     derivative=lambda x: 1 / (math.pi * (1 + x * x)),
        ... )
        >>> x = torch.tensor([-1.0, 0.0], requires_grad=True)
        >>> cauchy(x).sum().backward()
        >>> [round(g, 3) for g in x.grad.tolist()]
        [0.159, 0.318]
    """

    primitive: Callable[[Tensor], Tensor]  # type: ignore[assignment]
    derivative: Callable[[Tensor], Tensor]  # type: ignore[assignment]
    cuda: str | None
    numba: Callable[[float], float] | None
    name: str  # type: ignore[misc]

    def __init__(
        self,
        primitive: Callable[[Tensor], Tensor],
        derivative: Callable[[Tensor], Tensor],
        cuda: str | None = None,
        numba: Callable[[float], float] | None = None,
    ) -> None:
        for part, function in (("primitive", primitive), ("derivative", derivative), ("numba", numba)):
            if not callable(function) and not (part == "numba" and function is None):
                raise TypeError(f"CustomSurrogate: {part} must be callable, got {type(function).__name__}.")
        if not isinstance(cuda, str | None):
            raise TypeError(f"CustomSurrogate: cuda must be a C expression, got {type(cuda).__name__}.")
        parts = (primitive, derivative, cuda, numba)
        name = _CUSTOM_NAMES.setdefault(parts, f"custom_{len(_CUSTOM_NAMES)}")
        fields = ("primitive", "derivative", "cuda", "numba", "name", "alpha")
        for field, value in zip(fields, (*parts, name, 1.0), strict=True):
            object.__setattr__(self, field, value)  # frozen
        _CUSTOM.setdefault(name, self)


# Registered operations take no objects: they are given a surrogate's name, and find it here.
_CUSTOM: dict[str, CustomSurrogate] = {}
_CUSTOM_NAMES: dict[tuple[object, ...], str] = {}


def surrogate_of(name: str, alpha: float) -> Surrogate:
    """The surrogate that a registered operation was given by name."""
    return _CUSTOM[name] if name in _CUSTOM else SURROGATES[name](alpha)


class _Spike(torch.autograd.Function):
    """The step forward, ``surrogate.derivative`` backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, surrogate: Surrogate) -> Tensor:
        return (x >= 0).to(x.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, ctx.surrogate = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx, grad_spikes):
        (x,) = ctx.saved_tensors
        return grad_spikes * ctx.surrogate.derivative(x), None


def spike(x: Float[Tensor, "..."], surrogate: Surrogate) -> Float[Tensor, "..."]:
    """Step function with a surrogate gradient.

    ``s = 1 if x >= 0 else 0`` (equality fires, NaN does not).

    Args:
        x: Distance of the potential from the threshold, in units of the threshold (dimensionless).
        surrogate: Gives the gradient.

    Returns:
        0 or 1, shape and dtype of ``x``.

    Gradient:
        ``grad_x = grad_s * surrogate.derivative(x)``, in the dtype of ``x``.

    Example:
        >>> spike(torch.tensor([-1.0, 0.0, 2.0]), ATan()).tolist()
        [0.0, 1.0, 1.0]
    """
    return _Spike.apply(x, surrogate)


def as_surrogate(function: Callable[[Tensor], Tensor]) -> Surrogate | Callable[[Tensor], Tensor]:
    """Return ours for a spikingjelly surrogate of the same name; any other callable as it is.

    A spikingjelly object in its non-spiking mode, or with a tensor as ``alpha``, has no counterpart here and
    stays what it is: a callable that the plain definition can use.

    Raises:
        TypeError: ``function`` is not callable, or a `Surrogate` of a class that is not one of ours.
    """
    cls = type(function)
    if isinstance(function, Surrogate):
        # By name: torch.compile before PyTorch 2.13 cannot look for a class among a dict's values.
        if not isinstance(function, CustomSurrogate) and _BY_CLASS_NAME.get(cls.__name__) is not cls:
            raise TypeError(
                f"surrogate must be one of {', '.join(_BY_CLASS_NAME)}, got {cls.__name__}. CustomSurrogate "
                "takes functions of your own."
            )
        return function
    if not callable(function):
        raise TypeError(f"surrogate must be a Surrogate or a callable, got {cls.__name__}.")
    if cls.__module__ == "spikingjelly.activation_based.surrogate" and cls.__name__ in _BY_CLASS_NAME:
        alpha = getattr(function, "alpha", None)
        if getattr(function, "spiking", False) and isinstance(alpha, int | float):
            return _BY_CLASS_NAME[cls.__name__](float(alpha))
    return function
