"""Spike-driven self-attention: the equations of both versions, and that heads do not matter in the first."""

import pytest
import torch
from nn.plain import fire, heads, layer, merged, started
from spikingjelly.activation_based.layer import SpikeDrivenSelfAttention as SpikingjellySpikeDriven

from spikeattn import SpikeDrivenSelfAttention, SpikingSelfAttention
from spikeattn.nn.alive import count_gain, design_rate

T, B, L, D, H = 4, 3, 6, 32, 4


@pytest.mark.parametrize("version", [1, 3])
@pytest.mark.parametrize("init", ["alive", "published"])
def test_it_is_its_equation(version, init):
    attention = started(SpikeDrivenSelfAttention(D, H, version=version, init=init, dtype=torch.float64))
    x = torch.randn(T, B, L, D, dtype=torch.float64)
    q, k, v = (heads(layer(part, x), H) for part in (attention.q, attention.k, attention.v))
    p, E = design_rate(2.0), D // H
    if version == 1:
        gain = count_gain(torch.tensor(L * p**2), 2.0, 0.5).item() if init == "alive" else 1.0
        sums = torch.zeros(T, B, H, E, dtype=torch.float64)
        for token in range(L):
            sums += k[:, :, :, token] * v[:, :, :, token]
        mask = fire(sums * gain, threshold=0.5)
        mixed = torch.stack([q[:, :, :, token] * mask for token in range(L)], dim=3)
    else:
        gain = count_gain(torch.tensor(L * E * p**3), 2.0).item() if init == "alive" else 1.0
        states = torch.einsum("tbhse,tbhsf->tbhef", k, v)
        mixed = fire(torch.einsum("tbhle,tbhef->tbhlf", q, states) * 0.125 * gain, threshold=0.5)
    assert torch.equal(attention(x), layer(attention.out, merged(mixed)))
    assert 0 < mixed.mean() < 1


def test_the_first_version_is_spikingjellys_before_its_shortcut():
    """As theirs comes, over pictures, behind a neuron on the membrane shortcut, and with a current as its output."""
    options = {"norm": "batch", "init": "published", "dtype": torch.float64}
    ours = started(SpikeDrivenSelfAttention(D, H, version=1, **options)).eval()
    theirs = SpikingjellySpikeDriven(D, H).double().eval()
    with torch.no_grad():
        for name, part in (("q", ours.q), ("k", ours.k), ("v", ours.v), ("proj", ours.out)):
            conv, norm = getattr(theirs, f"{name}_conv"), getattr(theirs, f"{name}_bn")
            conv.weight.copy_(part.linear.weight[..., None, None])
            part.linear.bias.zero_()
            if conv.bias is not None:
                conv.bias.zero_()
            norm.weight.copy_(part.norm.weight)
            norm.bias.copy_(part.norm.bias)
    x = 2 * torch.randn(T, B, L, D, dtype=torch.float64)
    shown = {}
    theirs.shortcut_lif.register_forward_hook(lambda module, args, out: shown.update(spikes=out))
    theirs.proj_bn.register_forward_hook(lambda module, args, out: shown.update(current=out))
    theirs(x.transpose(2, 3).unsqueeze(-1))
    inside, current = (shown[key].squeeze(-1).transpose(2, 3) for key in ("spikes", "current"))
    assert torch.equal(ours(inside), fire(current))
    assert 0 < fire(current).mean() < 1


def test_the_third_version_is_spiking_self_attention():
    driven = SpikeDrivenSelfAttention(D, H, version=3, dtype=torch.float64)
    other = SpikingSelfAttention(D, H, dtype=torch.float64)
    other.load_state_dict(driven.state_dict())
    x = torch.randn(T, B, L, D, dtype=torch.float64)
    assert torch.equal(driven(x), other(x))


def test_heads_do_not_matter_in_the_first_version():
    one, many = (SpikeDrivenSelfAttention(D, n, version=1, dtype=torch.float64) for n in (1, H))
    many.load_state_dict(one.state_dict())
    x = torch.randn(T, B, L, D, dtype=torch.float64)
    assert torch.equal(one(x), many(x))
    assert one(x).any()


def test_scales_are_the_papers_and_versions_are_named():
    assert SpikeDrivenSelfAttention(D, H, version=1).scale == 1.0
    assert SpikeDrivenSelfAttention(D, H).scale == 0.125
    assert SpikeDrivenSelfAttention(D, H, version=1, scale=0.5).scale == 0.5
    with pytest.raises(ValueError, match="version must be one of 1, 3, got 2"):
        SpikeDrivenSelfAttention(D, H, version=2)
