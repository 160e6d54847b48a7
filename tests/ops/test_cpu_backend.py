"""The CPU kernels of `lif`: the bits of the definition, and what calls of them promise."""

import logging

import numba
import numpy as np
import pytest
import torch
from cases import DYNAMICS, RATIONAL, SURROGATES, currents, ids
from hypothesis import given, settings
from hypothesis import strategies as st
from lif_helpers import results, run_python
from spikingjelly.activation_based import neuron
from spikingjelly.activation_based import surrogate as theirs

from spikeattn import LIF, ATan, BackendUnavailableError, CustomSurrogate, Rect, Sigmoid, backend_status, lif
from spikeattn._cpu import streams
from spikeattn._cpu.exponential import exp2
from spikeattn._cpu.neuron import F, derivative_row, surrogate_scalars
from spikeattn._cpu.storage import ELEMENT, load_row, store_row
from spikeattn.ops.lif import cpu

EXACT = {s.name for s in [*RATIONAL, Rect()]}


@pytest.mark.parametrize("dynamics", DYNAMICS, ids=ids)
@pytest.mark.parametrize("learned", [False, True])
def test_kernels_have_the_bits_of_the_definition(dynamics, learned):
    v_reset, detach_reset, decay_input, tau = dynamics
    options = {"v_reset": v_reset, "detach_reset": detach_reset, "decay_input": decay_input, "tau": tau}
    T, N = 9, 1051  # more than one block
    x, v0 = currents(T, N), torch.randn(N)
    for surrogate in SURROGATES:
        options |= {"surrogate": surrogate, "return_v_seq": True, "learned": learned}
        (outputs, grads), (wanted, wanted_grads) = (results(x, v0, b, **options) for b in ("numba", "torch"))
        assert all(map(torch.equal, outputs, wanted))
        for got, want in zip(grads[:2], wanted_grads[:2], strict=True):
            if surrogate.name in EXACT:
                assert torch.equal(got, want)
            else:  # exp: a slope differs by at most 4 ulp of its peak, at each of T steps
                assert (got - want).abs().max() <= 4 * 2**-23 * T * want.abs().max()
        if learned:  # a sum of T * N terms of the order of 1, in another order
            torch.testing.assert_close(grads[2], wanted_grads[2], rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("T", [1, 2, 3, 4, 8, 16, 33, 64])
def test_spikes_and_gradients_equal_spikingjellys_at_every_length(T):
    x, weight = currents(T, 3, 700), torch.randn(T, 3, 700)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    ours = lif(a, tau=10.0, surrogate=ATan(), backend="numba").spikes
    wanted = neuron.LIFNode(10.0, surrogate_function=theirs.ATan(), step_mode="m")(b)
    assert torch.equal(ours, wanted)
    (ours * weight).sum().backward()
    (wanted * weight).sum().backward()
    assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("surrogate", SURROGATES, ids=ids)
def test_slopes_are_torchs_within_their_bound(surrogate):
    h = torch.cat([torch.linspace(-40, 40, 20001), torch.randn(20000), torch.tensor([0.0, 1.0, 1e30, -1e30])])
    slope = torch.empty_like(h)
    kind, a, b = surrogate_scalars(surrogate.name, surrogate.alpha).values()
    derivative_row(kind, h.numpy(), F(1.0), F(a), F(b), slope.numpy())
    wanted = surrogate.derivative(h - 1.0)
    if surrogate.name in EXACT:
        assert torch.equal(slope, wanted)
    else:
        exact = surrogate.derivative((h - 1.0).double())
        assert (slope - exact).abs().max() <= 4 * 2**-23 * exact.max()


@given(
    T=st.integers(1, 12),
    shape=st.lists(st.integers(0, 6), min_size=0, max_size=3),
    layout=st.sampled_from(["contiguous", "static", "slice", "transposed", "every other"]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    soft=st.booleans(),
)
@settings(max_examples=80)
def test_any_shape_stride_and_dtype_gives_what_the_definition_gives(T, shape, layout, dtype, soft):
    x = currents(T, *shape, dtype=dtype)
    if layout == "static":
        x = x[:1].expand(T, *shape)
    elif layout == "slice":
        x = torch.cat([x, x], dim=-1)[..., : x.shape[-1]]
    elif layout == "transposed":
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    elif layout == "every other":
        x = torch.stack([x, x], dim=1)[:, 0]
    options = {"v_reset": None if soft else 0.0, "surrogate": ATan(), "return_v_seq": True}
    weight = torch.randn(x.shape)
    both = []
    for backend in ("numba", "torch"):
        leaf = x.detach().requires_grad_()
        out = lif(leaf * 1.0 if layout == "static" else leaf, backend=backend, **options)
        (out.spikes * weight).sum().backward()
        both.append((*out, leaf.grad))
    for got, want in zip(*both, strict=True):
        assert got.dtype == want.dtype
        assert torch.equal(got, want)


@pytest.mark.parametrize("T", [1023, 1024, 1025, 2500])
def test_long_sequences_in_segments_give_the_same_bits(T):
    x, v0 = currents(T, 70), torch.randn(70)
    ours, plain = (results(x, v0, b, tau=10.0, learned=True, surrogate=ATan()) for b in ("numba", "torch"))
    assert all(map(torch.equal, ours[0], plain[0]))
    assert all(map(torch.equal, ours[1][:2], plain[1][:2]))


@pytest.fixture
def streamed(monkeypatch):
    """Results of any size pass the caches by; a list of whether they did."""
    decisions = []

    def decide(result, row):
        decisions.append(streams.streams(result, row))
        return decisions[-1]

    monkeypatch.setattr(streams, "_LEAST", 0)
    monkeypatch.setattr(cpu, "streams", decide)
    return decisions


@pytest.mark.parametrize("dynamics", DYNAMICS, ids=ids)
def test_results_that_pass_the_caches_by_have_the_same_bits(dynamics, streamed, monkeypatch):
    v_reset, detach_reset, decay_input, tau = dynamics
    options = {
        "v_reset": v_reset,
        "detach_reset": detach_reset,
        "decay_input": decay_input,
        "tau": tau,
        "surrogate": ATan(),
    }
    monkeypatch.setattr(cpu, "_SEGMENT", 4)
    T, N = 9, 40_000  # blocks of two chunks, and a last one of a part of a chunk
    x, v0 = currents(T, N), torch.randn(N)
    for return_v_seq, learned in ((False, False), (True, False), (True, True)):
        options |= {"return_v_seq": return_v_seq, "learned": learned}
        (outputs, grads), (wanted, wanted_grads) = (results(x, v0, b, **options) for b in ("numba", "torch"))
        assert all(map(torch.equal, outputs, wanted))
        assert all(map(torch.equal, grads[:2], wanted_grads[:2]))
    for strided in (x[:1].expand(T, N), x[::2]):
        assert torch.equal(lif(strided, v0, backend="numba").spikes, lif(strided, v0, backend="torch").spikes)
    assert streamed == [True] * 8


def test_only_large_results_of_whole_cache_lines_pass_the_caches_by():
    whole = torch.empty(1 << 8, 1 << 14)  # 16 MiB
    assert streams.streams(whole, 1 << 14)
    assert not streams.streams(whole[1:], 1 << 14)
    assert not streams.streams(torch.empty(1 << 8, (1 << 14) + 8), (1 << 14) + 8)
    assert not streams.streams(torch.empty((1 << 22) + 16)[1:-15], 1 << 14)
    assert not streams.streams(whole.double(), 1 << 14)
    assert not streams.streams(torch.empty(1 << 9, 1 << 14, dtype=torch.bfloat16), 1 << 14)


def test_the_exponential_errs_by_one_ulp_and_ends_in_zero_before_subnormals():
    @numba.njit
    def powers(t, out):
        for i in range(t.size):
            out[i] = exp2(t[i])

    t = np.linspace(-125, 0, 1_000_001, dtype=np.float32)
    out = np.empty_like(t)
    powers(t, out)
    exact = np.exp2(t.astype(np.float64))
    assert (np.abs(out - exact) / exact).max() <= 2**-23
    assert out[-1] == 1
    t = np.array([-125.001, -149, -1e6, -3e38, -np.inf, np.nan], np.float32)
    out = np.empty_like(t)
    powers(t, out)
    np.testing.assert_array_equal(out, [0, 0, 0, 0, 0, np.nan])


@given(neurons=st.integers(0, 1 << 32), kept_steps=st.integers(1, 1024))
def test_a_block_is_narrow_enough_for_the_cache_and_the_threads(neurons, kept_steps):
    width = cpu.block_width(neurons, kept_steps)
    assert 64 <= width <= 2048
    assert width.bit_count() == 1
    if width > 64:
        assert width * kept_steps <= 1 << 17
        assert width * 32 <= neurons


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_storage_converts_every_number_like_torch(dtype):
    def bits(x):
        return x.view(torch.int16).numpy().view(ELEMENT[dtype])

    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    wide = torch.empty(every.shape)
    numba.njit(lambda row, buffer: load_row(row, buffer))(bits(every), wide.numpy())
    assert torch.equal(wide.nan_to_num(nan=0.5), every.float().nan_to_num(nan=0.5))
    finite = wide[wide.isfinite()].sort().values
    middles = (finite[1:] + finite[:-1]) / 2  # ties
    any_bits = torch.randint(-(2**31), 2**31, (200_000,)).to(torch.int32).view(torch.float32)
    numbers = torch.cat(
        [wide, middles, middles.nextafter(wide.new_tensor(9e9)), any_bits, torch.tensor([65519.0, 65520.0])]
    )
    narrow = torch.empty(numbers.shape, dtype=dtype)
    numba.njit(lambda row, buffer: store_row(row, buffer))(bits(narrow), numbers.numpy())
    wanted = numbers.to(dtype)
    assert torch.equal(narrow.isnan(), wanted.isnan())
    assert torch.equal(narrow.nan_to_num(nan=0.5), wanted.nan_to_num(nan=0.5))


def test_nothing_more_is_saved_than_the_inputs():
    x = currents(32, 40).requires_grad_()
    saved = lif(x, backend="numba").spikes.grad_fn.saved_tensors
    assert [None if s is None else s.untyped_storage().nbytes() for s in saved] == [32 * 40 * 4, None, None]
    with torch.no_grad():
        assert lif(x, backend="numba").spikes.grad_fn is None


def test_autocast_changes_nothing():
    x = currents(6, 40).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        inside = lif(x, backend="numba")
    assert torch.equal(inside.spikes.float(), lif(x.float(), backend="torch").spikes)
    assert torch.equal(inside.v, lif(x.float(), backend="torch").v)


def test_registered_ops_pass_opcheck():
    for r_tau in (None, torch.tensor(0.4, requires_grad=True)):
        x, v0 = currents(5, 6).requires_grad_(), torch.zeros(6, requires_grad=True)
        settings = (5, 2.0, True, 1.0, 0.0, False, "atan", 2.0)
        torch.library.opcheck(torch.ops.spikeattn.lif_forward.default, (x, v0, r_tau, *settings, True, "numba"))
        saved = [None if s is None else s.detach() for s in (x, v0, r_tau)]
        grads = (torch.randn(5, 6), torch.randn(6), torch.randn(5, 6))
        torch.library.opcheck(torch.ops.spikeattn.lif_backward.default, (*grads, *saved, *settings, "numba"))
        torch.library.opcheck(torch.ops.spikeattn.lif_forward.default, (x, None, r_tau, *settings, True, "numba"))
        at_rest = (grads[0], None, grads[2], saved[0], None, saved[2])
        torch.library.opcheck(torch.ops.spikeattn.lif_backward.default, (*at_rest, *settings, "numba"))


def test_compiles_to_one_graph_and_exports():
    x = currents(6, 10).requires_grad_()

    def loss(x):
        return (lif(x, tau=3.0, surrogate=ATan(), backend="numba").spikes * x.detach()).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert torch.equal(*torch.autograd.grad(loss(x), x), *torch.autograd.grad(compiled(x), x))
    module = torch.nn.Sequential(torch.nn.Linear(10, 4), LIF(backend="numba"))
    exported = torch.export.export(module, (x.detach(),)).module()
    assert torch.equal(exported(x.detach()), module(x.detach()))


BROKEN_SCRIPT = """
import logging, sys, torch
{breakage}
logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
from spikeattn import BackendUnavailableError, backend_status, lif
x = torch.full((3, 1), 2.0)
print(lif(x).spikes.flatten().tolist(), lif(x).spikes.flatten().tolist())
print(backend_status("cpu")[0])
try:
    lif(x, backend="numba")
except BackendUnavailableError as error:
    print("error:", error)
"""


@pytest.mark.parametrize("how", ["missing", "broken"])
def test_a_missing_or_broken_numba_costs_one_line_and_no_result(how, tmp_path):
    package = tmp_path / "numba"
    package.mkdir()
    (package / "__init__.py").write_text('raise OSError("libllvmlite.so: cannot open shared object file")')
    breakage = 'sys.modules["numba"] = None' if how == "missing" else f"sys.path.insert(0, {str(tmp_path)!r})"
    warning, values, status, error = run_python(BROKEN_SCRIPT.format(breakage=breakage)).splitlines()
    assert 'takes "torch" on cpu (numba: numba cannot be imported' in warning
    assert values == "[1.0, 1.0, 1.0] [1.0, 1.0, 1.0]"
    assert "usable=False" in status
    assert 'backend "numba" is not usable: numba cannot be imported' in error
    assert "pip install" in error
    assert ("libllvmlite" in error) == (how == "broken")


def test_status_says_that_numba_is_usable():
    numba, plain = backend_status("cpu")
    assert (numba.name, numba.usable) == ("numba", True)
    assert (plain.name, plain.usable) == ("torch", True)


def test_float64_runs_on_the_definition_and_never_on_a_named_kernel():
    x = currents(4, 5, dtype=torch.float64)
    assert torch.equal(lif(x).v, lif(x, backend="torch").v)
    with pytest.raises(BackendUnavailableError, match=r"numba.*float64 runs on the plain definition"):
        lif(x, backend="numba")


def cauchy(spelled=True):
    """A surrogate of a user's own."""
    import numpy as np

    one = np.float32(1.0)
    return CustomSurrogate(
        primitive=lambda x: torch.atan(x) / torch.pi + 0.5,
        derivative=lambda x: 1 / (1 + x * x),
        cuda="1.0f / (1.0f + x * x)",
        numba=(lambda x: one / (one + x * x)) if spelled else None,
    )


def test_a_users_surrogate_reaches_the_kernels():
    surrogate, x, v0 = cauchy(), currents(6, 1100), torch.randn(1100)
    ours, plain = (results(x, v0, b, surrogate=surrogate) for b in ("numba", "torch"))
    assert all(map(torch.equal, [*ours[0], *ours[1]], [*plain[0], *plain[1]]))
    assert not torch.equal(ours[1][0], results(x, v0, "numba", surrogate=Sigmoid())[1][0])
    with pytest.raises(AttributeError):
        surrogate.cuda = ""
    parts = (surrogate.primitive, surrogate.derivative, surrogate.cuda, surrogate.numba)
    assert CustomSurrogate(*parts) == surrogate


def test_a_users_surrogate_compiles_to_one_graph():
    surrogate, x = cauchy(), currents(6, 10).requires_grad_()

    def loss(x):
        return (lif(x, surrogate=surrogate, backend="numba").spikes * x.detach()).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert torch.equal(*torch.autograd.grad(loss(x), x), *torch.autograd.grad(compiled(x), x))


def test_a_users_surrogate_without_a_spelling_runs_on_the_definition_and_says_so_once(caplog, monkeypatch):
    monkeypatch.setattr("spikeattn._backends._said", set())
    surrogate, x, v0 = cauchy(spelled=False), currents(6, 30), torch.randn(30)
    with caplog.at_level(logging.INFO, "spikeattn"):
        auto, plain = (results(x, v0, b, surrogate=surrogate) for b in ("auto", "torch"))
        results(x, v0, "auto", surrogate=surrogate)
    assert all(map(torch.equal, [*auto[0], *auto[1]], [*plain[0], *plain[1]]))
    assert sum("no numba= spelling" in record.message for record in caplog.records) == 1
    with pytest.raises(BackendUnavailableError, match="no numba= spelling"):
        lif(x, surrogate=surrogate, backend="numba")
    with pytest.raises(BackendUnavailableError, match="CustomSurrogate reaches kernels"):
        lif(x, surrogate=lambda u: (u > 0).float(), backend="numba")


@pytest.mark.parametrize("parts", [(None, abs), (abs, 3), (abs, abs, 1), (abs, abs, None, "x")])
def test_parts_of_a_users_surrogate_are_checked(parts):
    with pytest.raises(TypeError, match="CustomSurrogate"):
        CustomSurrogate(*parts)
