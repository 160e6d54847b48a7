"""The definition of spiking attention: exact in any order of association, blind to padding."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spikeattn import LIF
from spikeattn.ops.spiking_attention import attention_map, spiking_attention_reference


def identity(x):
    return x


def spikes(*shape, rate=0.3, dtype=torch.float32):
    return (torch.rand(shape) < rate).to(dtype)


def naive(q, k, v, scale, fire, causal):
    """Loops over tokens, in float64, with nothing fired."""
    T, B, H, L, E = q.shape
    out = torch.zeros(T, B, L, H * E, dtype=torch.float64)
    for t, b, h, i in itertools.product(range(T), range(B), range(H), range(L)):
        row = torch.zeros(E, dtype=torch.float64)
        for j in range(i + 1 if causal else L):
            row += float((q[t, b, h, i].double() * k[t, b, h, j].double()).sum()) * v[t, b, h, j].double()
        out[t, b, i, h * E : (h + 1) * E] = row * scale
    return out


@given(
    L=st.integers(1, 9),
    E=st.integers(1, 9),
    H=st.sampled_from([1, 3]),
    rate=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    exponent=st.integers(-6, 3),
    causal=st.booleans(),
)
def test_association_orders_agree_to_the_bit_and_with_loops(L, E, H, rate, exponent, causal):
    q, k, v = (spikes(2, 2, H, L, E, rate=rate) for _ in range(3))
    scale = 2.0**exponent
    kwargs = {"scale": scale, "fire": "output", "neuron": identity, "is_causal": causal}
    first = spiking_attention_reference(q, k, v, order="map_first", **kwargs)
    second = spiking_attention_reference(q, k, v, order="state_first", **kwargs)
    auto = spiking_attention_reference(q, k, v, **kwargs)
    assert torch.equal(first, second)
    assert torch.equal(first, auto)
    assert torch.equal(first.double(), naive(q, k, v, scale, "output", causal))


@pytest.mark.parametrize("order", ["map_first", "state_first"])
def test_long_sums_stay_exact(order):
    # 3000 * 64 coincidences: beyond what bfloat16 or float16 hold, and far below 2**24.
    ones = torch.ones(1, 1, 1, 3000, 64, dtype=torch.bfloat16)
    given_neuron = []
    spiking_attention_reference(
        ones, ones, ones, scale=0.125, fire="output", order=order, neuron=lambda x: given_neuron.append(x) or x
    )
    assert given_neuron[0].dtype == torch.float32
    assert given_neuron[0].unique().tolist() == [3000 * 64 * 0.125]


def test_autocast_does_not_round_the_sums():
    q, k, v = (spikes(1, 1, 1, 200, 64, rate=0.9) for _ in range(3))
    kwargs = {"scale": 1.0, "fire": "output", "neuron": identity}
    with torch.autocast("cpu", torch.bfloat16):
        low = spiking_attention_reference(q, k, v, **kwargs)
    assert torch.equal(low, spiking_attention_reference(q, k, v, **kwargs))


@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    extra=st.integers(0, 3),
    fire=st.sampled_from(["output", "map"]),
    causal=st.booleans(),
)
def test_padding_never_changes_a_result(lengths, extra, fire, causal):
    T, H, E, L = 3, 2, 4, max(lengths) + extra
    q, k, v = (spikes(T, len(lengths), H, L, E, rate=0.6) for _ in range(3))
    mask = torch.arange(L) >= torch.tensor(lengths).unsqueeze(1)
    kwargs = {"scale": 0.125, "fire": fire, "neuron": LIF(v_threshold=0.5), "is_causal": causal}
    padded = spiking_attention_reference(q, k, v, key_padding_mask=mask, **kwargs)
    for b, n in enumerate(lengths):
        alone = spiking_attention_reference(*(x[:, b : b + 1, :, :n] for x in (q, k, v)), **kwargs)
        assert torch.equal(padded[:, b : b + 1, :n], alone)
        assert not padded[:, b, n:].any()


def test_padding_in_front_and_a_row_of_padding_alone():
    q, k, v = (spikes(2, 2, 1, 4, 8, rate=0.7) for _ in range(3))
    mask = torch.tensor([[True, False, False, False], [True, True, True, True]])
    kwargs = {"scale": 1.0, "fire": "output", "neuron": identity}
    padded = spiking_attention_reference(q, k, v, key_padding_mask=mask, **kwargs)
    alone = spiking_attention_reference(*(x[:, :1, :, 1:] for x in (q, k, v)), **kwargs)
    assert torch.equal(padded[:, :1, 1:], alone)
    assert not padded[:, 1].any()


@pytest.mark.parametrize("fire", ["output", "map"])
def test_causal_tokens_do_not_see_later_ones(fire):
    q, k, v = (spikes(3, 1, 2, 6, 4, rate=0.6) for _ in range(3))
    kwargs = {"scale": 0.5, "fire": fire, "neuron": LIF(v_threshold=0.5), "is_causal": True}
    whole = spiking_attention_reference(q, k, v, **kwargs)
    for n in range(1, 7):
        part = spiking_attention_reference(*(x[..., :n, :] for x in (q, k, v)), **kwargs)
        assert torch.equal(whole[:, :, :n], part)


def test_the_map_fires_before_it_meets_the_values():
    q, k, v = (spikes(5, 1, 1, 3, 8, rate=0.7) for _ in range(3))
    neuron = LIF(v_threshold=0.5)
    wanted = (neuron(attention_map(q, k) * 0.125) @ v)[:, :, 0]
    assert torch.equal(spiking_attention_reference(q, k, v, scale=0.125, fire="map", neuron=neuron), wanted)
    assert neuron(attention_map(q, k) * 0.125).any()


def test_gradients_agree_with_float64():
    q, k, v = (spikes(4, 2, 2, 5, 8, rate=0.5) for _ in range(3))
    weight = torch.randn(4, 2, 5, 16)

    def grads(dtype, order):
        own = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = spiking_attention_reference(*own, scale=0.125, fire="output", neuron=LIF(v_threshold=0.5), order=order)
        return torch.autograd.grad((out * weight.to(dtype)).sum(), own)

    exact = grads(torch.float64, "map_first")
    for order in ("map_first", "state_first"):
        for a, b in zip(grads(torch.float32, order), exact, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


def test_bad_input_is_named():
    x = torch.zeros(1, 1, 1, 2, 2)
    with pytest.raises(ValueError, match='order must be "map_first"'):
        spiking_attention_reference(x, x, x, scale=1.0, fire="map", neuron=identity, order="state_first")
    long = torch.zeros(1, 1, 1, 1, 1).expand(1, 1, 1, 2**18, 128)
    with pytest.raises(ValueError, match=r"L \* E must be at most 2\*\*24"):
        spiking_attention_reference(long, long, long, scale=1.0, fire="output", neuron=identity)
