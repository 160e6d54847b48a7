"""Spreads compiled functions over threads.

numba's own threading layers abort when two threads call at once (workqueue) or hang after a fork (OpenMP). Compiled
functions that release the interpreter's lock need neither: a pool of Python threads is enough.
"""

import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch

# Below this many neuron-steps a thread, waking another one costs more than it saves.
_WORTH_A_THREAD = 1 << 15
# Pieces a thread: where one core is busy with something else, the others take what it leaves.
_PIECES = 4


@lru_cache(maxsize=4)
def _pool(pid: int, helpers: int) -> ThreadPoolExecutor:
    """Threads besides the caller's. A fork copies the pool but no threads: the child's ``pid`` asks for its own."""
    return ThreadPoolExecutor(helpers, thread_name_prefix="spikeattn")


def spread(run: Callable[[int, int], None], blocks: int, work: int) -> None:
    """Call ``run(first, last)`` over all of ``range(blocks)``, on up to ``torch.get_num_threads()`` threads.

    Which thread runs a block is left open: ``run`` may let no result depend on it. The caller takes part and never
    waits for a helper that has not started, so any number of callers can share the pool.

    Args:
        run: Releases the interpreter's lock for most of its time.
        blocks: Number of independent blocks.
        work: Neuron-steps in all.
    """
    threads = min(torch.get_num_threads(), blocks, 1 + work // _WORTH_A_THREAD)
    if threads <= 1:
        run(0, blocks)
        return
    pieces = min(blocks, threads * _PIECES)
    counter = itertools.count()  # next() is atomic

    def take_pieces() -> None:
        while (piece := next(counter)) < pieces:
            run(blocks * piece // pieces, blocks * (piece + 1) // pieces)

    pool = _pool(os.getpid(), threads - 1)
    helpers = [pool.submit(take_pieces) for _ in range(threads - 1)]
    take_pieces()
    for helper in helpers:
        if not helper.cancel():
            helper.result()
