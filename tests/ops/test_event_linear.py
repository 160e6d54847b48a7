"""`event_linear`: the bits of the sum in order, whoever else is in the batch; gradients; what is kept for them."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lif_helpers import run_python
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

import spikeattn
from spikeattn import BackendUnavailableError, EventLinear, event_linear
from spikeattn.ops.event_linear.cpu import DENSE
from spikeattn.ops.event_linear.op import unpacked

KINDS = ("spikes", "counts", "real")
# Rows, inputs, outputs: less and more than one tile, word, block and chunk, and none that fits exactly.
SIZES = [(1, 1, 1), (5, 3, 65), (100, 70, 130), (97, 64, 64), (1030, 129, 40)]
SHARES = [0.0, 0.1, DENSE - 0.1, DENSE + 0.1, 1.0]


def inputs(kind, rows, width, share=0.2):
    """Numbers of which ``share`` are not zero."""
    x = (torch.rand(rows, width) < share).float()
    if kind == "counts":
        x *= torch.randint(1, 3, x.shape)  # 1 and 2, whose products with a weight are exact
    return x * torch.randn(x.shape) if kind == "real" else x


def parameters(width, outputs):
    return torch.randn(outputs, width) / width**0.5, torch.randn(outputs)


def in_order(x, weight, bias):
    """The definition with the order of its sum: from the bias on, input after input."""
    total = bias.expand(x.shape[0], -1)
    for i in range(x.shape[1]):
        total = total + x[:, i, None] * weight[:, i]
    return total


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", ["spikes", "counts"])
def test_sums_of_spikes_have_the_bits_of_the_sum_in_order(kind, size, share):
    x, (weight, bias) = inputs(kind, *size[:2], share), parameters(*size[1:])
    assert torch.equal(event_linear(x, weight, bias, backend="numba"), in_order(x, weight, bias))
    without = event_linear(x, weight, backend="numba")
    assert torch.equal(without, in_order(x, weight, torch.zeros(size[2])))


@pytest.mark.parametrize("share", SHARES)
def test_real_inputs_err_no_more_than_a_sum_of_so_many_terms(share):
    x, (weight, bias) = inputs("real", 200, 300, share), parameters(300, 70)
    got = event_linear(x, weight, bias, backend="numba")
    exact = functional.linear(x.double(), weight.double(), bias.double())
    size = functional.linear(x.double().abs(), weight.double().abs(), bias.double().abs())
    assert ((got - exact).abs() <= 301 * 2**-24 * size).all()


@given(
    rows=st.integers(0, 120),
    width=st.integers(1, 140),
    outputs=st.integers(1, 140),
    share=st.floats(0, 1),
    kind=st.sampled_from(KINDS),
    threads=st.integers(1, 3),
    data=st.data(),
)
@settings(max_examples=60)
def test_a_row_gives_the_same_bits_alone_and_in_any_batch(rows, width, outputs, share, kind, threads, data):
    x, (weight, bias) = inputs(kind, rows, width, share), parameters(width, outputs)
    whole = event_linear(x, weight, bias, backend="numba")
    first = data.draw(st.integers(0, rows))
    last = data.draw(st.integers(first, rows))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        part = event_linear(x[first:last], weight, bias, backend="numba")
    finally:
        torch.set_num_threads(before)
    assert torch.equal(part, whole[first:last])
    dense = torch.cat([x, torch.ones(rows, width)])  # other neighbours, which are multiplied by another loop
    assert torch.equal(event_linear(dense, weight, bias, backend="numba")[:rows], whole)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_agree_with_float64(kind, size, share):
    tensors = [inputs(kind, *size[:2], share), *parameters(*size[1:])]
    grad = torch.randn(size[0], size[2])
    ours = [x.clone().requires_grad_() for x in tensors]
    exact = [x.double().requires_grad_() for x in tensors]
    event_linear(*ours, backend="numba").backward(grad)
    functional.linear(*exact).backward(grad.double())
    for own, wanted in zip(ours, exact, strict=True):
        torch.testing.assert_close(own.grad.double(), wanted.grad, rtol=1e-4, atol=1e-4)


def test_only_what_needs_a_gradient_gets_one():
    x, (weight, bias) = inputs("spikes", 9, 8), parameters(8, 7)
    event_linear(x, weight, bias.requires_grad_(), backend="numba").sum().backward()
    assert bias.grad.tolist() == [9.0] * 7
    leaf = x.clone().requires_grad_()
    event_linear(leaf, weight, backend="numba").sum().backward()
    torch.testing.assert_close(leaf.grad, weight.sum(0).expand(9, -1))
    with torch.no_grad():
        assert not event_linear(leaf, weight, bias).requires_grad


@pytest.mark.parametrize(("kind", "floats"), [("spikes", 100 // 32 + 1), ("counts", 100)])
def test_of_spikes_one_bit_each_is_kept(kind, floats):
    kept = []
    x, weight = inputs(kind, 4, 100, 0.5), torch.randn(3, 100, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        event_linear(x, weight, backend="numba")
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept if t is not weight}
    bits, tally = 4 * 2 * 8, 2 * 8
    assert sum(sizes.values()) == bits + tally + (0 if kind == "spikes" else 4 * floats * 4)


def test_bits_of_spikes_are_unpacked():
    x = inputs("spikes", 11, 130)
    _, fired, tally = torch.ops.spikeattn.event_linear_forward(x, torch.zeros(1, 130), None, True)
    assert torch.equal(unpacked(fired, 130), x)
    assert tally.tolist() == [int(x.sum()), 1]


def test_any_leading_axes_and_strides():
    x, (weight, bias) = inputs("spikes", 24, 10), parameters(10, 6)
    wanted = event_linear(x, weight, bias, backend="numba")
    strided = x.view(2, 3, 4, 10).transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(event_linear(strided, weight, bias), wanted.view(2, 3, 4, 6))
    assert torch.equal(event_linear(x[0], weight, bias), wanted[0])
    wide = torch.randn(6, 20)
    wide[:, ::2] = weight
    assert torch.equal(event_linear(x, wide[:, ::2], bias), wanted)


def test_other_dtypes_and_autocast_are_torchs():
    x, (weight, bias) = inputs("spikes", 9, 8), parameters(8, 7)
    wide = [t.double() for t in (x, weight, bias)]
    assert torch.equal(event_linear(*wide), functional.linear(*wide))
    with torch.autocast("cpu", torch.bfloat16):
        low = event_linear(x, weight, bias)
        assert low.dtype == torch.bfloat16
        assert torch.equal(low, functional.linear(x, weight, bias))
    with pytest.raises(BackendUnavailableError, match="only float32"):
        event_linear(*wide, backend="numba")


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_products_have_torchs_bits(dtype, autocast, with_bias):
    x, (weight, bias) = inputs("spikes", 6000, 256).view(30, 200, 256), parameters(256, 130)
    if not autocast:
        x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    grad = torch.randn(30, 200, 130).to(dtype)
    results = []
    for product in (event_linear, functional.linear):
        own = [y.clone().requires_grad_() for y in ((x, weight, bias) if with_bias else (x, weight))]
        with torch.autocast("cpu", dtype, enabled=autocast):
            y = product(*own)
        results.append((y.detach().clone(), *torch.autograd.grad(y, own, grad)))
    assert all(got.dtype == want.dtype and torch.equal(got, want) for got, want in zip(*results, strict=True))


def test_nan_and_infinity_of_an_input_arrive():
    x, weight = torch.tensor([[0.0, float("nan")], [float("inf"), 0.0], [0.0, 0.0]]), torch.ones(1, 2)
    out = event_linear(x, weight, backend="numba").flatten()
    assert out[0].isnan()
    assert out[1:].tolist() == [float("inf"), 0.0]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(2, 3), torch.ones(4, 5)), ValueError, r"got \(2, 3\) and \(4, 5\)"),
        ((torch.tensor(1.0), torch.ones(4, 1)), ValueError, r"got \(\) and \(4, 1\)"),
        ((torch.ones(2, 3), torch.ones(4, 3), torch.ones(3)), ValueError, r"bias must have shape \(4,\), got \(3,\)"),
        ((torch.ones(2, 3).long(), torch.ones(4, 3)), TypeError, "got torch.int64"),
        ((torch.ones(2, 3).half(), torch.ones(4, 3)), TypeError, "weight must be torch.float16 .* got torch.float32"),
        ((torch.ones(2, 3), torch.ones(4, 3, device="meta")), ValueError, "on the device of x, cpu, got meta"),
    ],
)
def test_bad_input_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        event_linear(*arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_registered_ops_pass_opcheck(kind):
    x, (weight, bias) = inputs(kind, 9, 70), parameters(70, 7)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    torch.library.opcheck(torch.ops.spikeattn.event_linear_forward.default, (*leaves, True))
    _, fired, tally = torch.ops.spikeattn.event_linear_forward(x, weight, bias, True)
    arguments = (torch.randn(9, 7), x, fired, tally, weight)
    torch.library.opcheck(torch.ops.spikeattn.event_linear_backward.default, (*arguments, True, True))


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_and_exports(kind):
    layer, x = EventLinear(70, 7), inputs(kind, 9, 70)
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True)
    compiled(x).square().sum().backward()
    layer(x).square().sum().backward()
    assert torch.equal(compiled(x), layer(x))
    assert torch.equal(compiled.weight.grad, layer.weight.grad)
    exported = torch.export.export(layer, (x,))
    assert torch.equal(exported.module()(x), layer(x))


def test_the_layer_has_the_state_of_torchs():
    torch.manual_seed(0)
    ours = EventLinear(8, 3)
    torch.manual_seed(0)
    theirs = nn.Linear(8, 3)
    assert all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))
    ours.load_state_dict(theirs.state_dict())
    assert EventLinear(8, 3, bias=False).bias is None


def test_a_layer_of_named_backend_says_so_to_its_products():
    named = spikeattn.SpikingSelfAttention(8, num_heads=2, backend="torch")
    assert {m.backend for m in named.modules() if isinstance(m, EventLinear)} == {"torch"}
    assert {m.backend for m in spikeattn.SpikingMLP(8).modules() if isinstance(m, EventLinear)} == {"auto"}


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_another_default_dtype_changes_nothing(default):
    x, (weight, bias) = inputs("spikes", 40, 200), parameters(200, 65)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    grad = torch.randn(40, 65)
    wanted = event_linear(*leaves, backend="numba")
    wanted_grads = torch.autograd.grad(wanted, leaves, grad)
    torch.set_default_dtype(default)
    try:
        got = event_linear(*leaves, backend="numba")
        grads = torch.autograd.grad(got, leaves, grad)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got, wanted)
    assert all(map(torch.equal, grads, wanted_grads))


@pytest.mark.parametrize("size", [(3, 0, 4), (3, 5, 0), (0, 5, 4)], ids=str)
def test_nothing_to_sum_is_torchs(size):
    x, (weight, bias) = torch.zeros(size[:2]), (torch.zeros(size[2], size[1]), torch.randn(size[2]))
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    out = event_linear(*leaves, backend="numba")
    assert torch.equal(out, functional.linear(x, weight, bias))
    out.sum().backward()
    assert [t.grad.shape for t in leaves] == [t.shape for t in leaves]


def test_an_exported_layer_takes_any_strides():
    layer, x = EventLinear(70, 9), inputs("spikes", 40, 70)
    exported = torch.export.export(layer, (x,)).module()
    assert torch.equal(exported(x.t().contiguous().t()), layer(x))


def test_fake_tensors_pass_with_gradients():
    with FakeTensorMode():
        layer = EventLinear(70, 9)
        out = layer(torch.zeros(4, 70, requires_grad=True))
        spikes = torch.zeros(4, 2, 2, 3, 16, requires_grad=True)
        attended = spikeattn.spiking_attention(spikes, spikes, spikes)
    assert out.shape == (4, 9)
    assert attended.shape == spikes.shape


def test_it_runs_in_a_forked_process():
    code = """
import os, sys, torch
from spikeattn import EventLinear
torch.set_num_threads(2)
layer, x = EventLinear(300, 200), (torch.rand(64, 300) < 0.2).float()
with torch.no_grad():
    wanted = layer(x)
    pid = os.fork()
    if pid == 0:
        os._exit(0 if torch.equal(layer(x), wanted) else 3)
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    assert run_python(code) == ""
