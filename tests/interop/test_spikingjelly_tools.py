"""spikingjelly's reset_net, set_step_mode and monitors give right answers on our neurons."""

import pytest
import torch
from spikingjelly.activation_based import functional, monitor, neuron
from torch import nn

import spikeattn
from spikeattn import IF, LIF, ParametricLIF

# A constant current of 1.5: charged by half of it a step, LIF goes 0.75, 1.125; IF fires at every step.
X = torch.full((4, 1), 1.5)
LIF_SPIKES, LIF_V = [0.0, 1.0, 0.0, 1.0], [0.75, 0.0, 0.75, 0.0]
IF_SPIKES, IF_V = [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]
CASES = [(LIF, LIF_SPIKES, LIF_V), (IF, IF_SPIKES, IF_V), (ParametricLIF, LIF_SPIKES, LIF_V)]
TWINS = [(LIF, neuron.LIFNode), (IF, neuron.IFNode), (ParametricLIF, neuron.ParametricLIFNode)]
each_case = pytest.mark.parametrize(("cls", "spikes", "v"), CASES)
each_twin = pytest.mark.parametrize(("cls", "twin"), TWINS)


@each_case
def test_output_monitor_records_the_spikes_of_each_call(cls, spikes, v):
    net = nn.Sequential(nn.Identity(), cls())
    with monitor.OutputMonitor(net, instance=cls) as outputs:
        net(X)
        net(0 * X)
        assert outputs.monitored_layers == ["1"]
        assert [record.flatten().tolist() for record in outputs["1"]] == [spikes, [0.0] * 4]
        outputs.disable()
        net(X)
        assert len(outputs.records) == 2


def test_base_node_finds_our_neurons():
    net = nn.Sequential(LIF(), IF(), ParametricLIF())
    with monitor.OutputMonitor(net, neuron.BaseNode, lambda spikes: spikes.mean().item()) as rates:
        net(X)
    assert rates.monitored_layers == ["0", "1", "2"]
    assert rates.records == [0.5, 0.5, 0.0]  # the last is charged to 0.5, then 0.25, then 0.625


def test_output_monitor_sees_the_fused_neurons_of_a_block():
    block = spikeattn.SpikingMLP(4)
    with monitor.OutputMonitor(block, neuron.BaseNode) as outputs:
        out = block(torch.randn(3, 2, 5, 4))
        assert outputs.monitored_layers == ["fc1.lif", "fc2.lif"]
        assert torch.equal(outputs["fc2.lif"][0], out)


@each_case
def test_attribute_monitor_records_every_potential(cls, spikes, v):
    net = nn.Sequential(cls(store_v_seq=True))
    with monitor.AttributeMonitor("v_seq", pre_forward=False, net=net, instance=cls) as potentials:
        net(X)
        assert [record.flatten().tolist() for record in potentials.records] == [v]


@each_case
def test_attribute_monitor_follows_a_stream(cls, spikes, v):
    net = nn.Sequential(cls(stateful=True))
    before = monitor.AttributeMonitor("v", pre_forward=True, net=net, instance=cls)
    after = monitor.AttributeMonitor("v", pre_forward=False, net=net, instance=cls)
    fired = [net(x.unsqueeze(0)).item() for x in X]  # one step a call
    assert fired == spikes
    assert [record.item() for record in after.records] == v
    assert [record.item() if isinstance(record, torch.Tensor) else record for record in before.records] == [
        0.0,
        *v[:-1],
    ]


@each_case
def test_reset_net_starts_a_stream_anew(cls, spikes, v):
    net = nn.Sequential(cls(stateful=True, store_v_seq=True))
    first = net(X[:1])
    assert net[0].v.item() == v[0]
    functional.reset_net(net)
    assert net[0].v == 0.0
    assert net[0].v_seq is None
    assert torch.equal(net(X[:1]), first)
    assert net(X[1:2]).item() == spikes[1]  # and goes on from there


@each_case
def test_a_stateless_net_needs_no_reset(cls, spikes, v):
    net = nn.Sequential(cls())
    assert net(X[:3]).flatten().tolist() == net(X[:3]).flatten().tolist() == spikes[:3]
    assert net[0].v == 0.0


@each_case
def test_set_step_mode_steps_through_the_same_spikes(cls, spikes, v):
    net = nn.Sequential(cls())
    functional.set_step_mode(net, "s")
    assert net[0].step_mode == "s"
    assert [net(x).item() for x in X] == spikes
    assert net[0].v.item() == v[-1]
    functional.reset_net(net)
    assert net(X[0]).item() == spikes[0]
    functional.set_step_mode(net, "m")
    assert net(X).flatten().tolist() == spikes  # all steps at once start from rest


@each_twin
def test_a_stream_in_pieces_is_the_twins(cls, twin):
    x = torch.randn(12, 3, 7) * 2
    ours, theirs = cls(stateful=True, v_reset=None), twin(step_mode="m", v_reset=None)
    for piece in x.split([5, 1, 4, 2]):
        assert torch.equal(ours(piece), theirs(piece))
        assert torch.equal(ours.v, theirs.v)
    functional.detach_net(ours)
    assert torch.equal(ours(x), theirs(x))


@each_twin
def test_monitors_record_what_they_record_of_the_twin(cls, twin):
    x = torch.randn(6, 3, 7) * 2
    records = []
    for node in (cls(store_v_seq=True), twin(step_mode="m", store_v_seq=True)):
        net = nn.Sequential(node)
        spikes = monitor.OutputMonitor(net, neuron.BaseNode)
        inputs = monitor.InputMonitor(net, neuron.BaseNode)
        potentials = monitor.AttributeMonitor("v_seq", False, net, neuron.BaseNode)
        net(x)
        records.append((inputs.records[0], spikes.records[0], potentials.records[0]))
    for a, b in zip(*records, strict=True):
        assert torch.equal(a, b)
