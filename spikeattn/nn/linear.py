"""A linear layer for spikes as a module."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spikeattn._backends import Backend
from spikeattn.ops.event_linear import event_linear


class EventLinear(nn.Linear):
    """``torch.nn.Linear`` that costs by the inputs that fired.

    The same parameters, start and ``state_dict``; the equation and its numerics are in `event_linear`.

    Args:
        in_features: Width of the input.
        out_features: Width of the output.
        bias: Whether a bias is added.
        device: Where the parameters are made.
        dtype: Of the parameters.
        backend: As in `event_linear`.

    Gradient:
        To the input and the parameters.

    Raises:
        ValueError: The last axis of the input is not ``in_features`` wide.
        TypeError: The input is no floating tensor, or of another dtype than the parameters (outside autocast).

    Example:
        >>> EventLinear(64, 10)((torch.rand(8, 2, 64) < 0.1).float()).shape
        torch.Size([8, 2, 10])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.backend = backend

    def forward(self, input: Float[Tensor, "*N inputs"]) -> Float[Tensor, "*N outputs"]:
        """``input W^T + b``."""
        return event_linear(input, self.weight, self.bias, backend=self.backend)
