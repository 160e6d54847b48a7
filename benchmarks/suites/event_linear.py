"""Linear layers on spikes, few and many of them, and on real numbers: ours, and PyTorch's."""

from functools import partial

import torch
from torch import nn

from benchmarks.measure import contender, peers_on
from benchmarks.registry import Case, CaseMakers, Suite
from spikeattn import EventLinear

ROWS = 12_288  # T B L of SpikEmo's batch: 32 * 16 * 24
SIZES = ((256, 256), (256, 1024), (1024, 256))
RATES = (0.05, 0.1, 0.2, 0.4, 1.0)  # 1.0: real numbers


def cases(device: str, quick: bool) -> CaseMakers:
    """The layers of SpikEmo's block, by firing rate."""
    sizes = [(8, 16, 16)] if quick else [(ROWS, *size) for size in SIZES]
    return [partial(_case, *size, rate, device) for size in sizes for rate in RATES]


def _case(rows: int, inputs: int, outputs: int, rate: float, device: str) -> Case:
    x = (torch.rand(rows, inputs, device=device) < rate).float()
    if rate == 1.0:
        x = torch.randn(rows, inputs, device=device)
    ours, theirs = EventLinear(inputs, outputs).to(device), nn.Linear(inputs, outputs).to(device)
    what = "real numbers" if rate == 1.0 else f"rate {rate}"
    return Case(
        name=f"{rows} rows, {inputs} to {outputs}, {what}",
        sizes={"rows": rows, "inputs": inputs, "outputs": outputs, "rate": str(rate), "dtype": "float32"},
        ours=contender("spikeattn", ours, x),
        peers=peers_on(x, {"torch.nn.Linear": lambda: theirs}),
    )


EVENT_LINEAR = Suite("event_linear", ["tests/ops/test_event_linear.py"], cases)
