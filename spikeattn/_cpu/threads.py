"""Spreads kernels over threads.

They run on PyTorch's own OpenMP threads where there are any: after each of PyTorch's loops those wait for work,
spinning, and would keep other threads off their cores for milliseconds. Elsewhere, and after a fork, when OpenMP hangs,
they run on a pool of Python threads. numba's own layers abort when two threads call at once (workqueue) or hang after a
fork.
"""

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from spikeattn._backends import IMPORTED_BY

if TYPE_CHECKING:
    from spikeattn._cpu.compiler import Kernel

# Below this many neuron-steps a thread, or a piece, waking another one costs more than it saves.
_WORTH_A_THREAD = 1 << 15
_WORTH_A_PIECE = 1 << 18
# Pieces a thread, of much work: where one core is busy with something else, the others take what it leaves.
_PIECES = 4


def spread(kernel: "Kernel", blocks: int, work: int, **arguments: float) -> None:
    """Run ``kernel`` over all of ``range(blocks)``, on up to ``torch.get_num_threads()`` threads with the caller's.

    Which thread runs a block is left open: ``kernel`` may let no result depend on it.

    Args:
        kernel: What to run.
        blocks: Number of independent blocks.
        work: Neuron-steps in all.
        arguments: What the kernel's frame names.
    """
    if not blocks:
        return
    threads = min(torch.get_num_threads(), blocks, 1 + work // _WORTH_A_THREAD)
    pieces = min(blocks, threads * _PIECES, max(threads, work // _WORTH_A_PIECE))
    frame = kernel.frame.pack(pieces, blocks, arguments)
    if threads == 1:
        kernel.call(frame)
    elif (parallel := _gomp_parallel()) and os.getpid() == IMPORTED_BY:
        parallel(kernel.address, frame, threads, 0)
    else:
        _run_in_pool(partial(kernel.call, frame), threads - 1)
    if kernel.frame.finished(frame) != pieces:  # what went wrong has been printed by numba, to standard error
        raise MemoryError(f"{kernel.function.__name__}: a thread stopped before its work was done.")


@cache
def _gomp_parallel() -> Callable[..., None] | None:
    """``GOMP_parallel`` of the libgomp that PyTorch brings; None where it uses another OpenMP or none."""
    for library in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
        parallel = ctypes.CDLL(str(library)).GOMP_parallel  # the copy that is loaded already
        parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        parallel.restype = None
        return parallel
    return None


@lru_cache(maxsize=4)
def _pool(pid: int, helpers: int) -> ThreadPoolExecutor:
    """Threads besides the caller's. A fork copies the pool but no threads: the child's ``pid`` asks for its own."""
    return ThreadPoolExecutor(helpers, thread_name_prefix="spikeattn")


def _run_in_pool(task: Callable[[], None], helpers: int) -> None:
    """Run ``task`` here and on helpers; one that has not started when the work is done is not waited for.

    So any number of callers can share the pool.
    """
    pool = _pool(os.getpid(), helpers)
    started = [pool.submit(task) for _ in range(helpers)]
    task()
    for helper in started:
        if not helper.cancel():
            helper.result()
