"""A call of `spiking_attention` as it travels behind the registered operations: its tensors, and all else."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from spikeattn.ops.spiking_attention.layout import in_one_piece, rows_in_one_piece
from spikeattn.ops.spiking_attention.reference import masked

Masks = tuple[Tensor | None, Tensor | None]  # of queries [B, L], and of keys and values [B, S]; True at padding


class Inputs(NamedTuple):
    """The tensors, in the order of the registered operations."""

    q: Tensor  # [T, B, H, L, E]
    k: Tensor  # [T, B, H, S, E]
    v: Tensor  # as k
    scale: Tensor  # of five axes, broadcasts to [T, B, H, L, 1], in the dtype of the sums
    query_padding_mask: Tensor | None
    key_padding_mask: Tensor | None

    @property
    def masks(self) -> Masks:
        """Of queries, and of keys and values."""
        return self.query_padding_mask, self.key_padding_mask

    def in_one_piece(self) -> "Inputs":
        """What CUDA kernels read: the channels of a token side by side, masks without gaps."""
        q, k, v = (rows_in_one_piece(x) for x in self[:3])
        return Inputs(q, k, v, self.scale, *(in_one_piece(mask) for mask in self.masks))

    def masked(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is given for q, k and v, themselves or their gradients, in the dtype of the sums and zero at padding."""
        return masked(q, self.query_padding_mask), masked(k, self.key_padding_mask), masked(v, self.key_padding_mask)


class Settings(NamedTuple):
    """All else, in the order of the registered operations; what they mean stands in `spiking_attention`."""

    fire: str | None  # "output", "map" or None
    order: str  # "auto", "map_first" or "state_first"
    is_causal: bool
    tau: float
    v_threshold: float
    v_reset: float | None
    detach_reset: bool
    surrogate: str  # its name, by which `surrogate_of` finds it
    alpha: float
    backend: str  # "torch", "numba" or "cupy"


def as_call(arguments: Sequence[Any]) -> tuple[Inputs, Settings]:
    """What a registered operation was given, one after another."""
    count = len(Inputs._fields)
    return Inputs(*arguments[:count]), Settings(*arguments[count:])
