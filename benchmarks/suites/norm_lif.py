"""LayerNorm and LIF over T steps: ours in one pass, against torch's LayerNorm and two SpikingJellys' LIF."""

from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.measure import contender, peers_on
from benchmarks.old_spikingjelly import NAME, old_contender
from benchmarks.registry import Case, CaseMakers, Suite
from benchmarks.suites import peers
from spikeattn import ATan, norm_lif

TAU, T, WIDTH = 2.0, 32, 256
ROWS = {"cpu": (384, 12_288), "cuda": (12_288, 393_216)}  # a dialogue and a batch, a batch and 32 of them


def cases(device: str, quick: bool) -> CaseMakers:
    """SpikEmo's tokens: few, as in one dialogue, and many, as in a batch; ``rows`` counts T, too."""
    sizes = [(2, 4, 16)] if quick else [(T, rows, WIDTH) for rows in ROWS[device]]
    return [partial(_case, *size, dtype, device) for dtype in (torch.float32, torch.bfloat16) for size in sizes]


def _case(T: int, rows: int, D: int, dtype: torch.dtype, device: str) -> Case:
    x = torch.randn(T, rows // T, D, device=device).mul_(2).to(dtype)
    weight, bias = (p.detach().to(device) for p in nn.LayerNorm(D).parameters())
    weight *= 2  # so that a fifth of the neurons fires
    settings = {"tau": TAU, "surrogate": ATan(), "detach_reset": True}

    def ours(x: Tensor) -> Tensor:
        return norm_lif(x, weight, bias, **settings).spikes

    def after_norm(neuron: peers.Model) -> peers.Model:
        return lambda x: neuron(nn.functional.layer_norm(x, (D,), weight.to(x.dtype), bias.to(x.dtype)))

    new, old = "LayerNorm + SpikingJelly 2.0.0", f"LayerNorm + {NAME}"
    return Case(
        name=f"T={T} rows={rows} D={D} {str(dtype).removeprefix('torch.')}",
        sizes={"T": T, "rows": rows, "D": D, "dtype": str(dtype).removeprefix("torch.")},
        ours=contender("spikeattn", ours, x),
        peers={
            **peers_on(x, {new: lambda: after_norm(peers.spikingjelly_lif(TAU))}),
            old: partial(old_contender, old, x, tau=TAU, norm=(weight, bias)),
        },
        forward_bytes=2 * x.element_size() * x.numel(),
        training_bytes=5 * x.element_size() * x.numel(),
    )


NORM_LIF = Suite("norm_lif", ["tests/ops/test_norm_lif.py"], cases)
