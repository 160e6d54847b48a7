"""Interleaved timing: ours and one peer, A B A B ..., on the same inputs.

One pair after another: with all peers in one round, each would be timed on the caches, the heap and the memory that the
others leave behind, which changes times by up to a half.
"""

import ctypes
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.registry import CannotRun, Case, Contender

_L2_BYTES = 256 * 2**20
_AHEAD = 2_000_000  # clock cycles, about a millisecond


class Times(NamedTuple):
    """Seconds of the first call, which compiles, and of each measured call."""

    first: float
    samples: list[float]

    @property
    def median(self) -> float:
        """Median of the samples, in seconds."""
        return statistics.median(self.samples)

    def percentile(self, share: float) -> float:
        """The sample below which ``share`` of them lie."""
        ordered = sorted(self.samples)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def interleaved(timed: dict[str, Callable[[], float]], seconds: float, most: int = 50) -> dict[str, Times]:
    """Run each of ``timed``, which return seconds, in turn until ``seconds`` have gone by (three rounds at least)."""
    first = {name: run() for name, run in timed.items()}
    for run in timed.values():
        run()  # warm-up: caches, thread pools, allocator
    samples: dict[str, list[float]] = {name: [] for name in timed}
    end = time.perf_counter() + seconds
    for rounds in range(most):
        if rounds >= 3 and time.perf_counter() > end:
            break
        for name, run in timed.items():
            samples[name].append(run())
    return {name: Times(first[name], samples[name]) for name in timed}


def clock_of(device: str) -> Callable[[Callable[[], object]], float]:
    """What runs something on the device and returns its seconds."""
    return _cuda_seconds if device == "cuda" else _cpu_seconds


def _cpu_seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _cuda_seconds(run: Callable[[], object]) -> float:
    torch.empty(_L2_BYTES, dtype=torch.int8, device="cuda").zero_()  # nothing of the last run is left in the cache
    torch.cuda._sleep(_AHEAD)  # the host is ahead of the device, as it is in the middle of a training step
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def host_seconds(run: Callable[[], object]) -> float:
    """How long the host takes to enqueue ``run`` on an idle GPU: the least of a few times, the machine may be noisy."""
    times: list[float] = []
    while len(times) < 10 and sum(times) < 0.2:
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return min(times)


def kept_bytes(output: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps for the backward of one forward pass, each storage once."""
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output()
    return sum(kept.values())


def copy_bandwidth(device: str, nbytes: int = 2**28) -> float:
    """Bytes read and written a second by a copy of ``nbytes``, on this machine, now."""
    a, b = (torch.ones(nbytes // 4, device=device) for _ in range(2))
    times = interleaved({"copy": partial(clock_of(device), lambda: b.copy_(a))}, seconds=1.0)["copy"]
    return 2 * nbytes / times.median


def peak_bytes(run: Callable[[], object], device: str) -> int | None:
    """The most memory that ``run`` has in use beyond what was in use before; None where nothing tells."""
    from spikeattn._cpu import memory  # here: beside another version of spikingjelly, this module has no spikeattn

    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        memory.release()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
        before = _status_bytes("VmRSS")
        run()
        return _status_bytes("VmHWM") - before
    except (OSError, AttributeError):  # no Linux, or not allowed
        return None


def _status_bytes(name: str) -> int:
    """An entry of this process's memory, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def measure(case: Case, device: str, seconds: float, skip: Sequence[str] = ()) -> dict[str, object]:
    """Times and memory of every contender, as plain values; peers with one of ``skip`` in their name are left out."""
    peers, absent = _made(case, skip)
    contenders = [case.ours, *peers]
    row: dict[str, Any] = {"case": case.name, "sizes": case.sizes, "ours": case.ours.name, "absent": absent}
    row["bytes"] = {"forward": case.forward_bytes, "training": case.training_bytes}
    row["items"] = case.items
    clock = clock_of(device)
    row["peak_bytes"], row["host_s"] = {}, {}
    for what in ("forward", "training"):
        runs = {c: run for c in contenders if (run := getattr(c, what)) is not None}
        if runs:
            timed = {c.name: run if c.times_itself else partial(clock, run) for c, run in runs.items()}
            row[what] = _pairs(case.ours.name, timed, seconds, absent)
            here = {c: run for c, run in runs.items() if not c.times_itself}
            if device == "cuda":
                row["host_s"][what] = {c.name: host_seconds(run) for c, run in here.items()}
            row["peak_bytes"][what] = {c.name: peak_bytes(run, device) for c, run in here.items() if c.counts_memory}
    row["kept_bytes"] = {c.name: kept_bytes(c.output) for c in contenders if c.output is not None}
    return row


def _made(case: Case, skip: Sequence[str]) -> tuple[list[Contender], dict[str, str]]:
    """The peers that can run, and why each of the others is absent."""
    made, absent = [], dict(case.absent)
    for name, make in case.peers.items():
        if any(part in name for part in skip):
            absent[name] = "left out by --skip"
            continue
        try:
            made.append(make())
        except ImportError as error:
            absent[name] = f"cannot be imported: {error}"
        except CannotRun as error:
            absent[name] = str(error)
    return made, absent


def _pairs(ours: str, timed: dict[str, Callable[[], float]], seconds: float, absent: dict[str, str]) -> dict[str, Any]:
    """Times of every contender; each peer's beside ours, whose median in that pair is its ``ours_s``.

    A peer that stops working goes to ``absent``.
    """
    measured: dict[str, Any] = {}
    own: list[Times] = []
    peers = [name for name in timed if name != ours]
    for peer in peers:
        try:
            times = interleaved({name: timed[name] for name in (ours, peer)}, seconds)
        except CannotRun as error:
            absent[peer] = str(error)
            continue
        own.append(times[ours])
        measured[peer] = {**_plain(times[peer]), "ours_s": own[-1].median}
    own = own or [interleaved({ours: timed[ours]}, seconds)[ours]]
    all_own = Times(own[0].first, [sample for times in own for sample in times.samples])
    return {ours: _plain(all_own), **measured}


def _plain(times: Times) -> dict[str, Any]:
    """Times as plain values."""
    return {
        "first_s": times.first,
        "median_s": times.median,
        "p20_s": times.percentile(0.2),
        "p80_s": times.percentile(0.8),
        "samples_s": times.samples,
    }


def contender(name: str, model: Callable[[Tensor], Tensor], x: Tensor) -> Contender:
    """A contender that runs ``model`` on ``x``, with a fixed gradient at its output."""
    leaf = x.detach().requires_grad_()
    with torch.no_grad():
        weight = torch.randn_like(model(x))

    def output() -> Tensor:
        return model(leaf)

    def training() -> None:
        leaf.grad = None
        model(leaf).backward(weight)

    def forward() -> Tensor:
        with torch.no_grad():
            return model(x)

    return Contender(name, forward, training, output)


def peers_on(
    x: Tensor, makers: dict[str, Callable[[], Callable[[Tensor], Tensor]]]
) -> dict[str, Callable[[], Contender]]:
    """Peers of a case, by name, from what makes their models."""
    return {name: lambda name=name, make=make: contender(name, make(), x) for name, make in makers.items()}
