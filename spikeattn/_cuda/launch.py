"""Launch a kernel on PyTorch's current stream."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

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


def check_limits(plan: LaunchPlan) -> None:
    """Refuse a plan that no device can launch."""
    threads = plan.block[0] * plan.block[1] * plan.block[2]
    if not 1 <= threads <= MAX_THREADS:
        raise ValueError(f"{plan.kernel}: a block must have 1 to {MAX_THREADS} threads, got {plan.block}.")
    if any(not 1 <= size <= limit for size, limit in zip(plan.grid, MAX_GRID, strict=True)):
        raise ValueError(f"{plan.kernel}: the grid must be within {MAX_GRID} and not empty, got {plan.grid}.")
    if plan.shared_bytes > MAX_SHARED_BYTES:
        raise ValueError(f"{plan.kernel}: shared memory must be at most 48 KiB, got {plan.shared_bytes} bytes.")


def typed(args: Sequence[Argument]) -> list[np.generic]:
    """Arguments as a kernel declares them: a pointer (null for None), ``long long`` or ``float``."""
    values: list[np.generic] = []
    for arg in args:
        if isinstance(arg, float):
            values.append(np.float32(arg))
        elif isinstance(arg, int):
            values.append(np.int64(arg))
        else:
            values.append(np.uint64(0 if arg is None else arg.data_ptr()))
    return values


class _CurrentStream:
    """PyTorch's current stream in the form that CuPy takes; older versions of PyTorch have no such method."""

    def __cuda_stream__(self) -> tuple[int, int]:
        """Version of the protocol, and the stream."""
        return 0, torch.cuda.current_stream().cuda_stream


def launch(plan: LaunchPlan, program: Program, args: Sequence[Argument], device: torch.device) -> None:
    """Enqueue ``plan`` of ``program`` behind what PyTorch has enqueued on its current stream of ``device``."""
    import cupy

    check_limits(plan)
    # PyTorch alone sets the device: CuPy's own device guard does not give it back as PyTorch expects (cupy#6569).
    with torch.cuda.device(device):
        index = torch.cuda.current_device()
        kernel = get_kernel(program, plan.kernel, index)
        with cupy.cuda.Stream.from_external(_CurrentStream()):
            kernel(plan.grid, plan.block, tuple(typed(args)), shared_mem=plan.shared_bytes)
    launches[plan.kernel] += 1
