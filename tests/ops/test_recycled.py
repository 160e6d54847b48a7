"""What runs in memory that is used again has the bits, the gradients and the graphs of what it stands for."""

import pytest
import torch

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
    x, y = torch.randn(40, 50, 30).to(of), torch.randn(40, 50, 30).to(to)
    assert_same(with_gradients(lambda x: converted(x, to), x), with_gradients(lambda x: x.to(to), x))
    assert_same(with_gradients(added, x, y), with_gradients(torch.add, x, y))
    assert_same(with_gradients(added, x, y[:1]), with_gradients(torch.add, x, y[:1]))


def test_results_are_in_memory_that_is_used_again():
    x = torch.randn(300, 300)
    for run in (lambda: converted(x, torch.bfloat16), lambda: added(x, x)):
        first = run().data_ptr()
        assert run().data_ptr() == first


def test_they_compile_to_one_graph():
    x, weight = torch.randn(4, 8), torch.randn(3, 8)

    def all_three(x, weight):
        low = converted(x, torch.bfloat16)
        return added(linear(low, weight.bfloat16(), None), linear(low, weight.bfloat16(), None))

    compiled = torch.compile(all_three, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, weight), all_three(x, weight))


def test_a_sum_can_be_differentiated_twice():
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: added(x * x, x), (x,))
