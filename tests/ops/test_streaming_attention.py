"""Causal attention in pieces: the bits of one pass, with a state that does not grow."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spikeattn import Sigmoid, spiking_attention, spiking_attention_step


def spikes(*shape, rate=0.4, dtype=torch.float32):
    return (torch.rand(shape) < rate).to(dtype)


def stream(q, k, v, cuts, mask=None, **options):
    """All outputs of a sequence cut at ``cuts``, and the last state."""
    edges = [0, *cuts, q.shape[3]]
    outs, state = [], None
    for a, b in itertools.pairwise(edges):
        own = None if mask is None else mask[:, a:b]
        out, state = spiking_attention_step(*(x[..., a:b, :] for x in (q, k, v)), state, padding_mask=own, **options)
        outs.append(out)
    return torch.cat(outs, dim=3), state


@given(
    L=st.integers(1, 40),
    cuts=st.sets(st.integers(1, 39)),
    fire=st.sampled_from(["output", "map", None]),
    padded=st.booleans(),
    backend=st.sampled_from(["torch", "numba"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_however_it_is_cut_a_stream_has_the_bits_of_one_pass(L, cuts, fire, padded, backend, dtype):
    q, k, v = (spikes(3, 2, 2, L, 8, dtype=dtype) for _ in range(3))
    mask = torch.rand(2, L) < 0.3 if padded else None
    options = {"fire": fire, "tau": 3.0, "backend": backend}
    whole = spiking_attention(q, k, v, is_causal=True, query_padding_mask=mask, key_padding_mask=mask, **options)
    out, _ = stream(q, k, v, sorted(c for c in cuts if c < L), mask, **options)
    assert out.dtype == dtype
    assert torch.equal(out, whole)


@pytest.mark.parametrize(("fire", "grows"), [("output", False), (None, False), ("map", True)])
def test_the_state_grows_only_where_the_map_fires(fire, grows):
    q, k, v = (spikes(2, 1, 2, 30, 8) for _ in range(3))
    sizes = []
    for L in (1, 10, 30):
        _, state = stream(*(x[..., :L, :] for x in (q, k, v)), range(1, L), fire=fire)
        sizes.append(sum(x.numel() for x in state if x is not None))
    assert (sizes[0] < sizes[1] < sizes[2]) if grows else sizes == [2 * 2 * 8 * 8] * 3


@pytest.mark.parametrize("fire", ["output", "map", None])
def test_gradients_pass_through_the_state(fire):
    q, k, v = (spikes(3, 1, 2, 9, 4, dtype=torch.float64).requires_grad_() for _ in range(3))
    weight = torch.randn(3, 1, 2, 9, 4, dtype=torch.float64)
    options = {"fire": fire, "surrogate": Sigmoid()}
    pieces, _ = stream(q, k, v, [1, 4, 5], **options)
    whole = spiking_attention(q, k, v, is_causal=True, **options)
    for got, want in zip(
        *(torch.autograd.grad((out * weight).sum(), (q, k, v)) for out in (pieces, whole)), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_a_state_of_something_else_is_refused():
    x = spikes(2, 1, 2, 3, 4)
    _, sums = spiking_attention_step(x, x, x)
    _, past = spiking_attention_step(x, x, x, fire="map")
    with pytest.raises(ValueError, match="another fire than 'map'"):
        spiking_attention_step(x, x, x, sums, fire="map")
    with pytest.raises(ValueError, match="another fire than 'output'"):
        spiking_attention_step(x, x, x, past)
    with pytest.raises(ValueError, match=r"state must be of \[T, B, H, \*, E\]"):
        spiking_attention_step(x[:1], x[:1], x[:1], sums)
    with pytest.raises(TypeError, match=r"state must be torch\.float64"):
        spiking_attention_step(*(x.double(),) * 3, sums)
    with pytest.raises(ValueError, match="state must be of"):
        spiking_attention_step(x, x, x, past._replace(values=None), fire="map")
    with pytest.raises(ValueError, match="tau must be > 1"):
        spiking_attention_step(x, x, x, fire=None, tau=0.5)
    with pytest.raises(ValueError, match="is_causal needs"):
        spiking_attention_step(x, x[..., :2, :], x[..., :2, :])
