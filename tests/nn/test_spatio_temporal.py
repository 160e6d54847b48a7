"""Attention over chunks of time: its equation, a chunk of one step, what sees what, and times that do not fit."""

import pytest
import torch
from nn.plain import fire, heads, layer, merged, started

from spikeattn import SpatioTemporalAttention, SpikingSelfAttention
from spikeattn.nn.alive import attention_gain

T, B, L, D, H = 6, 3, 5, 32, 4


@pytest.mark.parametrize("chunk", [1, 2, 3, 6])
@pytest.mark.parametrize("init", ["alive", "published"])
def test_it_is_its_equation(chunk, init):
    attention = started(SpatioTemporalAttention(D, H, chunk=chunk, init=init, dtype=torch.float64))
    x = torch.randn(T, B, L, D, dtype=torch.float64)
    lengths = torch.tensor([5, 2, 1])
    mask = torch.arange(L) >= lengths[:, None]
    q, k, v = (heads(layer(part, x, mask), H) for part in (attention.q, attention.k, attention.v))
    gain = attention_gain(chunk * lengths, D // H, 2.0, "output") if init == "alive" else torch.ones(B)
    current = torch.zeros_like(q)
    for t in range(T):
        for other in range(t - t % chunk, t - t % chunk + chunk):
            current[t] += torch.einsum("bhle,bhse,bhsf->bhlf", q[t], k[other], v[other])
    mixed = fire(current * 0.125 * gain[:, None, None, None], threshold=0.5)
    assert torch.equal(attention(x, mask), layer(attention.out, merged(mixed), mask))
    assert 0 < mixed.mean() < 1


def test_a_chunk_of_one_step_is_spiking_self_attention():
    chunks = SpatioTemporalAttention(D, H, chunk=1, dtype=torch.float64)
    other = SpikingSelfAttention(D, H, dtype=torch.float64)
    other.load_state_dict(chunks.state_dict())
    x = torch.randn(T, B, L, D, dtype=torch.float64)
    assert torch.equal(chunks(x), other(x))


def test_a_step_sees_its_chunk_and_what_was_before():
    attention = SpatioTemporalAttention(D, H, chunk=2, dtype=torch.float64)
    x = torch.randn(T, B, L, D, dtype=torch.float64)
    changed = x.clone()
    changed[3] += torch.randn(B, L, D, dtype=torch.float64)
    before, after = attention(x), attention(changed)
    assert torch.equal(before[:2], after[:2])
    assert not torch.equal(before[2], after[2])


def test_times_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="x must have a multiple of chunk = 4 time steps, got T = 6"):
        SpatioTemporalAttention(D, H, chunk=4)(torch.zeros(T, B, L, D))
    with pytest.raises(ValueError, match="chunk must be at least 1 time step, got 0"):
        SpatioTemporalAttention(D, H, chunk=0)
