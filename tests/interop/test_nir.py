"""NIR: our networks go out as spikingjelly's do, and come back with the same spikes."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spikingjelly.activation_based import neuron
from spikingjelly.activation_based.nir_exchange import export_to_nir
from torch import nn

from spikeattn import IF, LIF, ParametricLIF, SpikingMLP
from spikeattn.interop.nir import from_nir, to_nir

X = torch.randn(20, 3, 6, generator=torch.Generator().manual_seed(0)) * 3
CASES = [
    (LIF, neuron.LIFNode, {"tau": 3.3}),
    (LIF, neuron.LIFNode, {"tau": 20.0, "decay_input": False, "v_threshold": 0.7, "v_reset": -0.1}),
    (IF, neuron.IFNode, {"v_threshold": 1.5}),
    (ParametricLIF, neuron.ParametricLIFNode, {"init_tau": 3.3}),
    (ParametricLIF, neuron.ParametricLIFNode, {"init_tau": 1.7, "decay_input": False, "v_reset": 0.25}),
]
each = pytest.mark.parametrize(("cls", "twin", "options"), CASES)


def leak_of(cls):
    """The leak with which a neuron comes back as what it was."""
    return "learned" if cls is ParametricLIF else "fixed"


def network(cls, options):
    """Two layers of neurons."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 9), cls(**options), nn.Linear(9, 4, bias=False), cls(**options))
    nn.init.normal_(net[2].weight, 1.0, 2.0)  # so that the second layer fires
    return net


@each
@pytest.mark.parametrize("dt", [1e-4, 1e-3, 0.37])
def test_a_round_trip_through_a_file_keeps_the_spikes(cls, twin, options, dt, tmp_path):
    net = network(cls, options)
    to_nir(net, X, tmp_path / "net.nir", dt=dt)
    back = from_nir(tmp_path / "net.nir", dt=dt, leak=leak_of(cls))
    spikes = net(X)
    assert spikes.unique().tolist() == [0.0, 1.0]
    assert torch.equal(back(X)[0], spikes)
    assert sum(type(module) is cls for module in back.modules()) == 2


@each
def test_what_comes_back_can_be_streamed_and_stepped(cls, twin, options):
    net = network(cls, options)
    graph = to_nir(net, X)
    spikes = net(X)
    for back, pieces in (
        (from_nir(graph, leak=leak_of(cls)), X.split([7, 1, 12])),
        (from_nir(graph, leak=leak_of(cls), step_mode="s"), X),
    ):
        outs, state = [], None
        for piece in pieces:
            out, state = back(piece, state)
            outs.append(out.reshape(-1, *spikes.shape[1:]))
        assert torch.equal(torch.cat(outs), spikes)


@each
def test_the_graph_is_spikingjellys(cls, twin, options):
    ours = to_nir(network(cls, options), X, dt=1e-3)
    theirs = export_to_nir(network(twin, {**options, "step_mode": "m"}), X, dt=1e-3)
    assert ours.edges == theirs.edges
    assert list(ours.nodes) == list(theirs.nodes)
    for a, b in zip(ours.nodes.values(), theirs.nodes.values(), strict=True):
        assert type(a) is type(b)
        a, b = a.to_dict(), b.to_dict()
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_equal(a[key], b[key])


def test_units_are_seconds():
    node = to_nir(nn.Sequential(nn.Linear(6, 2), LIF(tau=20.0, v_threshold=0.5)), X, dt=1e-3).nodes["_1"]
    assert node.tau.tolist() == [0.02, 0.02]
    assert node.v_threshold.tolist() == [0.5, 0.5]
    assert node.r.tolist() == [1.0, 1.0]
    node = to_nir(nn.Sequential(nn.Linear(6, 2), IF()), X, dt=1e-3).nodes["_1"]
    assert node.r.tolist() == [1000.0, 1000.0]


def test_the_exported_network_stays_as_it_is():
    net = nn.Sequential(nn.Linear(6, 6), ParametricLIF(stateful=True))
    net(X)  # leaves a potential that hangs on a graph
    v = net[1].v.clone()
    to_nir(net, X)
    assert type(net[1]) is ParametricLIF
    assert torch.equal(net[1].v, v)


@settings(max_examples=40, deadline=None)
@given(
    tau=st.floats(1.01, 1e4), dt=st.sampled_from([1e-4, 1e-3, 0.1, 1 / 3]), cls=st.sampled_from([LIF, ParametricLIF])
)
def test_every_tau_comes_back_with_the_same_potentials(tau, dt, cls):
    x = torch.randn(8, 1, 4, generator=torch.Generator().manual_seed(1))
    net = nn.Sequential(nn.Linear(4, 4), cls(tau, decay_input=False))
    back = from_nir(to_nir(net, x, dt=dt), dt=dt, leak=leak_of(cls))
    spikes, state = back(x)
    expected, v, _ = net[1]._integrate(net[0](x), None)
    assert torch.equal(spikes, expected)
    (kept,) = next(value for value in state.values() if value is not None)
    assert torch.equal(kept, v)


def test_options_reach_the_neurons():
    graph = to_nir(nn.Sequential(nn.Linear(6, 2), LIF(), nn.Linear(2, 2), IF()), X)
    back = from_nir(graph, detach_reset=True, backend="torch", surrogate_function=torch.sigmoid)
    neurons = [module for module in back.modules() if isinstance(module, neuron.BaseNode)]
    assert [type(module) for module in neurons] == [LIF, IF]
    assert all(module.detach_reset and module.backend == "torch" for module in neurons)
    assert all(module.surrogate_function is torch.sigmoid for module in neurons)


def test_what_nir_cannot_say_is_refused():
    with pytest.raises(NotImplementedError, match="v_reset must be a number, got None in '1'"):
        to_nir(nn.Sequential(nn.Linear(6, 2), LIF(v_reset=None)), X)
    with pytest.raises(NotImplementedError, match="no node for LayerNorm"):
        to_nir(SpikingMLP(6), X)
    with pytest.raises(ValueError, match="tau must be finite, got inf in '1'"):
        to_nir(nn.Sequential(nn.Linear(6, 2), LIF(tau=float("inf"))), X)
    with pytest.raises(ValueError, match="leak must be"):
        from_nir(to_nir(network(LIF, {}), X), leak="none")
    with pytest.raises(ValueError, match="1 / dt"):
        from_nir(to_nir(network(IF, {}), X, dt=1e-3), dt=1e-4)


def test_a_missing_nir_is_named_with_the_cure(monkeypatch):
    for name in list(sys.modules):
        if name.startswith("spikingjelly.activation_based.nir_exchange"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "nir", None)
    from spikingjelly import activation_based

    monkeypatch.delattr(activation_based, "nir_exchange", raising=False)
    with pytest.raises(ImportError, match=r'NIR needs nir and nirtorch.*pip install "spikeattn\[nir\]"'):
        to_nir(nn.Sequential(LIF()), X)


def test_importing_loads_no_nir():
    code = "import sys, spikeattn, spikeattn.interop.nir, spikeattn.interop.spikingjelly; print('nir' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
