"""Spiking attention: exact in any order of association, blind to padding, the same bits on every backend."""

import itertools
import logging

import pytest
import torch
from cases import SURROGATES, ids
from hypothesis import given
from hypothesis import strategies as st

from spikeattn import ATan, BackendUnavailableError, Sigmoid, lif, spiking_attention
from spikeattn.ops.spiking_attention import reference
from spikeattn.ops.spiking_attention.reference import product, spiking_attention_reference

FIRES = ["output", "map", None]
BACKENDS = ["torch", "numba"]


def spikes(*shape, rate=0.3, dtype=torch.float32):
    return (torch.rand(shape) < rate).to(dtype)


def naive(q, k, v, scale, causal=False):
    """``scale (Q K^T) V`` by loops over tokens, in float64."""
    T, B, H, L, E = q.shape
    out = torch.zeros(T, B, H, L, E, dtype=torch.float64)
    for t, b, h, i in itertools.product(range(T), range(B), range(H), range(L)):
        for j in range(i + 1 if causal else k.shape[3]):
            out[t, b, h, i] += float((q[t, b, h, i].double() * k[t, b, h, j].double()).sum()) * v[t, b, h, j].double()
    return out * scale


def definition(q, k, v, *, scale=0.125, fire="output", masks=(None, None), causal=False, order="map_first", **neuron):
    """The definition, differentiable, with the defaults of the public function."""
    settings = {"tau": 2.0, "v_threshold": 0.5, "v_reset": 0.0, "detach_reset": True, "surrogate": ATan(2.0)} | neuron
    scale = torch.as_tensor(scale, dtype=torch.promote_types(q.dtype, torch.float32))
    return spiking_attention_reference(q, k, v, scale, *masks, fire, order, causal, *settings.values())


@given(
    L=st.integers(1, 9),
    S=st.integers(1, 9),
    E=st.integers(1, 9),
    H=st.sampled_from([1, 3]),
    rate=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    exponent=st.integers(-6, 3),
    causal=st.booleans(),
)
def test_orders_and_backends_agree_to_the_bit_and_with_loops(L, S, E, H, rate, exponent, causal):
    S = L if causal else S
    q, k, v = (spikes(2, 2, H, n, E, rate=rate) for n in (L, S, S))
    scale = 2.0**exponent
    wanted = naive(q, k, v, scale, causal)
    fired = lif(wanted.float(), tau=2.0, v_threshold=0.5, backend="torch").spikes
    for order, backend in itertools.product(("map_first", "state_first", "auto"), BACKENDS):
        kwargs = {"scale": scale, "order": order, "is_causal": causal, "backend": backend}
        assert torch.equal(spiking_attention(q, k, v, fire=None, **kwargs).double(), wanted)
        assert torch.equal(spiking_attention(q, k, v, **kwargs), fired)


@pytest.mark.parametrize("L", [reference.CHUNK - 1, reference.CHUNK, 3 * reference.CHUNK + 5])
def test_causal_chunks_give_the_bits_of_the_whole_map(L):
    a, b, c = (spikes(2, 1, 2, L, 8, rate=0.5) for _ in range(3))
    assert torch.equal(product(a, b, c, "state_first", True), product(a, b, c, "map_first", True))


@pytest.mark.parametrize("order", ["map_first", "state_first"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_long_sums_stay_exact(order, backend):
    # 3000 * 64 coincidences: beyond what bfloat16 or float16 hold, and far below 2**24.
    ones = torch.ones(1, 1, 1, 3000, 64)
    out = spiking_attention(ones, ones, ones, fire=None, order=order, backend=backend)
    assert out.unique().tolist() == [3000 * 64 * 0.125]
    low = ones.bfloat16()
    sharp = {"tau": 1.5, "v_threshold": 3000 * 64 * 0.125 / 1.5, "order": order, "backend": backend}
    assert spiking_attention(low, low, low, **sharp).all()
    sharp["v_threshold"] *= 1 + 2**-20
    assert not spiking_attention(low, low, low, **sharp).any()


def test_sums_that_float32_cannot_hold_are_announced_once(caplog, monkeypatch):
    monkeypatch.setattr("spikeattn._backends._said", set())
    q, k = torch.zeros(1, 1, 1, 1, 128), torch.zeros(1, 1, 1, 2**17 + 1, 128)
    with caplog.at_level(logging.WARNING, "spikeattn"):
        spiking_attention(q, k, k, fire=None)
        spiking_attention(q, k, k, fire=None)
    assert sum("2**24" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_does_not_round_the_sums(backend):
    q, k, v = (spikes(1, 1, 1, 200, 64, rate=0.9) for _ in range(3))
    kwargs = {"scale": 1.0, "fire": None, "backend": backend}
    with torch.autocast("cpu", torch.bfloat16):
        low = spiking_attention(q, k, v, **kwargs)
    assert torch.equal(low, spiking_attention(q, k, v, **kwargs))


@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    extra=st.integers(0, 3),
    fire=st.sampled_from(FIRES),
    causal=st.booleans(),
    backend=st.sampled_from(BACKENDS),
)
def test_padding_never_changes_a_result_or_a_gradient(lengths, extra, fire, causal, backend):
    T, H, E, L = 3, 2, 4, max(lengths) + extra
    qkv = [spikes(T, len(lengths), H, L, E, rate=0.6).requires_grad_() for _ in range(3)]
    mask = torch.arange(L) >= torch.tensor(lengths).unsqueeze(1)
    kwargs = {"fire": fire, "is_causal": causal, "backend": backend}
    padded = spiking_attention(*qkv, query_padding_mask=mask, key_padding_mask=mask, **kwargs)
    weight = torch.randn(padded.shape)
    grads = torch.autograd.grad((padded * weight).sum(), qkv)
    for b, n in enumerate(lengths):
        own = [x.detach()[:, b : b + 1, :, :n].requires_grad_() for x in qkv]
        alone = spiking_attention(*own, **kwargs)
        assert torch.equal(padded[:, b : b + 1, :, :n], alone)
        assert not padded[:, b, :, n:].any()
        for grad, want in zip(
            grads, torch.autograd.grad((alone * weight[:, b : b + 1, :, :n]).sum(), own), strict=True
        ):
            torch.testing.assert_close(grad[:, b : b + 1, :, :n], want)
            if backend == "numba" and fire != "map":  # the fused kernel has one order of sums
                assert torch.equal(grad[:, b : b + 1, :, :n], want)
            assert not grad[:, b, :, n:].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_in_front_and_a_row_of_padding_alone(backend):
    q, k, v = (spikes(2, 2, 1, 4, 8, rate=0.7) for _ in range(3))
    mask = torch.tensor([[True, False, False, False], [True, True, True, True]])
    kwargs = {"scale": 1.0, "fire": None, "backend": backend}
    padded = spiking_attention(q, k, v, query_padding_mask=mask, key_padding_mask=mask, **kwargs)
    alone = spiking_attention(*(x[:, :1, :, 1:] for x in (q, k, v)), **kwargs)
    assert torch.equal(padded[:, :1, :, 1:], alone)
    assert not padded[:, 1].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fire", FIRES)
def test_queries_and_keys_may_differ_in_number_and_padding(fire, backend):
    q, k, v = spikes(4, 2, 2, 3, 8), spikes(4, 2, 2, 7, 8), spikes(4, 2, 2, 7, 8)
    seen = torch.tensor([5, 2])
    mask = torch.arange(7) >= seen.unsqueeze(1)
    out = spiking_attention(q, k, v, fire=fire, key_padding_mask=mask, backend=backend)
    for b, n in enumerate(seen):
        alone = definition(*(x[:, b : b + 1] for x in (q, k[..., :n, :], v[..., :n, :])), fire=fire)
        assert torch.equal(out[:, b : b + 1], alone)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fire", FIRES)
def test_causal_tokens_do_not_see_later_ones(fire, backend):
    q, k, v = (spikes(3, 1, 2, 6, 4, rate=0.6) for _ in range(3))
    kwargs = {"scale": 0.5, "fire": fire, "is_causal": True, "backend": backend}
    whole = spiking_attention(q, k, v, **kwargs)
    for n in range(1, 7):
        part = spiking_attention(*(x[..., :n, :] for x in (q, k, v)), **kwargs)
        assert torch.equal(whole[:, :, :, :n], part)


def test_the_map_fires_before_it_meets_the_values():
    q, k, v = (spikes(5, 1, 1, 3, 8, rate=0.7) for _ in range(3))
    fired = lif(q @ k.transpose(-1, -2) * 0.125, tau=2.0, v_threshold=0.5).spikes
    assert torch.equal(spiking_attention(q, k, v, fire="map"), fired @ v)
    assert fired.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("fire", FIRES)
@pytest.mark.parametrize("v_reset", [0.0, None])
@pytest.mark.parametrize("detach_reset", [True, False])
def test_gradients_are_those_of_the_definition_in_float64(fire, causal, backend, v_reset, detach_reset):
    q, k, v = (spikes(4, 2, 2, 5, 8, rate=0.5) for _ in range(3))
    options = {"fire": fire, "tau": 3.0, "v_reset": v_reset, "detach_reset": detach_reset, "surrogate": Sigmoid()}
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    out = definition(*wide, causal=causal, **options)
    weight = torch.randn(out.shape)
    wanted = torch.autograd.grad((out * weight).sum(), wide)
    for order in ("map_first",) if fire == "map" else ("map_first", "state_first"):
        own = [x.requires_grad_() for x in (q, k, v)]
        got = spiking_attention(*own, is_causal=causal, order=order, backend=backend, **options)
        assert torch.equal(got.double(), out)
        for grad, want in zip(torch.autograd.grad((got * weight).sum(), own), wanted, strict=True):
            torch.testing.assert_close(grad.double(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fire", ["output", "map"])
def test_the_analytic_gradient_is_the_one_of_autograd_in_float64(fire):
    """With float64 inputs the public function runs the analytic backward; the definition by autograd is the oracle."""
    q, k, v = (torch.rand(3, 1, 2, 4, 3, dtype=torch.float64).requires_grad_() for _ in range(3))
    weight = torch.randn(3, 1, 2, 4, 3, dtype=torch.float64)
    ours, wanted = (
        torch.autograd.grad((f(q, k, v, fire=fire) * weight).sum(), (q, k, v)) for f in (spiking_attention, definition)
    )
    for got, want in zip(ours, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("surrogate", SURROGATES, ids=ids)
@pytest.mark.parametrize("fire", ["output", "map"])
def test_every_surrogate_reaches_the_gradient(surrogate, fire):
    q, k, v = (spikes(4, 1, 2, 6, 8, rate=0.5).requires_grad_() for _ in range(3))
    weight = torch.randn(4, 1, 2, 6, 8)
    grads = []
    for backend in BACKENDS:
        out = spiking_attention(q, k, v, fire=fire, surrogate=surrogate, backend=backend)
        grads.append(torch.autograd.grad((out * weight).sum(), (q, k, v)))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fire", FIRES)
def test_16_bit_spikes_give_what_float32_ones_give(fire, dtype, backend):
    q, k, v = (spikes(4, 2, 2, 9, 8, rate=0.5) for _ in range(3))
    wide = spiking_attention(q, k, v, fire=fire, backend=backend)
    low = spiking_attention(*(x.to(dtype) for x in (q, k, v)), fire=fire, backend=backend)
    assert low.dtype == dtype
    assert torch.equal(low, wide.to(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_scale_may_depend_on_dialogue_and_token(backend):
    q, k, v = (spikes(3, 2, 2, 5, 8, rate=0.5) for _ in range(3))
    scale = 2.0 ** torch.randint(-4, 2, (2, 1, 5, 1))
    for fire in FIRES:
        out = spiking_attention(q, k, v, scale=scale, fire=fire, backend=backend)
        for b, i in itertools.product(range(2), range(5)):
            alone = spiking_attention(
                q[:, b : b + 1, :, i : i + 1], k[:, b : b + 1], v[:, b : b + 1], scale=scale[b, 0, i].item(), fire=fire
            )
            assert torch.equal(out[:, b : b + 1, :, i : i + 1], alone)


@given(layout=st.permutations(range(5)), backend=st.sampled_from(BACKENDS), fire=st.sampled_from(FIRES))
def test_any_stride_gives_what_contiguous_inputs_give(layout, backend, fire):
    qkv = [spikes(2, 3, 2, 5, 4, rate=0.5) for _ in range(3)]
    back = [layout.index(axis) for axis in range(5)]
    odd = [x.permute(layout).contiguous().permute(back) for x in qkv]
    wanted = spiking_attention(*qkv, fire=fire, backend=backend)
    out = spiking_attention(*odd, fire=fire, backend=backend)
    assert torch.equal(out, wanted)
    assert out.transpose(2, 3).is_contiguous()


def test_a_map_in_tiles_gives_the_same_bits(monkeypatch):
    q, k, v = (spikes(3, 2, 2, 10, 8, rate=0.5).requires_grad_() for _ in range(3))
    weight = torch.randn(3, 2, 2, 10, 8)
    results = []
    for limit in (1 << 30, 3 * 2 * 2 * 10 * 4 * 3):
        monkeypatch.setattr(reference, "MAP_BYTES", limit)
        for causal in (False, True):
            out = spiking_attention(q, k, v, fire="map", is_causal=causal, backend="torch")
            results.append([out, *torch.autograd.grad((out * weight).sum(), (q, k, v))])
    for whole, tiled in zip(results[:2], results[2:], strict=True):
        assert torch.equal(whole[0], tiled[0])
        for a, b in zip(whole[1:], tiled[1:], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_kept_but_the_inputs(backend):
    q, k, v = (spikes(2, 1, 1, 50, 8).requires_grad_() for _ in range(3))
    saved = spiking_attention(q, k, v, backend=backend).grad_fn.saved_tensors
    size = 13 if backend == "numba" else 800  # 64 spikes a word
    assert [None if s is None else s.numel() for s in saved] == [size, size, size, 1, None, None]


@pytest.mark.parametrize("fire", FIRES)
def test_registered_ops_pass_opcheck(fire):
    q, k, v = (spikes(2, 2, 1, 3, 4, rate=0.5).requires_grad_() for _ in range(3))
    mask = torch.tensor([[False, False, True], [False, False, False]])
    inputs = (q, k, v, torch.full((1, 1, 1, 1, 1), 0.125), mask, mask)
    settings = (fire, "auto", False, 2.0, 0.5, 0.0, True, "atan", 2.0, "numba")
    torch.library.opcheck(torch.ops.spikeattn.spiking_attention_forward.default, (*inputs, *settings))
    detached = [x.detach() for x in inputs]
    grad = torch.randn(2, 2, 1, 3, 4)
    torch.library.opcheck(torch.ops.spikeattn.spiking_attention_backward.default, (grad, *detached, *settings))


@pytest.mark.parametrize("fire", FIRES)
def test_compiles_to_one_graph(fire):
    q, k, v = (spikes(2, 1, 2, 3, 4, rate=0.5).requires_grad_() for _ in range(3))
    weight = torch.randn(2, 1, 2, 3, 4)

    def loss(q, k, v):
        return (spiking_attention(q, k, v, fire=fire) * weight).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for got, want in zip(*(torch.autograd.grad(f(q, k, v), (q, k, v)) for f in (compiled, loss)), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("fire", FIRES)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_is_not_a_spike_is_attended_to_all_the_same(fire, which):
    """The kernels see bits; one number that is neither 0 nor 1 must not become one."""
    qkv = [spikes(3, 2, 2, 5, 8, rate=0.5) for _ in range(3)]
    qkv[which][1, 0, 1, 2, 3] = 0.25
    qkv = [x.requires_grad_() for x in qkv]
    weight = torch.randn(3, 2, 2, 5, 8)
    results = []
    for backend in BACKENDS:
        out = spiking_attention(*qkv, fire=fire, backend=backend)
        results.append([out, *torch.autograd.grad((out * weight).sum(), qkv)])
        with torch.no_grad():  # packed by the kernel itself
            assert torch.equal(spiking_attention(*qkv, fire=fire, backend=backend), out)
    assert torch.equal(results[0][0], results[1][0])
    for got, want in zip(results[1][1:], results[0][1:], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fire", FIRES)
@pytest.mark.parametrize("E", [8, 100])
def test_inference_has_the_bits_of_training_whatever_lies_at_padding_and_in_memory(fire, E):
    q, k, v = (spikes(3, 2, 2, 9, E, rate=0.5) for _ in range(3))
    mask = torch.arange(9) >= torch.tensor([[9], [4]])
    q[:, 1, :, 4:], k[:, 1, :, 4:], v[:, 1, :, 4:] = float("nan"), 0.5, -1.0
    q, v = q.transpose(2, 3).contiguous().transpose(2, 3), v[:1].expand(3, -1, -1, -1, -1)
    options = {"fire": fire, "scale": 0.5, "query_padding_mask": mask, "key_padding_mask": mask, "backend": "numba"}
    with torch.no_grad():
        out = spiking_attention(q, k, v, **options)
    clean = [x.masked_fill(mask[:, None, :, None], 0.0).requires_grad_() for x in (q, k, v)]
    assert torch.equal(out, spiking_attention(*clean, **options).detach())
    assert not out[:, 1, :, 4:].any()
    assert out.any()


@pytest.mark.parametrize("L", [1, 63, 64, 65, 128, 129])
@pytest.mark.parametrize("E", [1, 33, 64, 65, 128, 129])
@pytest.mark.parametrize("fire", FIRES)
def test_words_of_bits_end_where_tokens_and_channels_do(L, E, fire):
    q, k, v = (spikes(2, 1, 2, L, E, rate=0.5) for _ in range(3))
    for causal in (False, True):
        ours, wanted = (
            spiking_attention(q, k, v, scale=1.0 if E == 1 else 0.125, fire=fire, is_causal=causal, backend=b)
            for b in ("numba", "torch")
        )
        assert torch.equal(ours, wanted)
        assert ours.any() or L * E == 1


def test_a_module_around_it_exports():
    class Attention(torch.nn.Module):
        def forward(self, q, k, v):
            return spiking_attention(q, k, v, is_causal=True)

    qkv = tuple(spikes(2, 1, 2, 3, 8, rate=0.6) for _ in range(3))
    assert torch.equal(torch.export.export(Attention(), qkv).module()(*qkv), Attention()(*qkv))


@pytest.mark.parametrize("shape", [(2, 0, 1, 3, 4), (2, 1, 0, 3, 4), (2, 1, 1, 0, 4)])
@pytest.mark.parametrize("fire", FIRES)
def test_nothing_attends_to_nothing(shape, fire):
    x = torch.zeros(shape, requires_grad=True)
    out = spiking_attention(x, x, x, fire=fire)
    assert out.shape == shape
    assert torch.autograd.grad(out.sum(), x)[0].shape == shape


@pytest.mark.parametrize("fire", FIRES)
def test_without_keys_the_output_is_zero(fire):
    q, k = torch.ones(2, 1, 1, 3, 4), torch.ones(2, 1, 1, 0, 4)
    assert not spiking_attention(q, k, k, fire=fire).any()


def test_any_function_that_fires_is_a_surrogate_on_the_definition():
    q, k, v = (spikes(2, 1, 1, 3, 4, rate=0.7).requires_grad_() for _ in range(3))
    out = spiking_attention(q, k, v, surrogate=torch.sigmoid)
    assert torch.equal(out, definition(q, k, v, surrogate=torch.sigmoid))
    with pytest.raises(BackendUnavailableError, match="CustomSurrogate"):
        spiking_attention(q, k, v, surrogate=torch.sigmoid, backend="numba")


SHAPE = (2, 1, 2, 3, 4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(2, 3, 4)}, ValueError, r"q must be \[T, B, H, L, E\].*\(2, 3, 4\)"),
        ({"k": torch.zeros(2, 1, 2, 4, 3)}, ValueError, r"k must be .*Tokens come before channels"),
        ({"v": torch.zeros(2, 1, 2, 5, 4)}, ValueError, r"v must be \[T, B, H, S, E\] = \(2, 1, 2, 3, 4\)"),
        ({"k": torch.zeros(SHAPE, dtype=torch.float64)}, TypeError, "k must be torch.float32"),
        ({"v": torch.zeros(SHAPE, dtype=torch.int64)}, TypeError, "v must be float32"),
        ({"q": torch.zeros(0, 1, 2, 3, 4)}, ValueError, "T, E >= 1"),
        ({"is_causal": True, "q": torch.zeros(2, 1, 2, 5, 4)}, ValueError, "L = 5 and S = 3"),
        ({"fire": "both"}, ValueError, "fire must be one of 'output', 'map', None, got 'both'"),
        ({"order": "fast"}, ValueError, "order must be one of"),
        ({"fire": "map", "order": "state_first"}, ValueError, 'order must be "map_first"'),
        ({"tau": 1.0}, ValueError, "tau must be > 1"),
        ({"v_threshold": float("nan")}, ValueError, "v_threshold"),
        ({"scale": float("inf")}, ValueError, "scale must be finite"),
        ({"scale": torch.ones(5)}, ValueError, r"scale must broadcast to \[T, B, H, L, 1\]"),
        ({"key_padding_mask": torch.zeros(1, 3)}, TypeError, "key_padding_mask must be bool"),
        (
            {"query_padding_mask": torch.zeros(1, 4, dtype=torch.bool)},
            ValueError,
            r"query_padding_mask must be \[B, L\]",
        ),
        ({"validate": True, "k": torch.full(SHAPE, 0.5)}, ValueError, "k must hold spikes, 0 or 1, got 0.5"),
        ({"backend": "gpu"}, ValueError, "backend must be one of"),
        ({"scale": torch.ones((), device="meta")}, ValueError, "scale must be real and on cpu"),
        ({"scale": torch.ones((), dtype=torch.complex64)}, ValueError, "scale must be real"),
        ({"key_padding_mask": torch.zeros(1, 3, device="meta").bool()}, ValueError, "must be on the device of q, cpu"),
        ({"tau": torch.tensor(2.0)}, TypeError, "tau must be a number"),
    ],
)
def test_bad_input_is_named(change, error, message):
    inputs = {name: torch.zeros(SHAPE) for name in "qkv"} | change
    with pytest.raises(error, match=message):
        spiking_attention(inputs.pop("q"), inputs.pop("k"), inputs.pop("v"), **inputs)
