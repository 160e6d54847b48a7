"""The CPU kernels of `spiking_attention` over states: any length, one order of sums, gradients as of the definition."""

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

from spikeattn import ATan, lif, spiking_attention
from spikeattn.ops.spiking_attention import cpu_backward, registered
from spikeattn.ops.spiking_attention.layout import room_for_gradient


@pytest.fixture(autouse=True)
def _no_products(monkeypatch):
    """Whatever goes to matrix products fails."""

    def refuse(*args):
        raise AssertionError("this call did not run in a kernel")

    monkeypatch.setattr(registered, "attend", refuse)
    monkeypatch.setattr(registered, "attend_backward", refuse)


def spikes(*shape, rate=0.2, dtype=torch.float32):
    return (torch.rand(shape) < rate).to(dtype)


def attend(qkv, weight, **options):
    """Output, and gradients of the three."""
    own = [x.detach().requires_grad_() for x in qkv]
    out = spiking_attention(*own, scale=0.0625, backend="numba", **options)
    return out, torch.autograd.grad((out * weight).sum(), own)


def by_definition(qkv, weight, **options):
    """The same in float64, and in one piece."""
    own = [x.detach().double().requires_grad_() for x in qkv]
    q, k, v = own
    counts = q @ k.transpose(-1, -2)
    current = (counts.tril() if options["is_causal"] else counts) @ v * 0.0625
    neuron = {"tau": 2.0, "v_threshold": 0.5, "surrogate": ATan(2.0), "detach_reset": True}
    out = current if options["fire"] is None else lif(current, **neuron).spikes
    return out, torch.autograd.grad((out * weight.double()).sum(), own)


# More tokens than are taken through time together, than gradients are added up one after another, and than fit a word.
@pytest.mark.parametrize(("L", "S"), [(600, 600), (17, 300), (300, 17), (1, 1)])
@pytest.mark.parametrize("E", [1, 20, 32, 33, 64, 65, 128])
@pytest.mark.parametrize("fire", ["output", None])
def test_long_sequences_have_the_sums_and_gradients_of_the_definition(L, S, E, fire):
    assert cpu_backward._PART < 600
    T = 3
    qkv = spikes(T, 1, 2, L, E), spikes(T, 1, 2, S, E), spikes(T, 1, 2, S, E)
    weight = torch.randn(T, 1, 2, L, E)
    for is_causal in (False, True) if L == S else (False,):
        out, grads = attend(qkv, weight, fire=fire, is_causal=is_causal)
        wanted, wanted_grads = by_definition(qkv, weight, fire=fire, is_causal=is_causal)
        assert torch.equal(out.double(), wanted)
        for grad, want in zip(grads, wanted_grads, strict=True):
            assert (grad - want).abs().max() <= 1e-6 * want.abs().max()


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("dtype", "E"), [(torch.float32, 32), (torch.bfloat16, 32), (torch.float32, 96)])
def test_long_padding_changes_no_bit(is_causal, dtype, E):
    lengths, L = (300, 520), 530
    qkv = [spikes(2, 2, 2, L, E, dtype=dtype) for _ in range(3)]
    mask = torch.arange(L) >= torch.tensor(lengths).unsqueeze(1)
    weight = torch.randn(2, 2, 2, L, E)
    weight[:, 0, :, 300:] = float("nan")  # what arrives at padding does not leave it
    out, grads = attend(qkv, weight.to(dtype), is_causal=is_causal, query_padding_mask=mask, key_padding_mask=mask)
    for b, n in enumerate(lengths):
        own = [x[:, b : b + 1, :, :n] for x in qkv]
        alone, alone_grads = attend(own, weight[:, b : b + 1, :, :n].to(dtype), is_causal=is_causal)
        assert torch.equal(out[:, b : b + 1, :, :n], alone)
        for grad, want in zip(grads, alone_grads, strict=True):
            assert torch.equal(grad[:, b : b + 1, :, :n], want)
            assert not grad[:, b, :, n:].any()


def test_the_number_of_threads_changes_no_bit():
    qkv, weight = [spikes(4, 2, 3, 300, 32) for _ in range(3)], torch.randn(4, 2, 3, 300, 32)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(attend(qkv, weight, is_causal=True))
    finally:
        torch.set_num_threads(threads)
    (out, grads), (other, other_grads) = results
    assert torch.equal(out, other)
    assert all(map(torch.equal, grads, other_grads))


@pytest.mark.parametrize("axis", range(4))
def test_what_is_the_same_along_an_axis_is_attended_to_as_its_copies(axis):
    shape = [3, 2, 2, 70, 32]
    one = [1 if a == axis else size for a, size in enumerate(shape)]
    q, k, v = spikes(*one).expand(shape), spikes(*shape), spikes(*one).expand(shape)
    weight = torch.randn(shape)
    repeated, grads = attend((q, k, v), weight)
    copied, wanted = attend([x.contiguous() for x in (q, k, v)], weight)
    assert torch.equal(repeated, copied)
    assert all(map(torch.equal, grads, wanted))


@pytest.mark.parametrize("layout", ["as the block has it", "contiguous"])
def test_gradients_lie_in_memory_as_their_inputs(layout):
    qkv = [spikes(2, 2, 3, 70, 32) for _ in range(3)]
    if layout != "contiguous":
        qkv = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in qkv]
    _, grads = attend(qkv, torch.randn(2, 2, 3, 70, 32))
    assert [grad.stride() for grad in grads] == [x.stride() for x in qkv]


def gapped(x):
    return torch.cat([x, x], dim=-1)[..., : x.shape[-1]].transpose(2, 3)


@pytest.mark.parametrize("layout", ["heads of one projection", "channels outside"])
def test_the_registered_backward_says_where_gradients_of_inputs_with_gaps_lie(layout):
    qkv = [spikes(2, 2, 20, 3, 8) for _ in range(3)]
    qkv = [gapped(x) if layout == "heads of one projection" else x.permute(0, 1, 4, 3, 2) for x in qkv]
    qkv = [x.requires_grad_() for x in qkv]
    scale, settings = torch.full((1, 1, 1, 1, 1), 0.125), (2.0, 0.5, 0.0, True, "atan", 2.0, "numba")
    is_causal = layout == "heads of one projection"
    arguments = (*qkv, scale, None, None, "output", "auto", is_causal, *settings)
    torch.library.opcheck(torch.ops.spikeattn.spiking_attention_forward.default, arguments)
    grad = torch.randn(qkv[0].shape)
    detached = (grad, *(x.detach() for x in qkv), *arguments[3:])
    torch.library.opcheck(torch.ops.spikeattn.spiking_attention_backward.default, detached)
    eager = torch.autograd.grad(spiking_attention(*qkv, is_causal=is_causal, backend="numba"), qkv, grad)
    plain = [x.detach().contiguous().requires_grad_() for x in qkv]
    wanted = torch.autograd.grad(spiking_attention(*plain, is_causal=is_causal, backend="numba"), plain, grad)
    assert all(map(torch.equal, eager, wanted))
    assert [g.stride() for g in eager] == [room_for_gradient(x).stride() for x in qkv]


def test_a_scale_that_is_a_view_of_its_negative_reaches_the_gradients():
    qkv, weight = [spikes(3, 2, 2, 20, 8) for _ in range(3)], torch.randn(3, 2, 2, 20, 8)
    scale = torch._neg_view(-torch.rand(2, 1, 20, 1))
    results = []
    for own_scale in (scale, scale.resolve_neg()):
        own = [x.clone().requires_grad_() for x in qkv]
        out = spiking_attention(*own, scale=own_scale, backend="numba")
        results.append((out, *torch.autograd.grad((out * weight).sum(), own)))
    assert all(map(torch.equal, *results))


def test_a_tensor_of_another_class_beside_plain_ones_is_seen_by_it():
    q, k, v = (spikes(3, 2, 2, 20, 8) for _ in range(3))
    wanted = spiking_attention(q, k, v, backend="numba")
    out = spiking_attention(q.requires_grad_(), TwoTensor(k, k.clone()), v, backend="numba")
    assert isinstance(out, TwoTensor)
    assert torch.equal(out.a, wanted)
