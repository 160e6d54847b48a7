"""The feature level (paper, III-A2): dynamic spiking weight adaptation."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from spikingjelly.activation_based import functional
from torch import Tensor, nn

from spikeattn import LIF, Spike, SpikingTransformer, StreamState
from spikemo_model.config import DSWAConfig

# The encoder's bias at the start, in standard deviations: P(z >= 0.5) = 31 % of a normal feature's neurons fire.
_ENCODER_BIAS = -0.5


class DSWAState(NamedTuple):
    """Where causal dialogues stand: the blocks' attention, and the logarithm of the softmax's sum [B, D]."""

    attention: list[StreamState]
    total: Tensor


class DynamicSpikingWeightAdaptation(nn.Module):
    """Re-weigh the utterances of a dialogue by what a spiking transformer makes of them.

    ::

        s[t] = step(LayerNorm(F))                     encode, the same for t = 1 ... T
        E = mean over t of LayerNorm(blocks(s)[t])    decode
        F = softmax(E) * F + F                        eq. (2), softmax over the dialogue's utterances
                                                      (causal: those up to this one)

    The published code encodes ``step(F)``, which after a ReLU is 1 everywhere; the LayerNorm before the step
    centres it. ``published`` leaves it out.

    Args:
        dim: Width D of the features.
        config: Time steps, blocks and neurons.
        published: Compute as the authors' code does: no centring, no masks, and membranes that go on from one call
            to the next until `reset`.
        is_causal: Whether an utterance sees itself and those before only.
    """

    def __init__(self, dim: int, config: DSWAConfig, published: bool = False, is_causal: bool = False) -> None:
        super().__init__()
        self.time_steps, self.published, self.is_causal = config.time_steps, published, is_causal
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
            is_causal=is_causal,
        )
        self.norm = nn.LayerNorm(dim)
        if published:
            for module in self.blocks.modules():
                if isinstance(module, LIF):
                    module.stateful = True

    def forward(self, x: Float[Tensor, "B L D"], mask: Bool[Tensor, "B L"]) -> Float[Tensor, "B L D"]:
        """``x`` [B, L, D] re-weighed; ``mask`` [B, L] is True at utterances."""
        padding = None if self.published else ~mask
        spikes = self.blocks(self._encoded(x, padding), padding)  # [T, B, L, D]
        relevance = self.norm(spikes).mean(0)
        if padding is not None:
            relevance = relevance.masked_fill(padding.unsqueeze(-1), -torch.inf)
        if self.is_causal:
            return x + x * torch.exp(relevance - torch.logcumsumexp(relevance, dim=1))
        return x + x * torch.softmax(relevance, dim=1)

    def step(
        self, x: Float[Tensor, "B L D"], state: DSWAState | None = None
    ) -> tuple[Float[Tensor, "B L D"], DSWAState]:
        """``x`` [B, L, D], the next utterances of causal dialogues, re-weighed, and the state for those after them."""
        spikes, attention = self.blocks.step(self._encoded(x, None), None if state is None else state.attention)
        relevance = self.norm(spikes).mean(0)
        before = relevance if state is None else torch.cat([state.total.unsqueeze(1), relevance], dim=1)
        total = torch.logcumsumexp(before, dim=1)[:, -x.shape[1] :]
        return x + x * torch.exp(relevance - total), DSWAState(attention, total[:, -1])

    def _encoded(self, x: Tensor, padding: Tensor | None) -> Tensor:
        """The spikes of ``x``, the same at every time step, [T, B, L, D]."""
        centred = self.centre(x)
        if padding is not None:
            centred = centred.masked_fill(padding.unsqueeze(-1), -1.0)  # silent at padding
        spikes = self.encoder(centred)
        return spikes.expand(self.time_steps, *spikes.shape)

    def reset(self) -> None:
        """Forget the membranes that ``published`` carries."""
        functional.reset_net(self.blocks)
