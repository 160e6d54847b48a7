"""Dual spike self-attention: its equation, and the running firing rates that set its scales."""

import copy

import pytest
import torch
from nn.plain import fire, heads, layer, merged, started

from spikeattn import DualSpikeSelfAttention
from spikeattn.nn.alive import design_rate
from spikeattn.nn.dual_spike import MOMENTUM

T, B, L, D, H = 4, 3, 6, 32, 4
E = D // H
LENGTHS = torch.tensor([6, 3, 1])
MASK = torch.arange(L) >= LENGTHS[:, None]


def plain(attention, x, rate_x=None, rate_map=None):
    """Output, and the firing rates of each head, which also scale where none are given."""

    def current(part, spikes):
        return part.norm(part.linear(spikes)).masked_fill(MASK[None, :, :, None], 0.0)

    spikes = fire(attention.x.norm(x).masked_fill(MASK[None, :, :, None], 0.0))
    y, z = (heads(current(part, spikes), H) for part in (attention.y, attention.z))
    spikes = heads(spikes, H)
    seen_x = spikes.sum((0, 1, 3, 4)) / (T * E * LENGTHS.sum())
    rate_x = seen_x.float() if rate_x is None else rate_x
    s1 = 1 / torch.sqrt(rate_x * E)
    map_ = fire(torch.einsum("tbhle,tbhse->tbhls", spikes, y) * s1[:, None, None])
    seen_map = map_.sum((0, 1, 3, 4)) / (T * (LENGTHS**2).sum())
    rate_map = seen_map.float() if rate_map is None else rate_map
    s2 = 1 / torch.sqrt(rate_map * LENGTHS[:, None])
    mixed = fire(merged(torch.einsum("tbhls,tbhse->tbhle", map_, z) * s2[:, :, None, None]))
    return layer(attention.out, mixed, MASK), seen_x, seen_map


def test_in_training_it_is_its_equation_at_the_rates_of_the_batch():
    attention = started(DualSpikeSelfAttention(D, H, dtype=torch.float64)).train()
    x = torch.randn(T, B, L, D, dtype=torch.float64)
    wanted, rate_x, rate_map = plain(attention, x)
    assert torch.equal(attention(x, MASK), wanted)
    assert wanted.any()
    assert 0.01 < rate_map.min() < rate_map.max() < 0.9
    torch.testing.assert_close(attention.firing_rate_x.double(), rate_x, rtol=1e-6, atol=0)
    torch.testing.assert_close(attention.firing_rate_map.double(), rate_map, rtol=1e-6, atol=0)


def test_in_evaluation_it_is_its_equation_at_the_running_rates():
    attention = started(DualSpikeSelfAttention(D, H, dtype=torch.float64)).eval()
    attention.firing_rate_x.copy_(torch.linspace(0.05, 0.3, H))
    attention.firing_rate_map.copy_(torch.linspace(0.2, 0.1, H))
    state = copy.deepcopy(attention.state_dict())
    x = torch.randn(T, B, L, D, dtype=torch.float64)
    wanted, _, _ = plain(attention, x, attention.firing_rate_x, attention.firing_rate_map)
    assert torch.equal(attention(x, MASK), wanted)
    assert wanted.any()
    assert all(torch.equal(state[key], value) for key, value in attention.state_dict().items())


def test_later_batches_move_the_rates_a_little():
    attention = DualSpikeSelfAttention(D, H, dtype=torch.float64).train()
    assert attention.firing_rate_x.tolist() == pytest.approx([design_rate(2.0)] * H)
    assert attention.firing_rate_map.tolist() == pytest.approx([design_rate(2.0)] * H)
    first, second = torch.randn(2, T, B, L, D, dtype=torch.float64)
    attention(first, MASK)
    before = attention.firing_rate_x.clone(), attention.firing_rate_map.clone()
    out = attention(second, MASK)
    now = attention.firing_rate_x, attention.firing_rate_map
    wanted, *seen = plain(attention, second, *now)
    assert torch.equal(out, wanted)
    for old, rate, new in zip(before, seen, now, strict=True):
        torch.testing.assert_close(new, (MOMENTUM * old + (1 - MOMENTUM) * rate).float(), rtol=1e-6, atol=0)
        assert not torch.equal(new, old)
    assert attention.batches == 2


def test_the_state_holds_the_rates_and_they_get_no_gradient():
    attention = DualSpikeSelfAttention(D, H)
    assert {"firing_rate_x", "firing_rate_map", "batches"} <= attention.state_dict().keys()
    attention(torch.randn(T, B, L, D)).sum().backward()
    assert not attention.firing_rate_x.requires_grad
    assert not attention.firing_rate_map.requires_grad
    other = DualSpikeSelfAttention(D, H)
    other.load_state_dict(attention.state_dict())
    x = torch.randn(T, B, L, D)
    assert torch.equal(other.eval()(x), attention.eval()(x))


def test_a_silent_or_fully_padded_batch_gives_no_nan():
    attention = DualSpikeSelfAttention(D, H).train()
    with torch.no_grad():
        attention.x.norm.weight.zero_()
    assert attention.train()(torch.randn(T, B, L, D)).isfinite().all()
    assert not attention.firing_rate_x.any()
    assert attention(torch.randn(T, B, L, D), torch.ones(B, L, dtype=torch.bool)).isfinite().all()
    assert attention.eval()(torch.randn(T, B, L, D)).isfinite().all()


def test_a_compiled_training_step_moves_the_rates_the_same():
    attention, other = DualSpikeSelfAttention(D, H), DualSpikeSelfAttention(D, H)
    other.load_state_dict(attention.state_dict())
    x = torch.randn(T, B, L, D)
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert torch.equal(compiled(x, MASK), other(x, MASK))
    assert torch.equal(attention.firing_rate_map, other.firing_rate_map)
    assert attention.batches == 2


def test_a_batch_of_padding_alone_teaches_no_rate():
    module = DualSpikeSelfAttention(16, num_heads=2).train()
    before = module.firing_rate_x.clone()
    module(torch.randn(4, 2, 5, 16), torch.ones(2, 5, dtype=torch.bool))
    assert torch.equal(module.firing_rate_x, before)
    module(torch.randn(4, 2, 5, 16) * 3)
    assert (module.firing_rate_x > 0.01).all()  # the first batch with tokens sets it
