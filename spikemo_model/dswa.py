"""The feature level (paper, III-A2): dynamic spiking weight adaptation."""

import torch
from jaxtyping import Bool, Float
from spikingjelly.activation_based import functional
from torch import Tensor, nn

from spikeattn import LIF, Spike, SpikingTransformer
from spikemo_model.config import DSWAConfig

# The encoder's bias at the start, in standard deviations: P(z >= 0.5) = 31 % of a normal feature's neurons fire.
_ENCODER_BIAS = -0.5


class DynamicSpikingWeightAdaptation(nn.Module):
    """Re-weigh the utterances of a dialogue by what a spiking transformer makes of them.

    ::

        s[t] = step(LayerNorm(F))                     encode, the same for t = 1 ... T
        E = mean over t of LayerNorm(blocks(s)[t])    decode
        F = softmax(E) * F + F                        eq. (2), softmax over the dialogue's utterances

    The published code encodes ``step(F)``, which after a ReLU is 1 everywhere; the LayerNorm before the step
    centres it. ``published`` leaves it out.

    Args:
        dim: Width D of the features.
        config: Time steps, blocks and neurons.
        published: Compute as the authors' code does: no centring, no masks, and membranes that go on from one call
            to the next until `reset`.
    """

    def __init__(self, dim: int, config: DSWAConfig, published: bool = False) -> None:
        super().__init__()
        self.time_steps, self.published = config.time_steps, published
        self.centre: nn.Module = nn.Identity()
        if not published:
            self.centre = nn.LayerNorm(dim)
            nn.init.constant_(self.centre.bias, _ENCODER_BIAS)
        self.encoder = Spike()
        self.blocks = SpikingTransformer(
            dim,
            config.depth,
            config.num_heads,
            mlp_ratio=config.mlp_ratio,
            scale=config.scale,
            fire=config.fire,
            tau=config.tau,
            v_threshold=config.v_threshold,
            attn_v_threshold=config.attn_v_threshold,
            init=config.init,
        )
        self.norm = nn.LayerNorm(dim)
        if published:
            for module in self.blocks.modules():
                if isinstance(module, LIF):
                    module.stateful = True

    def forward(self, x: Float[Tensor, "B L D"], mask: Bool[Tensor, "B L"]) -> Float[Tensor, "B L D"]:
        """``x`` [B, L, D] re-weighed; ``mask`` [B, L] is True at utterances."""
        centred = self.centre(x)
        padding = None if self.published else ~mask
        if padding is not None:
            centred = centred.masked_fill(padding.unsqueeze(-1), -1.0)  # silent at padding
        spikes = self.encoder(centred)
        spikes = self.blocks(spikes.expand(self.time_steps, *spikes.shape), padding)  # [T, B, L, D]
        relevance = self.norm(spikes).mean(0)
        if padding is not None:
            relevance = relevance.masked_fill(padding.unsqueeze(-1), -torch.inf)
        return x + x * torch.softmax(relevance, dim=1)

    def reset(self) -> None:
        """Forget the membranes that ``published`` carries."""
        functional.reset_net(self.blocks)
