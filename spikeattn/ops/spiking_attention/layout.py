"""How tensors of any strides reach kernels: rows of channels in one piece, the other strides by value."""

from torch import Tensor


def rows_in_one_piece(x: Tensor) -> Tensor:
    """``x`` with a stride of 1 along its channels."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def in_one_piece(padding_mask: Tensor | None) -> Tensor | None:
    """A contiguous mask, or none."""
    return None if padding_mask is None else padding_mask.contiguous()


def strides(x: Tensor) -> list[int]:
    """Strides of the first four axes, 0 where one number is for all."""
    return [0 if size == 1 else stride for size, stride in zip(x.shape[:4], x.stride()[:4], strict=True)]
