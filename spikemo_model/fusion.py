"""Fusion of the modalities (paper, III-B): MultiAttn."""

from collections.abc import Callable, Iterable, Sequence
from typing import cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from spikemo_model.config import FusionConfig

# Keys and values [2, B, S, D] for each of the other modalities, a row an utterance; None where it is missing.
Rows = list[Tensor | None]


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

    def forward(
        self, x: Tensor, others: Sequence[Tensor | None], padding: Tensor | None, is_causal: bool = False
    ) -> Tensor:
        """``x`` [B, L, D] after attending to ``others``; ``padding`` [B, L] is True where keys do not count.

        The stage of another modality that is None is left out.
        """
        seen = None if padding is None else ~padding[:, None, None, :]
        if is_causal:
            earlier = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
            seen = earlier if seen is None else seen & earlier
        *norms, last_norm = self.norms
        for attention, norm, other in zip(self._attentions(), norms, others, strict=True):
            if other is not None:
                x = norm(x + self.dropout(_attend(attention, x, _keys_and_values(attention, other), seen)))
        return last_norm(x + self.dropout(self.feed_forward(x)))

    def step(self, x: Tensor, others: Sequence[Tensor | None], state: Rows | None) -> tuple[Tensor, Rows]:
        """The next utterances ``x`` [B, L, D] of causal dialogues, and the keys and values of all so far."""
        *norms, last_norm = self.norms
        after: Rows = []
        for i, (attention, norm, other) in enumerate(zip(self._attentions(), norms, others, strict=True)):
            rows = None if state is None else state[i]
            if other is not None:
                own = _keys_and_values(attention, other)
                rows = own if rows is None else torch.cat([rows, own], dim=2)
                L, S = x.shape[1], rows.shape[2]
                seen = torch.ones(L, S, dtype=torch.bool, device=x.device).tril(S - L)
                x = norm(x + self.dropout(_attend(attention, x, rows, seen)))
            after.append(rows)
        return last_norm(x + self.dropout(self.feed_forward(x))), after

    def _attentions(self) -> Iterable[nn.MultiheadAttention]:
        return cast("Iterable[nn.MultiheadAttention]", self.attentions)


def _keys_and_values(attention: nn.MultiheadAttention, other: Tensor) -> Tensor:
    """Keys and values [2, B, S, D] of ``other`` [B, S, D]."""
    D = other.shape[-1]
    projected = nn.functional.linear(other, attention.in_proj_weight[D:], attention.in_proj_bias[D:])
    return projected.unflatten(-1, (2, D)).movedim(2, 0)


def _attend(attention: nn.MultiheadAttention, x: Tensor, rows: Tensor, seen: Tensor | None) -> Tensor:
    """``attention`` of ``x`` [B, L, D] to keys and values ``rows`` where ``seen``, which broadcasts to [B, H, L, S].

    The module's own call would turn the batch inside out first, and then multiply, and in bfloat16 copy, each weight
    once an utterance.
    """
    D = x.shape[-1]
    q = nn.functional.linear(x, attention.in_proj_weight[:D], attention.in_proj_bias[:D])
    q, k, v = (y.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for y in (q, *rows))
    attended = nn.functional.scaled_dot_product_attention(q, k, v, seen)
    return attention.out_proj(attended.transpose(1, 2).flatten(2))


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
        is_causal: Whether an utterance attends to itself and those before only.
    """

    def __init__(
        self, names: list[str], dim: int, config: FusionConfig, dropout: float = 0.0, is_causal: bool = False
    ) -> None:
        super().__init__()
        self.keys, self.is_causal = config.keys, is_causal
        self.stacks = nn.ModuleDict(
            {
                name: nn.ModuleList(FusionLayer(dim, len(names) - 1, config, dropout) for _ in range(config.layers))
                for name in names
            }
        )

    def forward(
        self, features: dict[str, Float[Tensor, "B L D"]], mask: Bool[Tensor, "B L"] | None
    ) -> dict[str, Float[Tensor, "B L D"]]:
        """Fused features by modality; ``mask`` [B, L] is True at utterances, None attends to padding, too.

        Modalities that are not in ``features`` are left out: of the result, and as what the others attend to.
        """
        padding = None if mask is None else ~mask

        def attend(layer: FusionLayer, x: Tensor, others: Sequence[Tensor | None]) -> Tensor:
            return layer(x, others, padding, self.is_causal)

        return self._through(features, attend)

    def step(
        self, features: dict[str, Float[Tensor, "B L D"]], state: list[Rows] | None = None
    ) -> tuple[dict[str, Float[Tensor, "B L D"]], list[Rows]]:
        """The next utterances of causal dialogues, and the keys and values of all so far, layer by layer."""
        before, after = iter(state or []), []

        def attend(layer: FusionLayer, x: Tensor, others: Sequence[Tensor | None]) -> Tensor:
            x, rows = layer.step(x, others, next(before, None))
            after.append(rows)
            return x

        return self._through(features, attend), after

    def _through(
        self, features: dict[str, Tensor], attend: Callable[[FusionLayer, Tensor, Sequence[Tensor | None]], Tensor]
    ) -> dict[str, Tensor]:
        """Every modality that there is through its stack of layers."""
        fused = dict(features)
        for layers in zip(*self.stacks.values(), strict=True):
            keys = features if self.keys == "features" else fused
            fused = {
                name: attend(layer, fused[name], [keys.get(other) for other in self.stacks if other != name])
                for name, layer in zip(self.stacks, layers, strict=True)
                if name in features
            }
        return fused


class Classifier(nn.Module):
    """Logits of the fused modalities: concatenation, a linear layer and an MLP (eq. 12, before its softmax).

    Args:
        names: The modalities, in order.
        dim: Width D of each.
        hidden: Width inside the MLP.
        classes: C.
        dropout: Probability.
    """

    def __init__(self, names: list[str], dim: int, hidden: int, classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.names = names
        self.merge = nn.Linear(len(names) * dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, classes))

    def forward(self, fused: dict[str, Float[Tensor, "B L D"]]) -> Float[Tensor, "B L C"]:
        """Logits [B, L, C]; a modality that is missing is zero."""
        missing = torch.zeros_like(next(iter(fused.values())))
        return self.mlp(self.merge(torch.cat([fused.get(name, missing) for name in self.names], dim=-1)))
