"""A spiking transformer block from PyTorch's layers and SpikingJelly's neurons, of any version; nothing is ours."""

from typing import NamedTuple

from spikingjelly.activation_based import functional, neuron, surrogate
from torch import Tensor, nn


class Parts(NamedTuple):
    """What a block is made of, besides neurons, in PyTorch's own layers."""

    heads: int
    causal: bool
    scale: float
    tau: float
    layers: list[tuple[nn.Linear, nn.LayerNorm]]  # of q, k, v, the way out, and the two of the MLP


class PeerBlock(nn.Module):
    """The equations of `SpikingTransformerBlock` from Linear, LayerNorm, matmul and SpikingJelly's LIFNode."""

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.heads, self.causal, self.scale, self.tau, layers = parts
        self.attn_lif = self._lif(0.5)
        own = [nn.Sequential(linear, norm, self._lif(1.0)) for linear, norm in layers]
        self.q, self.k, self.v, self.out, *mlp = own
        self.mlp = nn.Sequential(*mlp)

    def _lif(self, v_threshold: float) -> neuron.LIFNode:
        fire = surrogate.ATan()
        options = {"surrogate_function": fire, "detach_reset": True, "step_mode": "m"}
        return neuron.LIFNode(self.tau, v_threshold=v_threshold, **options)

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        functional.reset_net(self)
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(2, 3) for layer in (self.q, self.k, self.v))
        if key_padding_mask is not None:
            k, v = (y.masked_fill(key_padding_mask[:, None, :, None], 0.0) for y in (k, v))
        weights = q @ k.transpose(-1, -2)
        attended = self.attn_lif((weights.tril() if self.causal else weights) @ v * self.scale)
        x = x + self.out(attended.transpose(2, 3).flatten(3))
        return x + self.mlp(x)
