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


def room_for_gradient(x: Tensor, device: torch.device | str | None = None) -> Tensor:
    """Memory for the gradient of ``x``, laid out as ``x`` if that is in one piece, its channels side by side."""
    room = torch.empty_like(x, device=device)
    return room if room.stride(-1) == 1 else torch.empty_like(x, device=device, memory_format=torch.contiguous_format)


def steps_of_gradients(*tensors: Tensor) -> list[tuple[int, ...]]:
    """Strides of the gradient of each."""
    return [room_for_gradient(x, "meta").stride() for x in tensors]
