"""A transformer block, attention and MLP: ours, and the same from SpikingJelly's neurons and PyTorch's layers."""

import copy
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.measure import contender, peers_on
from benchmarks.old_spikingjelly import NAME, old_contender
from benchmarks.peer_block import Parts, PeerBlock
from benchmarks.registry import Case, CaseMakers, Suite
from spikeattn import SpikingTransformerBlock
from spikeattn.nn.projection import SpikingLinear

TAU = 2.0
# T, B, L, D, heads: SpikEmo's, Spikformer's on CIFAR and on ImageNet; a GPU takes 8 times the batch.
SIZES = {"spikemo": (32, 16, 24, 256, 8), "cifar": (4, 8, 64, 384, 12), "imagenet": (4, 2, 196, 512, 8)}
_LARGER = {"cpu": 1, "cuda": 8}


def parts_of(ours: SpikingTransformerBlock, tokens: int) -> Parts:
    """The sizes and weights of ``ours``; ``tokens`` is how many it is given, for the attention's scale."""
    attention = ours.attn
    scale = attention._scale(torch.tensor([[tokens]])).item()
    layers = (attention.q, attention.k, attention.v, attention.out, ours.mlp.fc1, ours.mlp.fc2)
    return Parts(attention.num_heads, attention.is_causal, scale, attention.tau, [_plain(layer) for layer in layers])


def _plain(layer: SpikingLinear) -> tuple[nn.Linear, nn.LayerNorm]:
    linear = nn.Linear(layer.linear.in_features, layer.linear.out_features)
    linear.load_state_dict(layer.linear.state_dict())
    return linear, copy.deepcopy(layer.norm)


def cases(device: str, quick: bool) -> CaseMakers:
    """float32, and ours under bfloat16 autocast against both peers."""
    sizes = {"tiny": (2, 1, 3, 16, 2)} if quick else SIZES
    return [partial(_case, name, *size, low, device) for low in (False, True) for name, size in sizes.items()]


def _case(name: str, T: int, B: int, L: int, D: int, heads: int, low: bool, device: str) -> Case:
    torch.manual_seed(0)
    B *= _LARGER[device]
    x = torch.randn(T, B, L, D, device=device)
    ours = SpikingTransformerBlock(D, heads, tau=TAU).to(device)
    parts = parts_of(ours, L)
    peer = PeerBlock(parts).to(device)

    def autocast(model: nn.Module):
        def run(x: Tensor) -> Tensor:
            with torch.autocast(device, torch.bfloat16):
                return model(x)

        return run

    makers = {"SpikingJelly 2.0.0's parts": lambda: peer}
    if low:
        makers["the same under bfloat16 autocast"] = lambda: autocast(peer)
    peers = {**peers_on(x, makers), f"{NAME}'s parts": partial(old_contender, f"{NAME}'s parts", x, block=parts)}
    return Case(
        name=f"{name}: T={T} B={B} L={L} D={D} heads={heads} {'bfloat16 autocast' if low else 'float32'}",
        sizes={"T": T, "B": B, "L": L, "D": D, "dtype": "bfloat16" if low else "float32"},
        ours=contender("spikeattn", autocast(ours) if low else ours, x),
        peers=peers,
    )


BLOCK = Suite("block", ["tests/nn/test_attention.py"], cases)
