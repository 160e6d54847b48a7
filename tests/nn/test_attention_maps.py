"""Attention maps on demand: counts or spikes, what hides in them, and that looking changes nothing."""

import pytest
import torch
from nn.plain import fire, heads, layer, started

from spikeattn import (
    DualSpikeSelfAttention,
    QKAttention,
    SpikingCrossAttention,
    SpikingSelfAttention,
    SpikingTransformer,
    attention_maps,
)

T, B, L, D, H = 4, 3, 6, 32, 4
MASK = torch.arange(L) >= torch.tensor([[6], [4], [1]])


def parts(attention, x, memory, mask):
    """Queries and keys [T, B, H, L, E] by the plain definition."""
    return heads(layer(attention.q, x, mask), H), heads(layer(attention.k, memory, mask), H)


@pytest.mark.parametrize("which", ["output", "map"])
@pytest.mark.parametrize("causal", [False, True])
def test_maps_of_self_attention(which, causal):
    options = {"fire": which, "is_causal": causal, "scale": 0.5, "init": "published", "dtype": torch.float64}
    attention = started(SpikingSelfAttention(D, H, **options))
    x = torch.randn(T, B, L, D, dtype=torch.float64)
    q, k = parts(attention, x, x, MASK)
    counts = torch.einsum("tbhle,tbhse->tbhls", q, k)
    for i in range(L if causal else 0):
        counts[..., i, i + 1 :] = 0.0
    wanted = counts if which == "output" else fire(counts * 0.5, threshold=0.5)
    before = attention(x, MASK)
    maps = attention_maps(attention, x, MASK)
    assert list(maps) == [""]
    assert torch.equal(maps[""], wanted)
    assert wanted.any()
    assert torch.equal(attention(x, MASK), before)
    assert not attention.q._forward_hooks
    assert not attention.attn_lif._forward_hooks


def test_maps_of_cross_attention():
    attention = started(SpikingCrossAttention(D, H, dtype=torch.float64))
    x, memory = torch.randn(T, B, 3, D, dtype=torch.float64), torch.randn(T, B, L, D, dtype=torch.float64)
    q, k = heads(layer(attention.q, x), H), heads(layer(attention.k, memory, MASK), H)
    wanted = torch.einsum("tbhle,tbhse->tbhls", q, k)
    assert torch.equal(attention_maps(attention, x, memory, None, MASK)[""], wanted)
    assert not wanted[:, 2, :, :, 1:].any()


def test_maps_of_dual_spike_attention_are_its_spikes():
    attention = started(DualSpikeSelfAttention(D, H)).eval()
    map_ = attention_maps(attention, torch.randn(T, B, L, D), MASK)[""]
    assert map_.shape == (T, B, H, L, L)
    assert set(map_.unique().tolist()) == {0.0, 1.0}
    assert not map_[:, 2, :, 1:].any()
    assert not map_[:, 2, :, :, 1:].any()


def test_maps_of_a_model_stand_under_the_names_of_its_modules():
    model = torch.nn.Sequential(SpikingTransformer(D, 2, H), QKAttention(D, H))
    x = torch.randn(T, B, L, D)
    with torch.autocast("cpu", torch.bfloat16):
        maps = attention_maps(model, x)
    assert list(maps) == ["0.blocks.0.attn", "0.blocks.1.attn"]
    assert all(m.shape == (T, B, H, L, L) and m.dtype == torch.float32 for m in maps.values())
    assert all(torch.equal(m, m.round()) and m.max() <= D // H for m in maps.values())
    assert all(m.any() for m in maps.values())
