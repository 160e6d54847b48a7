"""The start is alive: at the published T, tau and threshold every neuron layer fires between 1 % and 50 %."""

import pytest
import torch

from spikeattn import SpikingTransformer, firing_rates


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("fire", ["output", "map"])
def test_every_layer_fires_at_the_published_setting(seed, fire):
    torch.manual_seed(seed)
    model = SpikingTransformer(256, depth=2, num_heads=8, tau=10.0, v_threshold=1.0, fire=fire)
    x = torch.randn(4, 24, 256)
    rates = firing_rates(model, x.expand(32, 4, 24, 256))
    assert len(rates) == 14
    assert all(0.01 < rate < 0.5 for rate in rates.values()), rates


@pytest.mark.parametrize("L", [1, 2, 9, 33, 110])
@pytest.mark.parametrize(("T", "tau"), [(32, 10.0), (4, 2.0), (16, 2.0), (64, 20.0)])
@pytest.mark.parametrize("causal", [False, True])
def test_every_layer_fires_at_other_lengths_and_time_constants(L, T, tau, causal):
    model = SpikingTransformer(128, depth=2, num_heads=4, tau=tau, is_causal=causal)
    x = torch.randn(2, L, 128)
    rates = firing_rates(model, x.expand(T, 2, L, 128))
    assert all(0.01 < rate < 0.5 for rate in rates.values()), rates


def test_padding_does_not_thin_the_rates():
    model = SpikingTransformer(64, depth=1, num_heads=4, tau=10.0, fire="map")
    x = torch.randn(1, 6, 64)
    alone = firing_rates(model, x.expand(16, 1, 6, 64))
    mask = torch.arange(15).unsqueeze(0) >= 6
    padded = torch.cat([x, torch.randn(1, 9, 64)], dim=1)
    rates = firing_rates(model, padded.expand(16, 1, 15, 64), mask, key_padding_mask=mask)
    assert rates == pytest.approx(alone, rel=1e-9)


def test_the_published_start_is_close_to_dead():
    model = SpikingTransformer(256, depth=2, num_heads=8, tau=10.0, init="published")
    x = torch.randn(4, 24, 256)
    rates = firing_rates(model, x.expand(32, 4, 24, 256))
    assert rates["blocks.0.attn.q.lif"] == pytest.approx(0.012, abs=0.003)
    assert rates["blocks.0.attn.attn_lif"] < 1e-3
    assert rates["blocks.1.mlp.fc2.lif"] < 1e-3
