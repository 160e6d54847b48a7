"""Attention's kernels without the host: CUDA graphs of a call, replayed; ours, and two matrix products with our LIF.

    python -m benchmarks.replay      prints a table of microseconds: forward, and forward + backward

The tables of `python -m benchmarks.run` hold what a call takes that Python makes. Inside a training step, which is
replayed as a graph, this is what counts.
"""

import statistics
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.measure import clock_of
from benchmarks.suites.attention import RATE, SIZES, attend, map_is_too_large, two_products


def main() -> None:
    """The table, a row for each size of the suite."""
    if not torch.cuda.is_available():
        sys.exit("error: benchmarks.replay needs a CUDA device; on a CPU, python -m benchmarks.run --suite attention.")
    print("| T, B, H, L, E | dtype | ours | two products + our LIF |\n| --- | --- | --- | --- |")
    for dtype in (torch.float32, torch.bfloat16):
        for is_causal in (False, True):
            for size in SIZES["cuda"]:
                print(_row(size, dtype, is_causal), flush=True)


def _row(size: tuple[int, int, int, int, int], dtype: torch.dtype, is_causal: bool) -> str:
    T, B, H, L, E = size
    q, k, v = ((torch.rand(T, B, L, H, E, device="cuda") < RATE).to(dtype).transpose(2, 3) for _ in range(3))
    ours = [x.requires_grad_() for x in (q, k, v)]  # as a model has them; products have theirs as they like them
    theirs = [x.detach().contiguous().requires_grad_() for x in ours]

    cells = [_times(partial(attend, causal=is_causal), ours)]
    no_map = is_causal and map_is_too_large(T, B, H, L)
    cells.append("-" if no_map else _times(partial(two_products, causal=is_causal), theirs))
    name = ", ".join(map(str, size)) + (", causal" if is_causal else "")
    return f"| {name} | {str(dtype).removeprefix('torch.')} | {' | '.join(cells)} |"


def _times(model: Callable[..., Tensor], leaves: list[Tensor]) -> str:
    """Microseconds of the forward, and of both directions."""

    def forward() -> Tensor:
        with torch.no_grad():
            return model(*leaves)

    weight = torch.randn_like(forward())

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(model(*leaves), leaves, weight)

    return ", ".join(f"{1e6 * _replayed(run):.0f}" for run in (forward, both))


def _replayed(run: Callable[[], object]) -> float:
    """Seconds of a replay of ``run``, the median of nine, with nothing of the last one in the cache."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()  # the graph writes to it
    seconds = statistics.median(clock_of("cuda")(graph.replay) for _ in range(9))
    del kept
    return seconds


if __name__ == "__main__":
    main()
