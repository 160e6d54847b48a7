"""What runs in memory that is used again has the bits, the gradients and the graphs of what it stands for."""

from functools import partial

import pytest
import torch
from torch.nn import functional

from spikeattn import _recycled
from spikeattn._cpu.memory import empty
from spikeattn._recycled import added, converted, linear

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def with_gradients(function, *inputs):
    own = [x.clone().requires_grad_() for x in inputs]
    out = function(*own)
    weight = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, own, weight)]


def assert_same(got, wanted):
    assert [x.dtype for x in got] == [x.dtype for x in wanted]
    assert all(map(torch.equal, got, wanted))


@pytest.mark.parametrize("to", DTYPES)
@pytest.mark.parametrize("of", DTYPES)
def test_conversions_and_sums_are_torchs(of, to):
    x, y = torch.randn(40, 150, 90).to(of), torch.randn(40, 150, 90).to(to)
    assert_same(with_gradients(lambda x: converted(x, to), x), with_gradients(lambda x: x.to(to), x))
    assert_same(with_gradients(added, x, y), with_gradients(torch.add, x, y))
    assert_same(with_gradients(added, x, y[:1]), with_gradients(torch.add, x, y[:1]))


def test_results_are_in_memory_that_is_used_again(monkeypatch):
    lent = []

    def lend(shape, dtype):
        lent.append(empty(shape, dtype))
        return lent[-1]

    monkeypatch.setattr(_recycled, "_empty", lend)
    x, weight = torch.randn(2000, 64), torch.randn(300, 64)
    low = converted(torch.randn(800, 800), torch.bfloat16)
    assert low.data_ptr() == lent.pop().data_ptr()
    assert added(low, low).data_ptr() == lent.pop().data_ptr()
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, None).data_ptr() == lent.pop().data_ptr()
    small = torch.randn(10, 10)
    added(small, small)
    assert not lent


def test_they_compile_to_one_graph():
    x, weight = torch.randn(2000, 8), torch.randn(300, 8)

    def all_three(x, weight):
        low = converted(x, torch.bfloat16)
        return added(linear(low, weight.bfloat16(), None), linear(low, weight.bfloat16(), None))

    compiled = torch.compile(all_three, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, weight), all_three(x, weight))


def bfloat16(*shape):
    return torch.randn(shape).bfloat16()


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_products_are_torchs_in_any_layout(layout, with_bias):
    x, weight, bias = bfloat16(20, 100, 64), bfloat16(300, 64), bfloat16(300)
    if layout == "transposed":
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    inputs = (x, weight, bias) if with_bias else (x, weight)
    function = linear if with_bias else partial(linear, bias=None)
    assert_same(with_gradients(function, *inputs), with_gradients(functional.linear, *inputs))


def test_what_is_differentiated_twice_or_in_batches_is_torchs():
    x, weight = bfloat16(2000, 64), bfloat16(300, 64)
    results = []
    for product in (partial(linear, bias=None), functional.linear):
        own = [y.clone().requires_grad_() for y in (x, weight)]
        y = product(*own)
        grads = torch.autograd.grad(y, own, torch.ones_like(y), create_graph=True)
        twice = torch.autograd.grad(grads[0].square().sum(), own[1], retain_graph=True)
        batch = torch.autograd.grad(y, own, torch.ones(3, *y.shape).bfloat16(), is_grads_batched=True)
        results.append([y, *grads, *twice, *batch])
    assert_same(*results)
    x = torch.randn(800, 800, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(added(x * x, x).sum(), x, create_graph=True)
    (twice,) = torch.autograd.grad(grad.sum(), x)
    assert torch.equal(twice, torch.full_like(twice, 2.0))


def test_other_devices_and_types_are_torchs():
    x, weight = torch.empty(2000, 64, device="meta"), torch.empty(300, 64, device="meta")
    assert linear(x, weight, None).shape == (2000, 300)
    assert added(x, x).device.type == "meta"
    ones = torch.ones(800, 800, dtype=torch.int64)
    assert torch.equal(added(ones, ones), ones + ones)


def test_a_default_device_is_not_that_of_results_in_memory():
    x = torch.randn(800, 800)
    with torch.device("meta"):
        assert empty((800, 800), torch.float32).device.type == "cpu"
        assert torch.equal(added(x, x), x + x)
