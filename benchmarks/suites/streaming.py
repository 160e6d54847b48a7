"""Latency of one more utterance: a step of a causal spiking transformer, against running the whole prefix again."""

from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.peer_block import PeerBlock
from benchmarks.registry import Case, CaseMakers, Contender, Suite
from benchmarks.suites.block import parts_of
from spikeattn import SpikingTransformer

T, WIDTH, HEADS, DEPTH = 32, 256, 8, 2
BEFORE = (16, 64, 256)


def cases(device: str, quick: bool) -> CaseMakers:
    """By the number of utterances before; only inference, batch 1."""
    sizes = [(2, 3, 16, 2)] if quick else [(T, before, WIDTH, HEADS) for before in BEFORE]
    return [partial(_case, *size, device) for size in sizes]


def _case(T: int, before: int, D: int, heads: int, device: str) -> Case:
    torch.manual_seed(0)
    x = torch.randn(1, before + 1, D, device=device).expand(T, 1, before + 1, D)  # every utterance at every step
    ours = SpikingTransformer(D, DEPTH, heads, is_causal=True).to(device).eval()
    peer = nn.Sequential(*(PeerBlock(parts_of(block, before + 1)) for block in ours.blocks)).to(device)
    with torch.no_grad():
        _, state = ours.step(x[:, :, :before])

    def step() -> Tensor:
        return ours.step(x[:, :, before:], state)[0]

    def without_grad(run):
        def forward() -> Tensor:
            with torch.no_grad():
                return run()

        return forward

    return Case(
        name=f"utterance {before + 1}: T={T} D={D} depth={DEPTH} float32",
        sizes={"T": T, "L": before + 1, "D": D, "dtype": "float32"},
        ours=Contender("spikeattn, step", without_grad(step)),
        peers={
            name: partial(Contender, name, without_grad(partial(model, x)))
            for name, model in (("spikeattn, whole prefix", ours), ("SpikingJelly 2.0.0's parts, whole prefix", peer))
        },
        items=(1, "utterances"),
    )


STREAMING = Suite("streaming", ["tests/nn/test_streaming.py"], cases)
