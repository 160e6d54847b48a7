"""The three terms of the loss (paper, III-C): each a function of what the model returns."""

from itertools import combinations
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spikemo_model.config import LossConfig


class LossTerms(NamedTuple):
    """The weighted sum and its terms, each a scalar and before its weight."""

    total: Tensor
    ce: Tensor
    dice: Tensor
    corr: Tensor


def cross_entropy(
    logits: Float[Tensor, "N C"], labels: Int[Tensor, "N"], label_smoothing: float = 0.0
) -> Float[Tensor, ""]:
    """Cross-entropy, eq. (10), mean over N utterances; labels in 0 ... C - 1."""
    return torch.nn.functional.cross_entropy(logits, labels, label_smoothing=label_smoothing)


def self_adjusting_dice(
    logits: Float[Tensor, "N C"], labels: Int[Tensor, "N"], alpha: float = 1.5, gamma: float = 0.5
) -> Float[Tensor, ""]:
    """Self-adjusting Dice loss, eq. (9), mean over N utterances.

    ``1 - (2 (1-p)^alpha p + gamma) / ((1-p)^alpha p + 1 + gamma)``, with p the probability of the true class.

    Args:
        logits: [N, C].
        labels: [N], in 0 ... C - 1.
        alpha: Exponent that pushes easy utterances down (dimensionless).
        gamma: Smoothing constant.
    """
    p = torch.softmax(logits, dim=-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    weighted = (1 - p) ** alpha * p
    return (1 - (2 * weighted + gamma) / (weighted + 1 + gamma)).mean()


def soft_hgr(x: Float[Tensor, "N D"], y: Float[Tensor, "N D"]) -> Float[Tensor, ""]:
    """Soft-HGR correlation loss of two modalities, eqs. (5) to (7); 0 for fewer than two utterances.

    ``-E[x^T y] + tr(cov(x) cov(y)) / 2`` over N utterances, features centred, cov [D, D] with N - 1.

    Source: Wang et al. 2019 (arXiv:1811.08979); the paper's code takes the covariance of utterances instead.
    """
    N = len(x)
    if N < 2:
        return x.new_zeros(())
    x, y = x - x.mean(0), y - y.mean(0)
    agreement = (x * y).sum() / (N - 1)
    # tr(cov(x) cov(y)), both symmetric
    spread = ((x.T @ x) * (y.T @ y)).sum() / (N - 1) ** 2
    return spread / 2 - agreement


def spikemo_loss(
    logits: Float[Tensor, "N C"],
    fused: dict[str, Float[Tensor, "N D"]],
    labels: Int[Tensor, "N"],
    config: LossConfig,
    class_shares: Float[Tensor, "C"] | None = None,
) -> LossTerms:
    """The weighted sum of the terms, eq. (11), over N labelled utterances; a weight of 0 skips its term.

    Args:
        logits: [N, C].
        fused: Fused features [N, D] by modality; the correlation is the weighted sum over their pairs (eq. 8).
        labels: [N].
        config: Weights and constants.
        class_shares: [C], each class's share of the training utterances, > 0; what ``config.balance`` needs.
    """
    zero = logits.new_zeros(())
    balanced = logits if class_shares is None else logits + config.balance * class_shares.log()
    ce = cross_entropy(balanced, labels, config.label_smoothing) if config.ce_weight else zero
    dice = self_adjusting_dice(logits, labels, config.dice_alpha, config.dice_gamma) if config.dice_weight else zero
    corr = zero
    if config.corr_weight:
        pairs = list(combinations(fused.values(), 2))
        weights = config.corr_pair_weights or (1.0,) * len(pairs)
        corr = sum((a * soft_hgr(x, y) for a, (x, y) in zip(weights, pairs, strict=True)), zero)
    total = config.ce_weight * ce + config.dice_weight * dice + config.corr_weight * corr
    return LossTerms(total, ce, dice, corr)
