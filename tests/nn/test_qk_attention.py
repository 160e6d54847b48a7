"""Attention of queries and keys alone: the equations of both kinds, and spikingjelly's layer of the same name."""

import pytest
import torch
from nn.plain import fire, heads, layer, merged, started
from spikingjelly.activation_based.layer import QKAttention as SpikingjellyQKAttention

from spikeattn import QKAttention
from spikeattn.nn.alive import count_gain, design_rate

T, B, L, D, H = 4, 3, 6, 32, 4


@pytest.mark.parametrize("kind", ["token", "channel"])
@pytest.mark.parametrize("init", ["alive", "published"])
def test_it_is_its_equation(kind, init):
    attention = started(QKAttention(D, H, kind=kind, init=init, dtype=torch.float64))
    x = torch.randn(T, B, L, D, dtype=torch.float64)
    q, k = (heads(layer(part, x), H) for part in (attention.q, attention.k))
    summed = D // H if kind == "token" else L
    gain = count_gain(torch.tensor(summed * design_rate(2.0)), 2.0, 0.5).item() if init == "alive" else 1.0
    counts = torch.einsum("tbhle->tbhl" if kind == "token" else "tbhle->tbhe", q)
    mask = fire(counts * gain, threshold=0.5)
    mixed = torch.einsum("tbhl,tbhle->tbhle" if kind == "token" else "tbhe,tbhle->tbhle", mask, k)
    assert torch.equal(attention(x), layer(attention.out, merged(mixed)))
    assert 0 < mask.mean() < 1


@pytest.mark.parametrize("kind", ["token", "channel"])
def test_with_batch_norm_it_is_spikingjellys(kind):
    """As it comes, for [T, N, C, L], a convolution without bias, and queries and keys as one."""
    ours = started(QKAttention(D, H, kind=kind, norm="batch", init="published", dtype=torch.float64)).eval()
    theirs = SpikingjellyQKAttention(D, H, qka_type=kind).double().eval()
    with torch.no_grad():
        for conv_bn, parts in ((theirs.qk_conv_bn, [ours.q, ours.k]), (theirs.proj_conv_bn, [ours.out])):
            for part in parts:
                part.linear.bias.zero_()
            conv_bn[0].weight.copy_(torch.cat([part.linear.weight for part in parts]).unsqueeze(-1))
            conv_bn[1].weight.copy_(torch.cat([part.norm.weight for part in parts]))
            conv_bn[1].bias.copy_(torch.cat([part.norm.bias for part in parts]))
    x = torch.randn(T, B, L, D, dtype=torch.float64)
    spikes = ours(x)
    assert torch.equal(spikes, theirs(x.transpose(2, 3)).transpose(2, 3))
    assert 0 < spikes.mean() < 1


def test_a_token_passes_or_stays_by_its_own_queries_alone():
    attention = QKAttention(D, H, kind="token", dtype=torch.float64)
    x = torch.randn(T, B, L, D, dtype=torch.float64)
    whole = attention(x)
    assert all(torch.equal(whole[:, :, i : i + 1], attention(x[:, :, i : i + 1])) for i in range(L))


def test_kinds_are_named():
    with pytest.raises(ValueError, match="kind must be one of 'token', 'channel', got 'head'"):
        QKAttention(D, H, kind="head")
