"""Launch a kernel on PyTorch's current stream."""

from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from spikeattn._cuda.module import get_kernel
from spikeattn._cuda.source import Program

Argument = Tensor | int | float | None

# Of every device that CUDA 12 and 13 know.
MAX_GRID = (2**31 - 1, 2**16 - 1, 2**16 - 1)
MAX_THREADS = 1024
MAX_SHARED_BYTES = 48 * 1024

# How often each kernel was launched: a test proves by it that a kernel, and not its reference, ran.
launches: Counter[str] = Counter()


class LaunchPlan(NamedTuple):
    """Which kernel, on how many threads: a pure function of sizes."""

    kernel: str  # entry point
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int = 0
    constants: tuple[tuple[str, int], ...] = ()  # sizes of the tile, known when the kernel is compiled


Planned = tuple[LaunchPlan, Program]


def check_limits(plan: LaunchPlan) -> None:
    """Refuse a plan that no device can launch."""
    threads = plan.block[0] * plan.block[1] * plan.block[2]
    if not 1 <= threads <= MAX_THREADS:
        raise ValueError(f"{plan.kernel}: a block must have 1 to {MAX_THREADS} threads, got {plan.block}.")
    if any(not 1 <= size <= limit for size, limit in zip(plan.grid, MAX_GRID, strict=True)):
        raise ValueError(f"{plan.kernel}: the grid must be within {MAX_GRID} and not empty, got {plan.grid}.")
    if plan.shared_bytes > MAX_SHARED_BYTES:
        raise ValueError(f"{plan.kernel}: shared memory must be at most 48 KiB, got {plan.shared_bytes} bytes.")


def typed(args: Sequence[Argument]) -> list[np.float32 | int]:
    """Arguments as a kernel declares them: a pointer (null for None), ``long long`` or ``float``.

    CuPy makes 8 bytes of an int, which are a pointer or a ``long long``.
    """
    values: list[np.float32 | int] = []
    for arg in args:
        if isinstance(arg, Tensor):
            values.append(arg.data_ptr())
        elif isinstance(arg, float):
            values.append(np.float32(arg))
        else:
            values.append(arg or 0)
    return values


class _Stream(NamedTuple):
    """A stream of PyTorch in the form that CuPy takes; older versions of PyTorch have no such method."""

    pointer: int

    def __cuda_stream__(self) -> tuple[int, int]:
        """Version of the protocol, and the stream."""
        return 0, self.pointer


@cache
def _cupy_stream(pointer: int) -> Any:
    """CuPy's object for a stream of PyTorch, whose streams last as long as the process."""
    import cupy

    return cupy.cuda.Stream.from_external(_Stream(pointer))


def launch(plan: LaunchPlan, program: Program, args: Sequence[Argument], device: torch.device) -> None:
    """Enqueue ``plan`` of ``program`` behind what PyTorch has enqueued on its current stream of ``device``.

    Every microsecond here is one that small calls wait for: no context manager where the device is the current one.
    """
    check_limits(plan)
    index = torch.cuda.current_device()
    if device.index not in (None, index):
        # PyTorch alone sets the device: CuPy's own device guard does not give it back as PyTorch expects (cupy#6569).
        with torch.cuda.device(device):
            return launch(plan, program, args, device)
    kernel = get_kernel(program, plan.kernel, index)
    stream = _cupy_stream(torch.cuda.current_stream().cuda_stream)
    kernel(plan.grid, plan.block, typed(args), plan.shared_bytes, stream)
    launches[plan.kernel] += 1
