"""LIF over T steps of N neurons: ours, two SpikingJellys', snnTorch's, norse's, and torch.compile of the loop."""

from collections.abc import Callable
from functools import partial

import torch

from benchmarks.measure import contender, peers_on
from benchmarks.old_spikingjelly import NAME, old_contender
from benchmarks.registry import Case, CaseMakers, Suite
from benchmarks.suites import peers
from spikeattn import LIF as OurLIF
from spikeattn import ATan

TAU = 2.0
STEPS = (1, 4, 16, 32, 128, 512)
# By device: neurons, and elements of a tensor at most. On a GPU so many that memory and not the launch is the roof.
NEURONS = {"cpu": 2**18, "cuda": 2**22}
_MOST_ELEMENTS = {"cpu": 2**25, "cuda": 2**28}


def cases(device: str, quick: bool) -> CaseMakers:
    """One case a T and storage type."""
    sizes = [(2, 64)] if quick else [(T, min(NEURONS[device], _MOST_ELEMENTS[device] // T)) for T in STEPS]
    return [partial(_case, T, N, dtype, device) for dtype in (torch.float32, torch.bfloat16) for T, N in sizes]


def _case(T: int, N: int, dtype: torch.dtype, device: str) -> Case:
    x = torch.randn(T, N, device=device).mul_(2).to(dtype)
    ours = OurLIF(TAU, surrogate_function=ATan(), detach_reset=True)
    makers: dict[str, Callable[[], peers.Model]] = {
        "SpikingJelly 2.0.0": lambda: peers.spikingjelly_lif(TAU),
        "torch.compile of the loop": lambda: peers.compiled(partial(peers.loop, tau=TAU)),
        "snnTorch": lambda: peers.snntorch_lif(TAU),
        "norse": lambda: peers.norse_lif(TAU),
    }
    if device == "cuda" and dtype != torch.float32:
        makers["SpikingJelly 2.0.0, fused, float32 state"] = lambda: peers.spikingjelly_fused(TAU, False)
        makers["SpikingJelly 2.0.0, fused, 16-bit state"] = lambda: peers.spikingjelly_fused(TAU, True)
    absent = {}
    if T > peers.COMPILED_STEPS:
        del makers["torch.compile of the loop"]
        absent["torch.compile of the loop"] = peers.NOT_COMPILED
    size = x.element_size()
    return Case(
        name=f"T={T} N={N} {str(dtype).removeprefix('torch.')}",
        sizes={"T": T, "N": N, "dtype": str(dtype).removeprefix("torch.")},
        ours=contender("spikeattn", ours, x),
        peers={**peers_on(x, makers), NAME: partial(old_contender, NAME, x, tau=TAU)},
        absent=absent,
        forward_bytes=2 * size * T * N,
        training_bytes=5 * size * T * N,
    )


LIF = Suite("lif", ["tests/ops/test_lif.py"], cases)
