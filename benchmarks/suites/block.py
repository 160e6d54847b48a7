"""A transformer block, attention and MLP: ours, and the same from SpikingJelly's neurons and PyTorch's layers."""

import copy
from functools import partial

import torch
from spikingjelly.activation_based import functional, neuron, surrogate
from torch import Tensor, nn

from benchmarks.measure import contender, peers_on
from benchmarks.registry import Case, CaseMakers, Suite
from spikeattn import SpikingTransformerBlock
from spikeattn.nn.projection import SpikingLinear

TAU = 2.0
# T, B, L, D, heads: SpikEmo's, Spikformer's on CIFAR and on ImageNet; a GPU takes 8 times the batch.
SIZES = {"spikemo": (32, 16, 24, 256, 8), "cifar": (4, 8, 64, 384, 12), "imagenet": (4, 2, 196, 512, 8)}
_LARGER = {"cpu": 1, "cuda": 8}


class PeerBlock(nn.Module):
    """The equations of `SpikingTransformerBlock` from Linear, LayerNorm, matmul and SpikingJelly's LIFNode.

    Args:
        ours: The block whose sizes and weights it has.
        tokens: How many tokens it is given, for the attention's scale.
    """

    def __init__(self, ours: SpikingTransformerBlock, tokens: int) -> None:
        super().__init__()
        attention = ours.attn
        self.heads, self.causal = attention.num_heads, attention.is_causal
        self.scale = attention._scale(torch.tensor([[tokens]])).item()
        self.tau = attention.tau
        self.attn_lif = self._lif(0.5)
        layers = (attention.q, attention.k, attention.v, attention.out, ours.mlp.fc1, ours.mlp.fc2)
        self.q, self.k, self.v, self.out, fc1, fc2 = map(self._layer, layers)
        self.mlp = nn.Sequential(fc1, fc2)

    def _lif(self, v_threshold: float) -> neuron.LIFNode:
        fire = surrogate.ATan()
        options = {"surrogate_function": fire, "detach_reset": True, "step_mode": "m"}
        return neuron.LIFNode(self.tau, v_threshold=v_threshold, **options)

    def _layer(self, ours: SpikingLinear) -> nn.Sequential:
        linear = nn.Linear(ours.linear.in_features, ours.linear.out_features)
        linear.load_state_dict(ours.linear.state_dict())
        return nn.Sequential(linear, copy.deepcopy(ours.norm), self._lif(1.0))

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        functional.reset_net(self)
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(2, 3) for layer in (self.q, self.k, self.v))
        if key_padding_mask is not None:
            k, v = (y.masked_fill(key_padding_mask[:, None, :, None], 0.0) for y in (k, v))
        weights = q @ k.transpose(-1, -2)
        attended = self.attn_lif((weights.tril() if self.causal else weights) @ v * self.scale)
        x = x + self.out(attended.transpose(2, 3).flatten(3))
        return x + self.mlp(x)


def cases(device: str, quick: bool) -> CaseMakers:
    """float32, and ours under bfloat16 autocast against both peers."""
    sizes = {"tiny": (2, 1, 3, 16, 2)} if quick else SIZES
    return [partial(_case, name, *size, low, device) for low in (False, True) for name, size in sizes.items()]


def _case(name: str, T: int, B: int, L: int, D: int, heads: int, low: bool, device: str) -> Case:
    torch.manual_seed(0)
    B *= _LARGER[device]
    x = torch.randn(T, B, L, D, device=device)
    ours = SpikingTransformerBlock(D, heads, tau=TAU).to(device)
    peer = PeerBlock(ours, L).to(device)

    def autocast(model: nn.Module):
        def run(x: Tensor) -> Tensor:
            with torch.autocast(device, torch.bfloat16):
                return model(x)

        return run

    peers = {"SpikingJelly 2.0.0's parts": lambda: peer}
    if low:
        peers["the same under bfloat16 autocast"] = lambda: autocast(peer)
    return Case(
        name=f"{name}: T={T} B={B} L={L} D={D} heads={heads} {'bfloat16 autocast' if low else 'float32'}",
        sizes={"T": T, "B": B, "L": L, "D": D, "dtype": "bfloat16" if low else "float32"},
        ours=contender("spikeattn", autocast(ours) if low else ours, x),
        peers=peers_on(x, peers),
    )


BLOCK = Suite("block", ["tests/nn/test_attention.py"], cases)
