"""How tensors of any strides reach kernels: rows of channels in one piece, the other strides by value."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from spikeattn._cpu.packed import Packed


def rows_in_one_piece(x: Tensor) -> Tensor:
    """``x`` with a stride of 1 along its channels."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def in_one_piece(padding_mask: Tensor | None) -> Tensor | None:
    """A contiguous mask, or none."""
    return None if padding_mask is None else padding_mask.contiguous()


def strides(x: "Tensor | Packed") -> list[int]:
    """Strides of the first four axes, 0 where one number is for all."""
    return [0 if size == 1 else stride for size, stride in zip(x.shape[:4], x.stride()[:4], strict=True)]


def strides_of_gradient(x: "Tensor | Packed") -> tuple[int, ...]:
    """Strides of the gradient of ``x``: those of ``x``, where it is in one piece."""
    return torch.empty_like(torch.empty_strided(x.shape, x.stride(), device="meta")).stride()
