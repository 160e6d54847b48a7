"""LIF, IF and ParametricLIF as modules: spikingjelly's arguments, and its contracts for state."""

import copy
import inspect

import pytest
import torch
from cases import currents
from spikingjelly.activation_based import functional, monitor, neuron, surrogate

from spikeattn import IF, LIF, ATan, ParametricLIF, Spike, firing_rates

PAIRS = [(LIF, neuron.LIFNode), (IF, neuron.IFNode), (ParametricLIF, neuron.ParametricLIFNode)]


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_arguments_and_defaults_are_spikingjellys(ours, theirs):
    own, other = (inspect.signature(cls.__init__).parameters for cls in (ours, theirs))
    assert list(own)[: len(other)] == list(other)
    for name, parameter in other.items():
        if name == "surrogate_function":
            assert own[name].default.alpha == parameter.default.alpha == 4.0
        elif name == "step_mode":
            assert (own[name].default, parameter.default) == ("m", "s")
        else:
            assert own[name].default == parameter.default
    assert [own[name].default for name in ("stateful", "backend")] == [False, "auto"]


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
@pytest.mark.parametrize("v_reset", [0.0, 0.25, None])
def test_spikes_and_gradients_equal_spikingjellys(ours, theirs, v_reset):
    x, weight = currents(20, 3, 40), torch.randn(20, 3, 40)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    own = ours(v_reset=v_reset, surrogate_function=ATan(), detach_reset=True)
    other = theirs(v_reset=v_reset, surrogate_function=surrogate.ATan(), detach_reset=True, step_mode="m")
    mine, wanted = own(a), other(b)
    assert torch.equal(mine, wanted)
    (mine * weight).sum().backward()
    (wanted * weight).sum().backward()
    if ours is ParametricLIF:
        torch.testing.assert_close(own.w.grad, other.w.grad, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(a.grad, b.grad)
    else:
        assert torch.equal(a.grad, b.grad)


def test_spikingjellys_surrogates_and_whole_numbers_are_accepted():
    layer = LIF(tau=3, v_threshold=2, v_reset=0, surrogate_function=surrogate.ATan())
    assert torch.equal(layer(currents(20, 50)).unique(), torch.tensor([0.0, 1.0]))
    assert neuron.LIFNode(surrogate_function=ATan(), step_mode="m")(currents(4, 5)).shape == (4, 5)


def test_a_stateless_layer_forgets_and_a_stateful_one_goes_on():
    x = currents(8, 10)
    forgetful, streaming = LIF(tau=10.0), LIF(tau=10.0, stateful=True)
    assert torch.equal(forgetful(x), forgetful(x))
    assert forgetful.v == 0.0
    parts = torch.cat([streaming(x[:3]), streaming(x[3:])])
    assert torch.equal(parts, forgetful(x))
    functional.reset_net(streaming)
    assert streaming.v == 0.0
    assert torch.equal(streaming(x), forgetful(x))


def test_single_step_mode_is_multi_step_mode_one_step_at_a_time():
    x = currents(6, 4)
    layer = LIF(tau=3.0, store_v_seq=True)
    whole, v_seq = layer(x), layer.v_seq
    functional.reset_net(layer)
    functional.set_step_mode(layer, "s")
    assert torch.equal(torch.stack([layer(x_t) for x_t in x]), whole)
    assert torch.equal(layer.v_seq, v_seq)


def test_a_kept_potential_of_another_shape_is_an_error():
    layer = LIF(stateful=True)
    layer(torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"shape \(4,\), but this input needs \(5,\).*reset_net"):
        layer(torch.zeros(2, 5))


def test_state_is_float32_under_16_bit_inputs_and_not_in_the_state_dict():
    layer = LIF(stateful=True)
    layer(currents(3, 4).bfloat16())
    assert layer.v.dtype == torch.float32
    assert layer.state_dict() == {}
    assert copy.deepcopy(layer).v.shape == (4,)


def test_functional_forward_takes_and_returns_the_state():
    layer = LIF(tau=3.0)
    x = currents(5, 4)
    (spikes,), (v,) = layer.functional_forward((x,), (0.0,))
    assert torch.equal(spikes, layer(x))
    assert v.shape == (4,)
    assert layer.v == 0.0


def test_spikingjellys_monitor_records_our_spikes():
    net = torch.nn.Sequential(torch.nn.Identity(), LIF())
    records = monitor.OutputMonitor(net, neuron.BaseNode)
    out = net(currents(4, 3))
    assert torch.equal(records["1"][0], out)


def test_parametric_time_constant_learns():
    layer = ParametricLIF(init_tau=4.0)
    assert layer.w.item() == pytest.approx(-1.0986123)
    layer(currents(8, 20)).sum().backward()
    assert layer.w.grad.abs() > 0
    assert "tau=4" in repr(layer)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LIF(tau=1.0), "LIF: tau must be > 1"),
        (lambda: LIF(v_threshold=-1.0), "v_threshold must be above v_reset"),
        (lambda: ParametricLIF(init_tau=0.5), "init_tau must be > 1"),
        (lambda: ParametricLIF(init_tau=float("inf")), "must be finite"),
        (lambda: LIF(step_mode="x"), "step_mode"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_firing_rates_count_spikes_by_name_also_of_spikingjellys_neurons():
    net = torch.nn.Sequential(Spike(), neuron.IFNode(step_mode="m"), torch.nn.Identity())
    x = torch.tensor([[1.0, -1.0], [1.0, -1.0]])
    assert firing_rates(net, x) == {"0": 0.5, "1": 0.5}


def test_firing_rates_average_over_calls_and_clean_up():
    layer = Spike()

    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x), self.layer(-x - 1)

    assert firing_rates(Twice(), torch.tensor([1.0, 2.0, 3.0, -4.0])) == {"layer": 0.5}
    assert not layer._forward_hooks
