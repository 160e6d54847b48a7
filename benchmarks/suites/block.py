"""A transformer block, attention and MLP: ours, and the same from SpikingJelly's neurons and PyTorch's layers."""

from functools import partial

import torch
from spikingjelly.activation_based import functional, neuron, surrogate
from torch import Tensor, nn

from benchmarks.measure import contender
from benchmarks.registry import Case, CaseMakers, Suite
from spikeattn import SpikingTransformerBlock

TAU = 2.0
# T, B, L, D, heads: SpikEmo's, Spikformer's on CIFAR and on ImageNet.
SIZES = {"spikemo": (32, 16, 24, 256, 8), "cifar": (4, 8, 64, 384, 12), "imagenet": (4, 2, 196, 512, 8)}


class PeerBlock(nn.Module):
    """The equations of `SpikingTransformerBlock` from Linear, LayerNorm, matmul and SpikingJelly's LIFNode."""

    def __init__(self, dim: int, heads: int, scale: float) -> None:
        super().__init__()
        self.heads, self.scale = heads, scale
        self.q, self.k, self.v, self.out = (self._layer(dim, dim) for _ in range(4))
        self.attn_lif = self._lif(0.5)
        self.mlp = nn.Sequential(self._layer(dim, 4 * dim), self._layer(4 * dim, dim))

    @staticmethod
    def _lif(v_threshold: float) -> neuron.LIFNode:
        fire = surrogate.ATan()
        return neuron.LIFNode(TAU, v_threshold=v_threshold, surrogate_function=fire, detach_reset=True, step_mode="m")

    def _layer(self, width: int, out: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(width, out), nn.LayerNorm(out), self._lif(1.0))

    def forward(self, x: Tensor) -> Tensor:
        functional.reset_net(self)
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(2, 3) for layer in (self.q, self.k, self.v))
        attended = self.attn_lif((q @ k.transpose(-1, -2)) @ v * self.scale)
        x = x + self.out(attended.transpose(2, 3).flatten(3))
        return x + self.mlp(x)


def cases(device: str, quick: bool) -> CaseMakers:
    """float32, and ours under bfloat16 autocast against both peers."""
    sizes = {"tiny": (2, 1, 3, 16, 2)} if quick else SIZES
    return [partial(_case, name, *size, low, device) for low in (False, True) for name, size in sizes.items()]


def _case(name: str, T: int, B: int, L: int, D: int, heads: int, low: bool, device: str) -> Case:
    torch.manual_seed(0)
    x = torch.randn(T, B, L, D, device=device)
    ours = SpikingTransformerBlock(D, heads, tau=TAU).to(device)
    peer = PeerBlock(D, heads, ours.attn._scale(torch.tensor([[L]])).item()).to(device)
    for own, other in zip(_layers(ours), [peer.q, peer.k, peer.v, peer.out, *peer.mlp], strict=True):
        other[0].load_state_dict(own.linear.state_dict())
        other[1].load_state_dict(own.norm.state_dict())

    def autocast(model: nn.Module):
        def run(x: Tensor) -> Tensor:
            with torch.autocast(device, torch.bfloat16):
                return model(x)

        return run

    peers = [contender("SpikingJelly 2.0.0's parts", peer, x)]
    if low:
        peers.append(contender("the same under bfloat16 autocast", autocast(peer), x))
    return Case(
        name=f"{name}: T={T} B={B} L={L} D={D} heads={heads} {'bfloat16 autocast' if low else 'float32'}",
        sizes={"T": T, "B": B, "L": L, "D": D, "dtype": "bfloat16" if low else "float32"},
        ours=contender("spikeattn", autocast(ours) if low else ours, x),
        peers=peers,
    )


def _layers(block: SpikingTransformerBlock) -> list[nn.Module]:
    """The layers of ours in the order of the peer's."""
    return [block.attn.q, block.attn.k, block.attn.v, block.attn.out, block.mlp.fc1, block.mlp.fc2]


BLOCK = Suite("block", ["tests/nn/test_attention.py"], cases)
