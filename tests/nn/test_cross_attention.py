"""Cross-attention: its equation, the two masks and widths, and what it says of a memory that does not fit."""

import pytest
import torch
from nn.plain import fire, heads, layer, merged, started

from spikeattn import SpikingCrossAttention, SpikingSelfAttention

T, B, L, S, D, DK, H = 4, 3, 6, 5, 32, 24, 4


def inputs(dtype=torch.float64):
    x, memory = torch.randn(T, B, L, D, dtype=dtype), torch.randn(T, B, S, DK, dtype=dtype)
    padding = torch.arange(L) >= torch.tensor([[6], [4], [1]])
    memory_padding = torch.arange(S) >= torch.tensor([[3], [5], [2]])
    return x, memory, padding, memory_padding


@pytest.mark.parametrize("which", ["output", "map"])
def test_it_is_its_equation(which):
    options = {"scale": 0.5, "fire": which, "init": "published", "dtype": torch.float64}
    attention = started(SpikingCrossAttention(D, H, DK, **options))
    x, memory, padding, memory_padding = inputs()
    q = heads(layer(attention.q, x, padding), H)
    k, v = (heads(layer(part, memory, memory_padding), H) for part in (attention.k, attention.v))
    counts = torch.einsum("tbhle,tbhse->tbhls", q, k)
    if which == "map":
        mixed = torch.einsum("tbhls,tbhse->tbhle", fire(counts * 0.5, threshold=0.5), v)
    else:
        mixed = fire(torch.einsum("tbhls,tbhse->tbhle", counts, v) * 0.5, threshold=0.5)
    wanted = layer(attention.out, merged(mixed), padding)
    assert torch.equal(attention(x, memory, padding, memory_padding), wanted)
    assert 0 < wanted.mean() < 1
    assert mixed.any()


def test_of_its_own_input_it_is_self_attention():
    for which in ("output", "map"):
        own = SpikingSelfAttention(D, H, fire=which, dtype=torch.float64)
        cross = SpikingCrossAttention(D, H, fire=which, dtype=torch.float64)
        cross.load_state_dict(own.state_dict())
        x, _, padding, _ = inputs()
        assert torch.equal(cross(x, x, padding, padding), own(x, padding))


def test_padding_of_either_side_never_changes_a_token():
    attention = SpikingCrossAttention(D, H, DK, dtype=torch.float64)
    x, memory, padding, memory_padding = inputs()
    out = attention(x, memory, padding, memory_padding)
    for b, (n, s) in enumerate(zip((6, 4, 1), (3, 5, 2), strict=True)):
        alone = attention(x[:, b : b + 1, :n], memory[:, b : b + 1, :s])
        assert torch.equal(out[:, b : b + 1, :n], alone)
        assert not out[:, b, n:].any()
    assert out.any()


def test_a_memory_that_does_not_fit_is_named():
    attention = SpikingCrossAttention(D, H, DK)
    x, memory, _, _ = inputs(torch.float32)
    with pytest.raises(ValueError, match=r"memory must be \[T, B, S, Dk\] with Dk = 24, got shape \(4, 3, 5, 32\)"):
        attention(x, torch.zeros(T, B, S, D))
    with pytest.raises(ValueError, match=r"got shape \(4, 3, 24, 5\)\. Tokens come before channels"):
        attention(x, memory.transpose(2, 3))
    with pytest.raises(ValueError, match=r"the T and B of x, \(4, 3\), got \(3, 4\)\. Is it time-major"):
        attention(x, memory.transpose(0, 1))
    with pytest.raises(TypeError, match=r"memory must be torch\.float32 .* got torch\.float64"):
        attention(x, memory.double())
    with pytest.raises(ValueError, match=r"query_padding_mask must be \[B, L\] = \(3, 6\), got \(3, 5\)"):
        attention(x, memory, torch.zeros(B, S, dtype=torch.bool))
    with pytest.raises(ValueError, match="fire must be one of 'output', 'map', got 'both'"):
        SpikingCrossAttention(D, H, fire="both")
