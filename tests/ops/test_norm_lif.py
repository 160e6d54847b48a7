"""`norm_lif`: its two halves, the bits of its kernels, and its gradients against float64."""

import itertools

import pytest
import torch
from cases import DYNAMICS, SURROGATES, currents, ids
from hypothesis import given
from hypothesis import strategies as st
from spikingjelly.activation_based import neuron
from spikingjelly.activation_based import surrogate as theirs

from spikeattn import LIF, ATan, BackendUnavailableError, CustomSurrogate, Sigmoid, lif, norm_lif
from spikeattn.ops.norm_lif.reference import (
    layer_norm_statistics,
    norm_lif_backward_reference,
    norm_lif_reference,
    ordered_sum,
)

NAMES = ("x", "weight", "bias", "v0")


def inputs(T, *shape, dtype=torch.float32):
    """``x``, ``weight``, ``bias`` and ``v0``."""
    D = shape[-1]
    values = (currents(T, *shape), torch.randn(D) * 2 + 1, torch.randn(D), torch.randn(shape))
    return [value.to(dtype) for value in values]


def results(values, backend, static_steps=0, dtype=None, **options):
    """Spikes, potential and the gradients of the four inputs."""
    leaves = [value.to(dtype or value.dtype).clone().requires_grad_() for value in values]
    x, weight, bias, v0 = leaves
    if static_steps:
        x = x.expand(static_steps, *x.shape[1:])
    spikes, v, _ = norm_lif(x, weight, bias, v0, backend=backend, **options)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(out.shape, generator=generator) for out in (spikes, v)]
    loss = (spikes * weights[0].to(spikes.dtype)).sum() + (v * weights[1]).sum()
    return spikes.detach(), v.detach(), torch.autograd.grad(loss, leaves)


def assert_no_worse_than_torch(ours, plain, exact):
    """Errors against float64 at most twice those of PyTorch in float32."""
    for name, a, b, wanted in zip(NAMES, ours, plain, exact, strict=True):
        error, allowed = ((g - wanted).abs().max() for g in (a, b))
        assert error <= 2 * allowed + 1e-6 * wanted.abs().max(), name


def test_two_steps_by_hand():
    # Rows (3, -1) and (-1, 3): mean 1, deviation 2. Normalised (1, -1) and (-1, 1); weight (3, 4) and bias (0, 3) make
    # currents (3, -1) and (-3, 7). With tau 2: H = (1.5, -0.5), the first fires | H = (-1.5, 3.25), the second fires.
    x = torch.tensor([[3.0, -1.0], [-1.0, 3.0]])
    spikes, v, v_seq = norm_lif(x, torch.tensor([3.0, 4.0]), torch.tensor([0.0, 3.0]), eps=0.0)
    assert spikes.tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert v.tolist() == [-1.5, 0.0]
    assert v_seq is None


@given(D=st.integers(1, 700), rows=st.integers(1, 3))
def test_ordered_sum_is_a_sum(D, rows):
    x = torch.randn(rows, D, dtype=torch.float64)
    torch.testing.assert_close(ordered_sum(x), x.sum(-1, keepdim=True), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dynamics", DYNAMICS, ids=ids)
def test_it_is_layer_norm_then_lif_in_float64(dynamics):
    v_reset, detach_reset, decay_input, tau = dynamics
    options = {"tau": tau, "v_reset": v_reset, "detach_reset": detach_reset, "decay_input": decay_input}
    values = inputs(6, 2, 3, 20, dtype=torch.float64)
    mask = torch.tensor([[False, True, False], [False, False, True]])
    spikes, v, grads = results(values, "auto", padding_mask=mask, surrogate=ATan(), **options)
    leaves = [value.clone().requires_grad_() for value in values]
    x, weight, bias, v0 = leaves
    current = torch.nn.functional.layer_norm(x, (20,), weight, bias, 1e-5).masked_fill(mask[..., None], 0.0)
    wanted, wanted_v, _ = lif(current, v0, surrogate=ATan(), **options)
    assert torch.equal(spikes, wanted)
    torch.testing.assert_close(v, wanted_v, rtol=1e-12, atol=1e-12)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(out.shape, generator=generator) for out in (spikes, v)]
    loss = (wanted * weights[0].double()).sum() + (wanted_v * weights[1]).sum()
    for got, want in zip(grads, torch.autograd.grad(loss, leaves), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    assert not grads[0][:, mask].any()


@pytest.mark.parametrize("T", [1, 5])
def test_analytic_backward_is_autograd_of_the_definition_in_float64(T):
    for steps, mask in itertools.product((T, 1), (None, torch.tensor([True, False, False]))):
        values = [v.requires_grad_() for v in inputs(steps, 3, 7, dtype=torch.float64)]
        x, weight, bias, v0 = values
        neuron_options = (3.0, True, 1.0, 0.25, False, Sigmoid())
        spikes, v, mean, rstd = norm_lif_reference(x, weight, bias, mask, v0, T, 1e-5, *neuron_options)
        grads = [torch.randn_like(out) for out in (spikes, v)]
        wanted = torch.autograd.grad((spikes, v), values, grads)
        with torch.no_grad():
            got = norm_lif_backward_reference(*grads, x, weight, bias, mask, v0, mean, rstd, T, *neuron_options)
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_definition_with_the_smooth_primitive_passes_gradcheck():
    values = [v.requires_grad_() for v in inputs(3, 2, 5, dtype=torch.float64)]

    def smooth(x, weight, bias, v0):
        return norm_lif_reference(
            x, weight, bias, None, v0, 3, 1e-5, 2.0, True, 1.0, 0.0, False, ATan().primitive
        )[:2]  # fmt: skip

    assert torch.autograd.gradcheck(smooth, values)


@pytest.mark.parametrize("dynamics", DYNAMICS[::3], ids=ids)
@pytest.mark.parametrize("case", ["plain", "masked", "static", "static masked"])
def test_kernels_have_the_bits_of_the_definition(dynamics, case):
    v_reset, detach_reset, decay_input, tau = dynamics
    options = {"v_reset": v_reset, "detach_reset": detach_reset, "decay_input": decay_input, "tau": tau}
    for T, *shape in ((1, 1), (2, 3, 5), (7, 2, 3, 33), (9, 300, 64), (32, 4, 129), (3, 2, 300)):
        values = inputs(1 if "static" in case else T, *shape)
        options["padding_mask"] = torch.rand(shape[:-1]) < 0.3 if "masked" in case else None
        options["static_steps"] = T if "static" in case else 0
        options["surrogate"] = SURROGATES[T % len(SURROGATES)]
        ours, plain = (results(values, backend, **options) for backend in ("numba", "torch"))
        assert torch.equal(ours[0], plain[0])
        assert torch.equal(ours[1], plain[1])
        exact = results(values, "torch", dtype=torch.float64, **options)
        if torch.equal(exact[0].float(), plain[0]):  # else float64 fires elsewhere, and has other gradients
            assert_no_worse_than_torch(ours[2], plain[2], exact[2])


def test_long_rows_and_long_sequences_in_segments_give_the_same_spikes():
    for T, *shape in ((300, 2, 512), (5, 1, 40_000)):
        values = inputs(T, *shape)
        ours, plain = (results(values, backend, tau=10.0, surrogate=ATan()) for backend in ("numba", "torch"))
        assert torch.equal(ours[0], plain[0])
        assert torch.equal(ours[2][3], plain[2][3])  # the gradient of v0 has no sum in it


@given(
    T=st.integers(1, 6),
    shape=st.lists(st.integers(0, 4), max_size=2),
    D=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    transposed=st.booleans(),
)
def test_any_shape_stride_and_dtype_gives_the_bits_of_the_definition(T, shape, D, dtype, transposed):
    x, weight, bias, v0 = inputs(T, *shape, D)
    x = x.to(dtype)
    if transposed:
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    ours, plain = (norm_lif(x, weight, bias, v0, backend=backend) for backend in ("numba", "torch"))
    assert ours.spikes.dtype == dtype
    assert torch.equal(ours.spikes, plain.spikes)
    assert torch.equal(ours.v, plain.v)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_16_bit_results_are_the_float32_results_rounded_once(dtype, backend, poisoned):
    x, weight, bias, v0 = inputs(7, 5, 33)
    low = results([x.to(dtype), weight, bias, v0], backend, surrogate=ATan())
    full = results([x.to(dtype).float(), weight, bias, v0], backend, surrogate=ATan())
    assert torch.equal(low[0].float(), full[0])
    assert torch.equal(low[1], full[1])
    # The loss weights are rounded too, so only the dtype and the closeness of gradients are asked of this one.
    assert [g.dtype for g in low[2]] == [dtype, torch.float32, torch.float32, torch.float32]
    for got, want in zip(low[2], full[2], strict=True):
        assert (got.float() - want).abs().max() <= 0.02 * want.abs().max()


def test_gradient_of_a_16_bit_input_is_rounded_once():
    x, weight, bias, v0 = inputs(7, 5, 33)
    x, grad = x.bfloat16(), torch.randn(7, 5, 33).bfloat16()
    low, full = x.clone().requires_grad_(), x.float().requires_grad_()
    for leaf in (low, full):
        spikes = norm_lif(leaf, weight, bias, v0, surrogate=ATan(), backend="numba").spikes
        spikes.backward(grad.to(spikes.dtype))
    assert torch.equal(low.grad, full.grad.bfloat16())


def test_autocast_runs_the_kernel_and_changes_nothing():
    x, weight, bias, v0 = inputs(7, 5, 33)
    x = x.bfloat16()  # what a Linear gives under autocast
    with torch.autocast("cpu", torch.bfloat16):
        inside = norm_lif(x, weight, bias, v0, backend="numba")
    outside = norm_lif(x.float(), weight, bias, v0, backend="torch")
    assert inside.spikes.dtype == torch.bfloat16
    assert torch.equal(inside.spikes.float(), outside.spikes)
    assert torch.equal(inside.v, outside.v)


@pytest.mark.parametrize("T", [1, 4, 32, 64])
def test_it_fires_like_layer_norm_and_spikingjelly(T):
    x, weight, bias, _ = inputs(T, 3, 64, dtype=torch.float32)
    ours = norm_lif(x, weight, bias, backend="numba", surrogate=ATan()).spikes
    # The statistics' last bits are the sums' order: the oracle is given ours, and the neuron's bits must agree.
    mean, rstd = layer_norm_statistics(x, 1e-5)
    torch.testing.assert_close((x - mean) * rstd, torch.nn.functional.layer_norm(x, (64,)), rtol=1e-5, atol=1e-5)
    oracle = neuron.LIFNode(step_mode="m", surrogate_function=theirs.ATan())
    assert torch.equal(ours, oracle((x - mean) * rstd * weight + bias))


def test_it_keeps_its_inputs_and_two_numbers_a_row():
    x, weight, bias, _ = (value.requires_grad_() for value in inputs(8, 3, 64))
    saved = norm_lif(x, weight, bias, backend="numba").spikes.grad_fn.saved_tensors
    sizes = [None if s is None else s.untyped_storage().nbytes() for s in saved]
    assert sizes == [8 * 3 * 64 * 4, 64 * 4, 64 * 4, None, None, 8 * 3 * 4, 8 * 3 * 4]
    with torch.no_grad():
        assert norm_lif(x, weight, bias, backend="numba").spikes.grad_fn is None


def test_the_number_of_threads_changes_no_bit():
    values, before = inputs(8, 900, 64), torch.get_num_threads()
    runs = []
    for number in (1, 2, 4):
        torch.set_num_threads(number)
        spikes, v, grads = results(values, "numba", surrogate=ATan())
        runs.append([spikes, v, *grads])
    torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(map(torch.equal, run, runs[0]))


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_registered_ops_pass_opcheck(backend):
    for mask in (None, torch.tensor([True, False, False])):
        x, weight, bias, v0 = (value.requires_grad_() for value in inputs(4, 3, 6))
        options = (2.0, True, 1.0, 0.0, False, "atan", 2.0, backend)
        forward, backward = torch.ops.spikeattn.norm_lif_forward.default, torch.ops.spikeattn.norm_lif_backward.default
        torch.library.opcheck(forward, (x, weight, bias, mask, v0, 4, 1e-5, *options))
        saved = [value.detach() for value in (x, weight, bias)]
        statistics = layer_norm_statistics(saved[0], 1e-5)
        grads = (torch.randn(4, 3, 6), torch.randn(3, 6))
        torch.library.opcheck(backward, (*grads, *saved, mask, v0.detach(), *statistics, 4, *options))
        torch.library.opcheck(forward, (x, weight, bias, mask, None, 4, 1e-5, *options))
        torch.library.opcheck(backward, (grads[0], None, *saved, mask, None, *statistics, 4, *options))


def test_compiles_to_one_graph_with_the_same_result():
    x, weight, bias, _ = (value.requires_grad_() for value in inputs(4, 3, 6))

    def loss(x):
        return (norm_lif(x, weight, bias, surrogate=ATan(), backend="numba").spikes * x.detach()).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert torch.equal(*torch.autograd.grad(loss(x), x), *torch.autograd.grad(compiled(x), x))


def test_activation_checkpointing_gives_the_same_gradients():
    x, weight, bias, _ = (value.requires_grad_() for value in inputs(4, 3, 6))

    def loss(x):
        return (norm_lif(x, weight, bias, surrogate=ATan()).spikes * x.detach()).sum()

    kept = torch.utils.checkpoint.checkpoint(loss, x, use_reentrant=False)
    assert torch.equal(*torch.autograd.grad(kept, x), *torch.autograd.grad(loss(x), x))


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_what_lies_at_padding_reaches_no_gradient(backend):
    x, weight, bias, _ = inputs(4, 3, 6)
    x[:, 1] = float("nan")
    mask = torch.tensor([False, True, False])
    leaves = [value.requires_grad_() for value in (x, weight, bias)]
    out = norm_lif(*leaves, padding_mask=mask, surrogate=ATan(), backend=backend).spikes
    assert all(grad.isfinite().all() for grad in torch.autograd.grad((out * torch.randn(4, 3, 6)).sum(), leaves))


def test_a_module_around_it_exports():
    class NormLIF(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.LayerNorm(6)
            torch.nn.init.constant_(self.norm.weight, 3.0)

        def forward(self, x):
            return norm_lif(x, self.norm.weight, self.norm.bias, backend="numba").spikes

    module, x = NormLIF(), torch.randn(4, 3, 6)
    exported = torch.export.export(module, (x,)).module()
    assert torch.equal(exported(x), module(x))
    assert module(x).any()


def test_surrogates_of_every_kind():
    values = inputs(5, 3, 9)
    import numpy as np

    one = np.float32(1.0)
    custom = CustomSurrogate(torch.atan, lambda x: 1 / (1 + x * x), numba=lambda x: one / (one + x * x))
    ours, plain = (results(values, backend, surrogate=custom) for backend in ("numba", "torch"))
    assert torch.equal(ours[2][3], plain[2][3])
    loop = results(values, "auto", surrogate=lambda u: ATan()(u))
    kernel = results(values, "auto", surrogate=ATan())
    assert torch.equal(loop[0], kernel[0])
    for got, want in zip(loop[2], kernel[2], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_a_module_that_normalises_streams_records_and_fires_the_same():
    x, norm = currents(9, 4, 16), torch.nn.LayerNorm(16)
    torch.nn.init.constant_(norm.weight, 4.0)
    whole = LIF(tau=5.0)(x, norm)
    streaming, recording = LIF(tau=5.0, stateful=True), LIF(tau=5.0, store_v_seq=True)
    assert torch.equal(torch.cat([streaming(x[:4], norm), streaming(x[4:], norm)]), whole)
    assert torch.equal(recording(x, norm), whole)
    assert torch.equal(recording.v_seq[-1], streaming.v)
    assert whole.any()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(3)}, ValueError, r"\[T, \*N, D\] with D >= 1, got shape \(3,\)"),
        ({"x": torch.zeros(0, 2, 3)}, ValueError, "T >= 1"),
        ({"x": torch.zeros(4, 2, 0)}, ValueError, "D >= 1"),
        ({"weight": torch.zeros(4)}, ValueError, r"weight must have shape \(D,\) = \(3,\), got \(4,\)"),
        ({"bias": torch.zeros(1, 3)}, ValueError, r"bias must have shape \(D,\) = \(3,\), got \(1, 3\)"),
        ({"v0": torch.zeros(3)}, ValueError, r"\(2, 3\), got \(3,\)"),
        ({"padding_mask": torch.zeros(3).bool()}, ValueError, r"x.shape\[1:-1\] = \(2,\), got \(3,\)"),
        ({"padding_mask": torch.zeros(2)}, TypeError, "bool with True at padding"),
        ({"eps": -1e-5}, ValueError, "eps must be >= 0, got -1e-05"),
        ({"eps": float("nan")}, ValueError, "eps must be finite, got nan"),
        ({"tau": 1.0}, ValueError, "tau must be > 1"),
        ({"v_threshold": -1.0}, ValueError, "v_threshold must be above"),
        ({"surrogate": 3}, TypeError, "Surrogate or a callable"),
        ({"x": torch.zeros(4, 2, 3).double(), "backend": "numba"}, BackendUnavailableError, "float64"),
    ],
)
def test_bad_input_is_named(change, error, message):
    arguments = {"x": torch.zeros(4, 2, 3), "weight": torch.ones(3), "bias": torch.zeros(3), **change}
    with pytest.raises(error, match=message):
        norm_lif(**arguments)
