"""Fusion of the modalities (paper, III-B): MultiAttn."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from spikemo_model.config import FusionConfig


class FusionLayer(nn.Module):
    """One layer for one modality: attend to each of the others in turn, then feed forward.

    Each stage is ``LayerNorm(x + dropout(stage(x)))``; eq. (3) is the first attention, eq. (4) the second, whose
    query is the result of the first.

    Args:
        dim: Width D.
        others: How many other modalities there are.
        config: Heads and hidden width.
        dropout: Probability.
    """

    def __init__(self, dim: int, others: int, config: FusionConfig, dropout: float) -> None:
        super().__init__()
        self.attentions = nn.ModuleList(
            nn.MultiheadAttention(dim, config.num_heads, batch_first=True) for _ in range(others)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(others + 1))
        self.feed_forward = nn.Sequential(
            nn.Linear(dim, config.hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(config.hidden, dim)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, others: list[Tensor], padding: Tensor | None) -> Tensor:
        """``x`` [B, L, D] after attending to ``others``; ``padding`` [B, L] is True where keys do not count."""
        *norms, last_norm = self.norms
        for attention, norm, other in zip(self.attentions, norms, others, strict=True):
            attended, _ = attention(x, other, other, key_padding_mask=padding, need_weights=False)
            x = norm(x + self.dropout(attended))
        return last_norm(x + self.dropout(self.feed_forward(x)))


class MultiAttn(nn.Module):
    """A stack of `FusionLayer` for each modality.

    Source: paper, eqs. (3) and (4); Shi and Huang 2023 (MultiEMO). The others are taken in the order of the
    configuration: text attends to audio, then to visual; audio to text, then visual; visual to text, then audio.
    One modality alone has no attention: a stack of feed-forward layers.

    Args:
        names: The modalities, in order.
        dim: Width D.
        config: Layers, heads, hidden width and where the keys come from.
        dropout: Probability.
    """

    def __init__(self, names: list[str], dim: int, config: FusionConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.keys = config.keys
        self.stacks = nn.ModuleDict(
            {
                name: nn.ModuleList(FusionLayer(dim, len(names) - 1, config, dropout) for _ in range(config.layers))
                for name in names
            }
        )

    def forward(
        self, features: dict[str, Float[Tensor, "B L D"]], mask: Bool[Tensor, "B L"] | None
    ) -> dict[str, Float[Tensor, "B L D"]]:
        """Fused features by modality; ``mask`` [B, L] is True at utterances, None attends to padding, too."""
        padding = None if mask is None else ~mask
        fused = dict(features)
        for layers in zip(*self.stacks.values(), strict=True):
            keys = features if self.keys == "features" else fused
            fused = {
                name: layer(fused[name], [x for other, x in keys.items() if other != name], padding)
                for name, layer in zip(self.stacks, layers, strict=True)
            }
        return fused


class Classifier(nn.Module):
    """Logits of the fused modalities: concatenation, a linear layer and an MLP (eq. 12, before its softmax).

    Args:
        modalities: How many there are.
        dim: Width D of each.
        hidden: Width inside the MLP.
        classes: C.
        dropout: Probability.
    """

    def __init__(self, modalities: int, dim: int, hidden: int, classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.merge = nn.Linear(modalities * dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, classes))

    def forward(self, fused: dict[str, Float[Tensor, "B L D"]]) -> Float[Tensor, "B L C"]:
        """Logits [B, L, C]."""
        return self.mlp(self.merge(torch.cat(list(fused.values()), dim=-1)))
