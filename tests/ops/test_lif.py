"""`lif`: numbers computed by hand, its gradient against float64 autograd, and spikingjelly as an oracle."""

import logging
import math

import pytest
import torch
from cases import DYNAMICS, RATIONAL, SIZES, SURROGATES, currents, ids
from hypothesis import given
from hypothesis import strategies as st
from spikingjelly.activation_based import neuron
from spikingjelly.activation_based import surrogate as theirs

from spikeattn import ATan, BackendUnavailableError, Sigmoid, lif
from spikeattn.ops.lif.op import integrate
from spikeattn.ops.lif.reference import lif_backward_reference, lif_reference


def test_three_steps_by_hand_with_hard_reset():
    # H: 1 -> 0.5 | 0.5 + (2 - 0.5) / 2 = 1.25 fires | 0 + 1 / 2 = 0.5
    spikes, v, v_seq = lif(torch.tensor([[1.0], [2.0], [1.0]]), tau=2.0, return_v_seq=True)
    assert spikes.flatten().tolist() == [0.0, 1.0, 0.0]
    assert v_seq.flatten().tolist() == [0.5, 0.0, 0.5]
    assert v.tolist() == [0.5]


def test_three_steps_by_hand_with_soft_reset():
    # 0.5 | 1.25 fires, 0.25 stays | 0.25 + (1 - 0.25) / 2 = 0.625
    spikes, v, v_seq = lif(torch.tensor([[1.0], [2.0], [1.0]]), tau=2.0, v_reset=None, return_v_seq=True)
    assert spikes.flatten().tolist() == [0.0, 1.0, 0.0]
    assert v_seq.flatten().tolist() == [0.5, 0.25, 0.625]
    assert v.tolist() == [0.625]


def test_input_that_does_not_decay_by_hand():
    # 0 - 0 / 4 + 0.75 = 0.75 | 0.75 - 0.75 / 4 + 0.75 = 1.3125 fires
    spikes, v, _ = lif(torch.tensor([[0.75], [0.75]]), tau=4.0, decay_input=False)
    assert spikes.flatten().tolist() == [0.0, 1.0]
    assert v.tolist() == [0.0]


def test_forward_fires_at_equality():
    assert lif(torch.tensor([[2.0]]), tau=2.0).spikes.item() == 1.0
    below = torch.nextafter(torch.tensor(2.0), torch.tensor(0.0))
    assert lif(below.reshape(1, 1), tau=2.0).spikes.item() == 0.0


def test_a_neuron_that_never_and_one_that_always_fires():
    spikes = lif(torch.tensor([0.9, 2.0]).expand(50, 2)).spikes
    assert spikes.sum(0).tolist() == [0.0, 50.0]


def test_initial_potential_is_used_and_reset_is_the_default():
    x = torch.zeros(1, 1)
    assert lif(x, torch.tensor([3.0])).spikes.item() == 1.0
    assert lif(x, v_reset=0.5, v_threshold=1.0).v.item() == 0.5


@pytest.mark.parametrize("dynamics", DYNAMICS, ids=ids)
@pytest.mark.parametrize("surrogate", RATIONAL, ids=ids)
def test_spikes_and_gradients_equal_spikingjellys_bit_for_bit(dynamics, surrogate):
    v_reset, detach_reset, decay_input, tau = dynamics
    for T, N in SIZES:
        x, weight = currents(T, N), torch.randn(T, N)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        ours = lif(a, tau=tau, decay_input=decay_input, v_reset=v_reset, detach_reset=detach_reset, surrogate=surrogate)
        oracle = neuron.LIFNode(
            tau, decay_input, 1.0, v_reset, getattr(theirs, type(surrogate).__name__)(), detach_reset, "m"
        )
        spikes = oracle(b)
        assert torch.equal(ours.spikes, spikes)
        assert torch.equal(ours.v, oracle.v)
        (ours.spikes * weight).sum().backward()
        (spikes * weight).sum().backward()
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("T", [1, 2, 3, 4, 8, 16, 33, 64])
def test_spikes_equal_spikingjellys_at_every_length(T):
    x = currents(T, 3, 5)
    assert torch.equal(lif(x, tau=10.0).spikes, neuron.LIFNode(10.0, step_mode="m")(x))
    assert torch.equal(lif(x, tau=math.inf, decay_input=False).spikes, neuron.IFNode(step_mode="m")(x))


@pytest.mark.parametrize("dynamics", DYNAMICS, ids=ids)
@pytest.mark.parametrize("surrogate", SURROGATES, ids=ids)
def test_analytic_backward_is_autograd_of_the_definition_in_float64(dynamics, surrogate):
    v_reset, detach_reset, decay_input, tau = dynamics
    for as_tensor in (False, True):
        x = currents(6, 11, dtype=torch.float64).requires_grad_()
        v0 = torch.randn(11, dtype=torch.float64, requires_grad=True)
        r_tau = torch.tensor(1 / tau, dtype=torch.float64, requires_grad=True) if as_tensor else None
        inputs = (x, v0, *([r_tau] if as_tensor else []))
        settings = (6, tau, decay_input, 1.0, v_reset, detach_reset)
        outputs = lif_reference(x, v0, r_tau, *settings, surrogate, True)
        weights = [torch.randn_like(out) for out in outputs]
        wanted = torch.autograd.grad(outputs, inputs, weights)
        with torch.no_grad():
            got = lif_backward_reference(*weights, x, v0, r_tau, *settings, surrogate)
        for a, b in zip(wanted, got, strict=False):
            torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("v_reset", [0.0, 0.25, None])
@pytest.mark.parametrize("detach_reset", [True, False])
def test_definition_with_the_smooth_primitive_passes_gradcheck(v_reset, detach_reset):
    # With a detached reset the numerical derivative sees what autograd must not: only T = 1 can agree.
    T = 1 if detach_reset else 4
    x = (torch.randn(T, 5, dtype=torch.float64) * 3).requires_grad_()
    v0 = torch.randn(5, dtype=torch.float64, requires_grad=True)
    r_tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def smooth(x, v0, r_tau):
        return lif_reference(x, v0, r_tau, T, 1.0, True, 1.0, v_reset, detach_reset, ATan().primitive)[0]

    assert torch.autograd.gradcheck(smooth, (x, v0, r_tau))


def test_only_gradients_that_are_needed_are_computed():
    x, v0 = currents(4, 3), torch.zeros(3, requires_grad=True)
    spikes, v, _ = lif(x, v0)
    (spikes.sum() + v.sum()).backward()
    assert x.grad is None
    assert v0.grad.shape == (3,)
    assert not lif(x, v0.detach()).spikes.requires_grad


def test_gradient_of_tau_moves_the_loss_where_it_points():
    x = currents(16, 200, dtype=torch.float64)
    tau = torch.tensor(4.0, dtype=torch.float64, requires_grad=True)
    smooth = lambda t: lif(x, tau=t, surrogate=Sigmoid().primitive).spikes.sum()  # noqa: E731
    smooth(tau).backward()
    step = 1e-6
    numeric = (smooth(tau.detach() + step) - smooth(tau.detach() - step)) / (2 * step)
    assert tau.grad.item() == pytest.approx(numeric.item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_results_are_the_float32_results_rounded_once(dtype, poisoned):
    x = currents(12, 40).to(dtype)
    weight = torch.randn(12, 40).to(dtype)
    a, b = x.clone().requires_grad_(), x.float().requires_grad_()
    low, full = lif(a, tau=10.0, surrogate=ATan()), lif(b, tau=10.0, surrogate=ATan())
    assert low.spikes.dtype == dtype
    assert low.v.dtype == torch.float32
    assert torch.equal(low.spikes.float(), full.spikes)
    assert torch.equal(low.v, full.v)
    (low.spikes * weight).sum().backward()
    (full.spikes * weight.float()).sum().backward()
    assert torch.equal(a.grad, b.grad.to(dtype))


@given(
    T=st.integers(1, 12),
    shape=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    layout=st.sampled_from(["contiguous", "static", "slice", "transposed"]),
)
def test_strides_never_change_a_result(T, shape, layout):
    x = currents(T, *shape)
    if layout == "static":
        x = x[:1].expand(T, *shape)
    elif layout == "slice":
        x = torch.cat([x, x], dim=-1)[..., : shape[-1]]
    elif layout == "transposed":
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    a, b = x.detach().requires_grad_(), x.clone(memory_format=torch.contiguous_format).requires_grad_()
    ours, plain = lif(a, tau=3.0), lif(b, tau=3.0)
    assert torch.equal(ours.spikes, plain.spikes)
    assert torch.equal(ours.v, plain.v)
    ours.spikes.sum().backward()
    plain.spikes.sum().backward()
    assert torch.equal(a.grad, b.grad)


def test_a_static_input_is_read_once_and_gets_the_sum_of_its_gradients():
    one = currents(1, 40)[0]
    for T in (1, 2, 7, 32):
        weight = torch.randn(T, 40)
        a, b = one.clone().requires_grad_(), one.clone().requires_grad_()
        static, repeated = lif(a.expand(T, 40), surrogate=ATan()), lif(torch.stack([b] * T), surrogate=ATan())
        assert torch.equal(static.spikes, repeated.spikes)
        assert torch.equal(static.v, repeated.v)
        (static.spikes * weight).sum().backward()
        (repeated.spikes * weight).sum().backward()
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6)
    saved = lif(a.expand(32, 40), surrogate=ATan()).spikes.grad_fn.saved_tensors[0]
    assert saved.shape == (1, 40)


@given(T=st.integers(2, 16), cut=st.integers(1, 15))
def test_two_calls_in_a_row_equal_one(T, cut):
    cut = min(cut, T - 1)
    x = currents(T, 7)
    whole = lif(x, return_v_seq=True)
    first = lif(x[:cut], return_v_seq=True)
    second = lif(x[cut:], first.v, return_v_seq=True)
    assert torch.equal(torch.cat([first.spikes, second.spikes]), whole.spikes)
    assert torch.equal(torch.cat([first.v_seq, second.v_seq]), whole.v_seq)
    assert torch.equal(second.v, whole.v)


def test_registered_ops_pass_opcheck():
    for r_tau in (None, torch.tensor(0.4, requires_grad=True)):
        for v_seq in (False, True):
            x, v0 = currents(5, 6).requires_grad_(), torch.zeros(6, requires_grad=True)
            settings = (5, 2.0, True, 1.0, 0.0, False, "atan", 2.0)
            torch.library.opcheck(torch.ops.spikeattn.lif_forward.default, (x, v0, r_tau, *settings, v_seq, "torch"))
            grads = (torch.randn(5, 6), torch.randn(6), torch.randn(5, 6) if v_seq else None)
            saved = [None if s is None else s.detach() for s in (x, v0, r_tau)]
            torch.library.opcheck(torch.ops.spikeattn.lif_backward.default, (*grads, *saved, *settings, "torch"))
            torch.library.opcheck(torch.ops.spikeattn.lif_forward.default, (x, None, r_tau, *settings, v_seq, "torch"))
            at_rest = (grads[0], None, grads[2], saved[0], None, saved[2])
            torch.library.opcheck(torch.ops.spikeattn.lif_backward.default, (*at_rest, *settings, "torch"))


def test_compiles_to_one_graph_with_the_same_result():
    x = currents(6, 10).requires_grad_()

    def loss(x):
        return (lif(x, tau=3.0, detach_reset=True).spikes * x.detach()).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (wanted,) = torch.autograd.grad(loss(x), x)
    (got,) = torch.autograd.grad(compiled(x), x)
    assert torch.equal(wanted, got)


def test_a_callable_surrogate_runs_on_the_definition(caplog):
    x = currents(4, 9).requires_grad_()

    class Mine:
        def __call__(self, u):
            return ATan()(u)

    with caplog.at_level(logging.INFO, "spikeattn"):
        own = lif(x, surrogate=Mine()).spikes
        lif(x, surrogate=Mine())
    assert sum("Mine" in record.message for record in caplog.records) == 1
    assert torch.equal(own, lif(x, surrogate=ATan()).spikes)


def test_nan_never_fires_and_stays_where_it_is():
    x = torch.tensor([[float("nan"), 3.0], [3.0, 3.0]])
    spikes, v, _ = lif(x)
    assert spikes.tolist() == [[0.0, 1.0], [0.0, 1.0]]
    assert v.isnan().tolist() == [True, False]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"x": torch.zeros(0, 3)}, r"T >= 1, got shape \(0, 3\)"),
        ({"x": torch.zeros(())}, r"T >= 1"),
        ({"x": torch.zeros(8, 110, 256), "v0": torch.zeros(256, 110)}, r"\(110, 256\), got \(256, 110\)"),
        ({"tau": 1.0}, r"tau must be > 1 time step, got 1.0"),
        ({"tau": float("nan")}, r"tau must be > 1"),
        ({"tau": torch.tensor(0.5)}, r"tau must be > 1 time step, got 0.5"),
        ({"tau": torch.tensor([2.0, 3.0])}, r"one element, got shape \(2,\)"),
        ({"v_threshold": 0.0}, r"v_threshold must be above v_reset"),
        ({"v_threshold": float("inf")}, r"must be finite"),
        ({"backend": "cuda"}, r"backend must be one of auto, torch, numba, cupy, got 'cuda'"),
    ],
)
def test_bad_input_is_named(kwargs, message):
    kwargs = {"x": torch.zeros(2, 3), **kwargs}
    with pytest.raises(ValueError, match=message):
        lif(kwargs.pop("x"), kwargs.pop("v0", None), **kwargs)


def test_what_is_no_tensor_is_refused():
    with pytest.raises(TypeError, match="x must be a tensor, got list"):
        lif([[1.0, 2.0]])


def test_integers_are_refused():
    with pytest.raises(TypeError, match="x must be float32"):
        integrate(torch.zeros(2, 3, dtype=torch.long), None, None, 2.0, True, 1.0, 0.0, True, ATan(), False, "auto")


def test_a_named_backend_never_falls_back():
    with pytest.raises(BackendUnavailableError, match='backend "cupy" is not usable: it does not run on cpu tensors'):
        lif(torch.zeros(2, 3), backend="cupy")


def test_auto_says_once_what_it_chose(caplog, monkeypatch):
    monkeypatch.setattr("spikeattn._backends._said", set())
    with caplog.at_level(logging.INFO, "spikeattn"):
        lif(torch.zeros(2, 3))
        lif(torch.zeros(2, 3))
    said = [record.message for record in caplog.records if "auto" in record.message]
    assert len(said) == 1
    assert '"numba" on cpu (fused CPU kernels)' in said[0]
