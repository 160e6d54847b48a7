"""A call of `spiking_attention` as it travels behind the registered operations: its tensors, and all else."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

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
        """Both masks, for kernels that take spikes as bits."""
        return self.query_padding_mask, self.key_padding_mask

    def masked(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is given for q, k and v, themselves or their gradients, in the dtype of the sums and zero at padding."""
        return masked(q, self.query_padding_mask), masked(k, self.key_padding_mask), masked(v, self.key_padding_mask)


class Settings(NamedTuple):
    """All else, in the order of the registered operations; what they mean stands in `spiking_attention`."""

    fire: str | None
    order: str
    is_causal: bool
    tau: float
    v_threshold: float
    v_reset: float | None
    detach_reset: bool
    surrogate: str  # its name, by which `surrogate_of` finds it
    alpha: float
    backend: str  # never "auto"


def as_call(arguments: Sequence[Any]) -> tuple[Inputs, Settings]:
    """What a registered operation was given, one after another."""
    count = len(Inputs._fields)
    return Inputs(*arguments[:count]), Settings(*arguments[count:])
