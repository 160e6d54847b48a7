"""Causal modules take a sequence piece by piece."""

import itertools

import pytest
import torch

from spikeattn import SpikingSelfAttention, SpikingTransformer


def stream(model, x, cuts, mask=None):
    """All outputs of ``model.step``, the sequence cut at ``cuts``."""
    outs, state = [], None
    for a, b in itertools.pairwise([0, *cuts, x.shape[2]]):
        out, state = model.step(x[:, :, a:b], state, None if mask is None else mask[:, a:b])
        outs.append(out)
    return torch.cat(outs, dim=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("fire", ["output", "map"])
@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.parametrize("init", ["alive", "published"])
@pytest.mark.parametrize("cuts", [range(1, 12), [5], [1, 2, 9]], ids=["tokens", "halves", "pieces"])
def test_a_stream_equals_the_whole_pass(dtype, fire, norm, init, cuts):
    options = {"fire": fire, "norm": norm, "init": init, "is_causal": True, "dtype": dtype}
    model = SpikingTransformer(32, depth=2, num_heads=4, **options).eval()
    x = torch.randn(4, 2, 12, 32, dtype=dtype) * 3
    whole = model(x)
    assert torch.equal(stream(model, x, list(cuts)), whole)
    assert (whole != x).any() or init == "published"  # whose running averages are no statistics yet


def test_a_sequence_may_pause_while_others_of_its_batch_go_on():
    model = SpikingTransformer(32, depth=2, num_heads=4, is_causal=True, dtype=torch.float64)
    x = torch.randn(3, 2, 10, 32, dtype=torch.float64) * 3
    mask = torch.tensor([[False] * 10, [False, True, True, False, False, True, False, True, True, False]])
    out = stream(model, x, [1, 2, 3, 6], mask)
    assert torch.equal(out, model(x, mask))
    alone = model(x[:, 1:, ~mask[1]])
    assert torch.equal(out[:, 1:, ~mask[1]], alone)


def test_a_static_token_is_projected_once_and_streams_the_same():
    model = SpikingSelfAttention(32, num_heads=4, is_causal=True, dtype=torch.float64)
    x = (torch.randn(2, 6, 32, dtype=torch.float64) * 3).expand(5, 2, 6, 32)
    assert torch.equal(stream(model, x, [2, 3]), model(x))


def test_step_refuses_what_it_cannot_do_right():
    x = torch.randn(2, 1, 3, 16)
    with pytest.raises(ValueError, match="step needs is_causal=True"):
        SpikingSelfAttention(16, num_heads=2).step(x)
    with pytest.raises(ValueError, match="needs eval"):
        SpikingSelfAttention(16, num_heads=2, is_causal=True, norm="batch").step(x)
