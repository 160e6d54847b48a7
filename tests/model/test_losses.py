"""Losses: numbers by hand, float64 gradients, and what must not change them."""

import math

import pytest
import torch
from safetensors.torch import load_file

from spikemo_model.config import LossConfig
from spikemo_model.losses import cross_entropy, focal_contrastive, self_adjusting_dice, soft_hgr, spikemo_loss


def test_cross_entropy_by_hand():
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]], dtype=torch.float64))
    wanted = -(math.log(0.5) + math.log(0.8)) / 2
    assert cross_entropy(logits, torch.tensor([0, 2])).item() == pytest.approx(wanted, rel=1e-12)


def test_dice_by_hand():
    p = 0.8
    logits = torch.log(torch.tensor([[p, 1 - p]], dtype=torch.float64))
    weighted = (1 - p) ** 1.5 * p
    wanted = 1 - (2 * weighted + 0.5) / (weighted + 1 + 0.5)
    assert self_adjusting_dice(logits, torch.tensor([0])).item() == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("name", ["meld", "iemocap"])
def test_cross_entropy_and_dice_are_the_authors(fixtures, name):
    tensors = load_file(fixtures / f"published_{name}.tensors.safetensors")
    labels = tensors["input.labels"]
    labels = labels[labels >= 0]
    assert cross_entropy(tensors["logits"], labels).item() == pytest.approx(tensors["loss.ce"].item(), abs=1e-6)
    assert self_adjusting_dice(tensors["logits"], labels).item() == pytest.approx(tensors["loss.dsc"].item(), abs=1e-6)


def test_soft_hgr_is_its_equation():
    x, y = torch.randn(30, 4, dtype=torch.float64), torch.randn(30, 4, dtype=torch.float64)
    centred_x, centred_y = x - x.mean(0), y - y.mean(0)
    agreement = (centred_x * centred_y).sum(1).sum() / 29
    wanted = -agreement + torch.trace(torch.cov(x.T) @ torch.cov(y.T)) / 2
    assert soft_hgr(x, y).item() == pytest.approx(wanted.item(), rel=1e-12)


def test_soft_hgr_ignores_a_shift_and_the_order_and_one_utterance():
    x, y = torch.randn(20, 3, dtype=torch.float64), torch.randn(20, 3, dtype=torch.float64)
    order = torch.randperm(20)
    assert soft_hgr(x + 5, y - 3).item() == pytest.approx(soft_hgr(x, y).item(), rel=1e-10)
    assert soft_hgr(x[order], y[order]).item() == pytest.approx(soft_hgr(x, y).item(), rel=1e-10)
    assert soft_hgr(x[:1], y[:1]).item() == 0.0


def test_soft_hgr_falls_as_features_agree():
    # For whitened features the optimum is -d / 2, at equality.
    x = torch.linalg.qr(torch.randn(500, 3, dtype=torch.float64) - 0.0)[0] * math.sqrt(499)
    x = x - x.mean(0)
    other = torch.randn(500, 3, dtype=torch.float64)
    assert soft_hgr(x, x) < soft_hgr(x, other)
    assert soft_hgr(x, x).item() == pytest.approx(-1.5, abs=0.05)


def test_gradients_are_right():
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    x, y = (torch.randn(6, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    assert torch.autograd.gradcheck(lambda z: self_adjusting_dice(z, labels), (logits,))
    assert torch.autograd.gradcheck(soft_hgr, (x, y))


def test_the_sum_has_its_weights_and_skips_what_has_none():
    logits, labels = torch.randn(9, 7, dtype=torch.float64), torch.randint(7, (9,))
    fused = {name: torch.randn(9, 5, dtype=torch.float64) for name in ("a", "b", "c")}
    terms = spikemo_loss(logits, fused, labels, LossConfig(0.4, 1.0, 0.3, corr_pair_weights=(1.0, 2.0, 0.5)))
    pairs = (
        soft_hgr(fused["a"], fused["b"]) + 2 * soft_hgr(fused["a"], fused["c"]) + soft_hgr(fused["b"], fused["c"]) / 2
    )
    assert terms.corr.item() == pytest.approx(pairs.item(), rel=1e-12)
    total = 0.4 * cross_entropy(logits, labels) + self_adjusting_dice(logits, labels) + 0.3 * pairs
    assert terms.total.item() == pytest.approx(total.item(), rel=1e-12)
    plain = spikemo_loss(logits, fused, labels, LossConfig())
    assert plain.total.item() == cross_entropy(logits, labels).item()
    assert (plain.dice.item(), plain.corr.item()) == (0.0, 0.0)
    alone = spikemo_loss(logits, {"a": fused["a"]}, labels, LossConfig(corr_weight=1.0))
    assert alone.corr.item() == 0.0


def test_balance_takes_the_shares_out_of_what_the_logits_learn():
    logits, labels = torch.randn(9, 3, dtype=torch.float64), torch.randint(3, (9,))
    shares = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    balanced = spikemo_loss(logits, {}, labels, LossConfig(balance=0.5), shares).ce
    wanted = cross_entropy(logits + 0.5 * shares.log(), labels)
    assert balanced.item() == wanted.item()
    assert spikemo_loss(logits, {}, labels, LossConfig(), shares).ce.item() == cross_entropy(logits, labels).item()
    # Labels that follow the shares and features that say nothing: fully balanced logits are level.
    free = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    drawn = torch.tensor([0] * 7 + [1] * 2 + [2])
    spikemo_loss(free.expand(10, 3), {}, drawn, LossConfig(balance=1.0), shares).total.backward()
    assert free.grad.abs().max() < 1e-12


def test_focal_contrastive_is_its_equation():
    x, shares = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    labels = [0, 1, 0, 2, 1, 0]
    weights = [share**-0.8 for share in shares.tolist()]
    z = [row / row.norm() for row in x]
    wanted = 0.0
    for i in range(6):
        similar = {j: math.exp((z[i] @ z[j]).item() / 0.5) for j in range(6) if j != i}
        p = [s / sum(similar.values()) for j, s in similar.items() if labels[j] == labels[i]]
        if p:
            pull = sum((1 - each) ** 2 * math.log(each) for each in p) / len(p)
            wanted -= weights[labels[i]] / sum(weights) * pull / 6
    got = focal_contrastive(x, torch.tensor(labels), shares, temperature=0.5)
    assert got.item() == pytest.approx(wanted, rel=1e-12)
    assert focal_contrastive(x[:1], torch.tensor(labels[:1]), shares).item() == 0.0
    assert focal_contrastive(3 * x, torch.tensor(labels), shares, 0.5).item() == pytest.approx(wanted, rel=1e-12)


def test_focal_contrastive_has_the_right_gradient_also_without_a_pair():
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    shares = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z: focal_contrastive(z, torch.tensor([0, 1, 0, 2, 1]), shares), (x,))
    lonely = focal_contrastive(x[:3], torch.tensor([0, 1, 2]), shares)
    assert lonely.item() == 0.0
    assert torch.equal(torch.autograd.grad(lonely, x)[0], torch.zeros_like(x))


def test_focal_contrastive_enters_the_sum_with_its_weight_and_needs_the_shares():
    logits, labels = torch.randn(9, 3, dtype=torch.float64), torch.randint(3, (9,))
    fused = {name: torch.randn(9, 5, dtype=torch.float64) for name in ("a", "b")}
    shares = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    config = LossConfig(0.3, contrastive_weight=0.4)
    terms = spikemo_loss(logits, fused, labels, config, shares)
    contrastive = focal_contrastive(torch.cat([fused["a"], fused["b"]], dim=1), labels, shares)
    assert terms.contrastive.item() == contrastive.item() > 0
    assert terms.total.item() == pytest.approx((0.3 * terms.ce + 0.4 * contrastive).item(), rel=1e-12)
    with pytest.raises(ValueError, match="contrastive_weight needs class_shares"):
        spikemo_loss(logits, fused, labels, config)
