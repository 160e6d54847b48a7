"""The core of spiking attention: ours, and two matrix products with our LIF, with SpikingJelly's, or all compiled."""

from functools import partial

import torch
from torch import Tensor

from benchmarks.measure import contender, peers_on
from benchmarks.registry import Case, CaseMakers, Suite
from benchmarks.suites import peers
from spikeattn import ATan, lif, spiking_attention

COMPILED = "torch.compile of two products + the loop"
TAU, V_THRESHOLD, SCALE, RATE = 2.0, 0.5, 0.125, 0.2
# T, B, H, L, E: SpikEmo on MELD, on IEMOCAP; a vision transformer; long sequences.
SIZES = {
    "cpu": [(32, 16, 8, 24, 32), (32, 4, 8, 110, 32), (4, 2, 8, 196, 64), (4, 1, 4, 1024, 64), (4, 1, 2, 4096, 64)],
    "cuda": [(32, 64, 8, 24, 32), (32, 32, 8, 110, 32), (4, 64, 8, 196, 64), (4, 8, 8, 1024, 64), (4, 1, 8, 16384, 64)],
}
# How the cost grows with L, for each E; heads so few on a CPU that a call takes less than a second.
GRID = {
    device: [(4, 1, H, L, E) for E in (32, 64, 128) for L in (16, 128, 1024, 4096, 16384)]
    for device, H in (("cpu", 2), ("cuda", 8))
}
STEPS = [(T, 1, 4, 256, 64) for T in (1, 8, 64, 512)]  # how it grows with T, ours alone
_MAP_BYTES = 2**30  # of the map that the peers make


def cases(device: str, quick: bool) -> CaseMakers:
    """Firing of the output, whole and causal, in float32 and bfloat16 storage. Then ours alone, as it grows.

    Causal the grid is ours alone, and at one E: its peers make the map. On a CPU it is in float32 only.
    """
    tiny = [(2, 1, 2, 3, 4)]
    named, grid, steps = (tiny, [], tiny) if quick else (SIZES[device], GRID[device], STEPS)
    unnamed = [size for size in grid if size not in named]
    alone = {False: steps, True: steps + [size for size in unnamed if size[-1] == 64]}
    compared, growing = [], []
    for dtype in (torch.float32, torch.bfloat16):
        for causal in (False, True):
            beside = named + unnamed if not causal and (device, dtype) != ("cpu", torch.bfloat16) else named
            compared += [partial(_case, *size, causal, dtype, device) for size in beside]
    for causal in (False, True):
        growing += [partial(_case, *size, causal, torch.float32, device, False) for size in alone[causal]]
    return compared + growing


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Ours."""
    return spiking_attention(q, k, v, scale=SCALE, is_causal=causal, tau=TAU, v_threshold=V_THRESHOLD)


def product(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Currents by two matrix products, in the cheaper order; if causal by the whole map."""
    if not causal and q.shape[3] > q.shape[4]:
        return q @ (k.transpose(-1, -2) @ v) * SCALE
    counts = q @ k.transpose(-1, -2)
    return (counts.tril() if causal else counts) @ v * SCALE


def two_products(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """The same and our LIF."""
    current = product(q, k, v, causal)
    return lif(current, tau=TAU, v_threshold=V_THRESHOLD, surrogate=ATan(), detach_reset=True).spikes


def map_is_too_large(T: int, B: int, H: int, L: int) -> bool:
    """Whether causal peers, which make the map, are left out."""
    return 4 * T * B * H * L * L > _MAP_BYTES


def _case(
    T: int, B: int, H: int, L: int, E: int, causal: bool, dtype: torch.dtype, device: str, compared: bool = True
) -> Case:
    x = (torch.rand(3, T, B, H, L, E, device=device) < RATE).to(dtype)

    def ours(x: Tensor) -> Tensor:
        return attend(*x, causal)

    def with_our_lif(x: Tensor) -> Tensor:
        return two_products(*x, causal)

    def after_products(neuron: peers.Model) -> peers.Model:
        return lambda x: neuron(product(*x, causal))

    makers = {
        "two products + our LIF": lambda: with_our_lif,
        "two products + SpikingJelly 2.0.0": lambda: after_products(peers.spikingjelly_lif(TAU, V_THRESHOLD)),
        COMPILED: lambda: peers.compiled(after_products(partial(peers.loop, tau=TAU, v_threshold=V_THRESHOLD))),
    }
    absent = {}
    if not compared:
        absent, makers = dict.fromkeys(makers, "not beside what shows how our cost grows"), {}
    elif causal and map_is_too_large(T, B, H, L):
        absent = dict.fromkeys(makers, f"its map [T, B, H, L, L] takes more than {_MAP_BYTES >> 20} MiB")
        makers = {}
    elif T > peers.COMPILED_STEPS:
        del makers[COMPILED]
        absent[COMPILED] = peers.NOT_COMPILED
    storage = str(dtype).removeprefix("torch.")
    return Case(
        name=f"T={T} B={B} H={H} L={L} E={E} {'causal ' if causal else ''}{storage}",
        sizes={"T": T, "B": B, "H": H, "L": L, "E": E, "dtype": storage, "is_causal": causal},
        ours=contender("spikeattn", ours, x),
        peers=peers_on(x, makers),
        absent=absent,
    )


ATTENTION = Suite("attention", ["tests/ops/test_spiking_attention.py"], cases)
