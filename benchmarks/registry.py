"""What a benchmark is: a case, and the contenders that run it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Contender:
    """One implementation of a case, on inputs that it made beforehand.

    Args:
        name: E.g. "spikeattn numba".
        forward: Runs inference.
        training: Runs forward and backward; returns nothing. None where there is only inference.
        output: Of one forward pass with gradients, so that what is kept for the backward can be counted.
        counts_memory: Whether its peak can be seen; the memory of a CUDA graph was taken when it was captured.
        times_itself: Whether ``forward`` and ``training`` return their seconds, as those of another process do, whose
            memory and host nobody sees here.
    """

    name: str
    forward: Callable[[], object]
    training: Callable[[], object] | None = None
    output: Callable[[], Tensor] | None = None
    counts_memory: bool = True
    times_itself: bool = False


class CannotRun(Exception):
    """Raised where a peer is made; its message is the reason that the results give for its absence."""


@dataclass(frozen=True)
class Case:
    """One size of a suite, and who runs it.

    Args:
        name: E.g. "T=32 N=262144 float32".
        sizes: The same by symbol, for plots.
        ours: The contender the ratios are for.
        peers: What makes the others, by name: called when their time is measured, so that one left out costs nothing.
        absent: Peers that cannot run, with the reason; those whose making fails are added.
        forward_bytes: What a forward pass must move at least, for the roof; 0 where memory is not the roof.
        training_bytes: The same for forward and backward.
        items: What a run is given, e.g. ``(16, "dialogues")``, for how many of them a second takes.
    """

    name: str
    sizes: dict[str, int | str]
    ours: Contender
    peers: dict[str, Callable[[], Contender]]
    absent: dict[str, str] = field(default_factory=dict)
    forward_bytes: int = 0
    training_bytes: int = 0
    items: tuple[int, str] | None = None


@dataclass(frozen=True)
class Suite:
    """A set of cases.

    Args:
        name: As on the command line.
        tests: What pytest must pass before any time is printed.
        cases: Makes the cases one after another, so that one case's tensors are gone before the next: called with
            the device and whether to be quick (size 1).
    """

    name: str
    tests: Sequence[str]
    cases: Callable[[str, bool], "CaseMakers"]


CaseMakers = Sequence[Callable[[], Case]]
