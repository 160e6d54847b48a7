"""Calls that pass PyTorch's dispatcher by, and those that must not."""

import threading

import pytest
import torch
from cases import currents
from torch.utils import _python_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

import spikeattn
from spikeattn import lif
from spikeattn._autograd import direct, watched


class Names(TorchDispatchMode):
    """Notes the operations that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def called():
    """An operation that says which way it was called."""
    ways = []

    @torch.library.custom_op("spikeattn_test::way", mutates_args=())
    def way(x: torch.Tensor) -> torch.Tensor:
        ways.append("run")
        return x.clone()

    function = way._init_fn
    way._init_fn = lambda x: ways.append("direct") or function(x)
    return direct(way), ways


def test_a_plain_call_is_direct_and_a_watched_one_is_not(called):
    way, ways = called
    with torch.no_grad():
        way(torch.zeros(2))
        way(torch.nn.Parameter(torch.zeros(2)))
    assert ways == ["direct", "run"] * 2
    ways.clear()
    way(torch.zeros(2))  # a gradient could be asked of it
    with torch.no_grad(), Names() as mode:
        way(torch.zeros(2))
    assert mode.names.count("spikeattn_test.way.default") == 1
    with torch.no_grad(), torch.device("cpu"):
        way(torch.zeros(2))
    with torch.no_grad():
        for x in (torch._neg_view(torch.ones(2)), torch._efficientzerotensor(2)):
            way(x)
    assert "direct" not in ways


def test_a_mode_is_seen_whatever_other_threads_do(monkeypatch):
    # PyTorch keeps flags for the whole process, and modes that overlap leave them set: put back after the test.
    for flag in [name for name in vars(_python_dispatch) if name.startswith("_is_in_")]:
        monkeypatch.setattr(_python_dispatch, flag, getattr(_python_dispatch, flag))
    inside, left = threading.Event(), threading.Event()

    def other():
        with Names():
            inside.set()
            left.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait(10)
    with torch.no_grad(), Names() as mode:
        left.set()
        thread.join()
        lif(currents(3, 4))
    assert "spikeattn.lif_forward.default" in mode.names
    monkeypatch.setattr(_python_dispatch, "_is_in_torch_dispatch_mode", True)
    assert not watched((torch.zeros(2),))  # else every call after such modes would take the way of a watched one


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_a_negative_view_and_a_zero_gradient_are_read_for_what_they_are(backend):
    x = currents(4, 5)
    with torch.no_grad():
        assert torch.equal(lif(torch._neg_view(x), backend=backend).spikes, lif(-x, backend=backend).spikes)
    x.requires_grad_()
    spikes = lif(x, backend=backend).spikes
    (grad,) = torch.autograd.grad(spikes, x, torch._efficientzerotensor(spikes.shape))
    assert torch.equal(grad, torch.zeros_like(x))


@pytest.mark.filterwarnings("ignore")  # a trace warns of every size that it takes for a constant
def test_a_trace_holds_the_operations():
    model, x = spikeattn.SpikingTransformerBlock(32, num_heads=2).eval(), torch.rand(3, 2, 5, 32)
    with torch.no_grad():
        traced, other = torch.jit.trace(model, x), torch.rand_like(x) * 3
        assert torch.equal(traced(other), model(other))


def test_a_default_device_does_not_reach_what_kernels_allocate():
    x = currents(4, 5)
    wanted = lif(x, backend="numba").spikes
    torch.set_default_device("meta")
    try:
        got = lif(x, backend="numba").spikes
    finally:
        torch.set_default_device(None)
    assert torch.equal(got, wanted)


def test_batched_gradients_are_those_of_each():
    x, weights = currents(4, 5).requires_grad_(), torch.randn(3, 4, 5)
    spikes = lif(x, backend="torch").spikes
    (batched,) = torch.autograd.grad(spikes, x, weights, is_grads_batched=True, retain_graph=True)
    for got, weight in zip(batched, weights, strict=True):
        torch.testing.assert_close(got, torch.autograd.grad(spikes, x, weight, retain_graph=True)[0])
