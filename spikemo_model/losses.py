"""The terms of the loss (paper, III-C; the last is MultiEMO's): each a function of what the model returns."""

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
    contrastive: Tensor


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


def focal_contrastive(
    features: Float[Tensor, "N D"],
    labels: Int[Tensor, "N"],
    class_shares: Float[Tensor, "C"],
    temperature: float = 0.8,
    focus: float = 2.0,
    balance: float = 0.8,
) -> Float[Tensor, ""]:
    """Sample-weighted focal contrastive loss, mean over N utterances; 0 for fewer than two.

    With p_ij the softmax over j != i of ``z_i . z_j / temperature``, z the features at length 1, each utterance gives
    ``-w_i`` times the mean of ``(1 - p_ij)^focus log p_ij`` over the j of its own class, or 0 if there are none.

    Source: Shi and Huang 2023 (MultiEMO, ACL 2023.acl-long.824), with the constants of its code.

    Args:
        features: [N, D].
        labels: [N], in 0 ... C - 1.
        class_shares: [C], each class's share of the training utterances, > 0; w is ``share^-balance``, scaled to a
            sum of 1 over the classes.
        temperature: Divides the similarities, > 0 (dimensionless).
        focus: Exponent that pushes easy pairs down, >= 1.
        balance: Exponent that pushes rare classes up.
    """
    N = len(labels)
    if N < 2:
        return features.new_zeros(())
    z = torch.nn.functional.normalize(features, dim=-1)
    itself = torch.eye(N, dtype=torch.bool, device=z.device)
    log_p = torch.log_softmax((z @ z.T / temperature).masked_fill(itself, -torch.inf), dim=-1)
    alike = (labels == labels.unsqueeze(-1)) & ~itself
    log_p = log_p.masked_fill(~alike, 0.0)
    pairs = (1 - log_p.exp()) ** focus * log_p
    weights = torch.nn.functional.normalize(class_shares**-balance, p=1, dim=0)
    return -(weights[labels] * pairs.sum(-1) / alike.sum(-1).clamp_min(1)).mean()


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
        fused: Fused features [N, D] by modality; the correlation is the weighted sum over their pairs (eq. 8), the
            contrastive loss takes them side by side (MultiEMO: after a linear layer more).
        labels: [N].
        config: Weights and constants.
        class_shares: [C], each class's share of the training utterances, > 0; what ``config.balance`` and the
            contrastive loss need.

    Raises:
        ValueError: The contrastive loss has a weight, but there are no shares.
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
    contrastive = zero
    if config.contrastive_weight:
        if class_shares is None:
            raise ValueError("spikemo_loss: contrastive_weight needs class_shares, got None.")
        constants = config.contrastive_temperature, config.contrastive_focus, config.contrastive_balance
        contrastive = focal_contrastive(torch.cat(list(fused.values()), dim=-1), labels, class_shares, *constants)
        total = total + config.contrastive_weight * contrastive
    return LossTerms(total, ce, dice, corr, contrastive)
