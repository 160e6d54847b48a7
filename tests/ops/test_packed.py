"""Spikes that a backward needs are kept as bits, and come back as they were."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spikeattn import spiking_attention
from spikeattn._cpu.packed import packed, unpacked

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
def test_spikes_come_back_with_their_strides(shape, dtype, data):
    order = data.draw(st.permutations(range(len(shape))))
    x = (torch.rand(shape) < 0.4).to(dtype).permute(order)
    spikes = packed(x)
    assert spikes.bits.numel() == -(-x.numel() // 64)
    again = unpacked(spikes)
    assert torch.equal(again, x)
    assert (again.stride(), again.dtype) == (x.stride(), x.dtype)


def test_many_blocks_come_back():
    x = (torch.rand(3, 70_001) < 0.1).float()
    assert torch.equal(unpacked(packed(x)), x)


@pytest.mark.parametrize("odd", [2.0, -1.0, 0.5, float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_other_numbers_are_not_packed(odd, dtype):
    x = torch.ones(200, dtype=dtype)
    x[150] = odd
    assert packed(x) is None


def test_what_repeats_is_packed_once():
    x = (torch.rand(1, 70, 1, 5) < 0.4).float().expand(3, 70, 4, 5)
    spikes = packed(x)
    assert spikes.bits.numel() == -(-70 * 5 // 64)
    again = unpacked(spikes)
    assert torch.equal(again, x)
    assert again.stride() == x.stride()


def test_what_has_gaps_is_packed_without_them():
    for x in ((torch.rand(40, 60) < 0.4).float()[:, ::2], torch._neg_view(-(torch.rand(9, 9) < 0.4).float())):
        assert torch.equal(unpacked(packed(x)), x)


def test_nothing_and_other_types_are_not_packed():
    assert packed(torch.zeros(0)) is None
    assert packed(torch.zeros(3, dtype=torch.float64)) is None


@pytest.mark.parametrize("fire", ["output", "map", None])
@pytest.mark.parametrize(("numbers", "share"), [("spikes", 1 / 32), ("counts", 1)])
def test_attention_keeps_bits_of_spikes(fire, numbers, share):
    leaves = [(torch.rand(4, 2, 64, 2, 32) < 0.3).float().transpose(2, 3).requires_grad_() for _ in range(3)]
    q, k, v = leaves if numbers == "spikes" else [2 * x for x in leaves]
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.update({x.data_ptr(): x.untyped_storage().nbytes()}) or x, lambda x: x
    ):
        out = spiking_attention(q, k, v, fire=fire, backend="numba")
    assert abs(sum(kept.values()) - share * 3 * 4 * q.numel()) <= 64
    grad = torch.randn_like(out)
    grads = torch.autograd.grad(out, leaves, grad)
    wanted = torch.autograd.grad(
        spiking_attention(*(leaves if numbers == "spikes" else [2 * x for x in leaves]), fire=fire, backend="torch"),
        leaves,
        grad,
    )
    for own, other in zip(grads, wanted, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)
