"""Attention fires inside its operation only for the neuron that it put there itself."""

import pytest
import torch

from spikeattn import IF, LIF, SpikingSelfAttention


class Silent(LIF):
    """A neuron of a user's own."""

    def multi_step_forward(self, x_seq, *args):
        return torch.zeros_like(x_seq)


def attention(neuron=None, **options):
    torch.manual_seed(0)
    module = SpikingSelfAttention(16, num_heads=2, **options)
    if neuron is not None:
        module.attn_lif = neuron
    return module


def outputs_of_neuron(module, x):
    seen = []
    handle = module.attn_lif.register_forward_hook(lambda module, args, out: seen.append(out))
    module(x)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("fire", ["output", "map"])
@pytest.mark.parametrize(
    "neuron",
    [LIF(4.0, decay_input=False, v_threshold=0.5), Silent(), IF(v_threshold=2.0), LIF(3.0, v_reset=None)],
    ids=["no decay", "own class", "IF", "soft reset"],
)
def test_a_neuron_put_in_the_place_of_its_own_is_the_one_that_fires(neuron, fire):
    x = torch.randn(6, 2, 5, 16) * 3
    module = attention(neuron, fire=fire)
    out = module(x)
    hooked = []
    handle = module.attn_lif.register_forward_hook(lambda *args: hooked.append(args))
    assert torch.equal(module(x), out)  # looking changes nothing
    handle.remove()
    assert len(hooked) == 1
    if isinstance(neuron, Silent):
        assert not outputs_of_neuron(module, x).any()


def test_a_backward_hook_on_the_neuron_is_called():
    module, calls = attention(), []
    module.attn_lif.register_full_backward_hook(lambda *args: calls.append(args))
    module(torch.randn(4, 1, 5, 16).requires_grad_()).sum().backward()
    assert len(calls) == 1


def test_a_stream_refuses_a_neuron_that_it_would_not_call():
    x = torch.randn(4, 1, 2, 16)
    with pytest.raises(ValueError, match="step fires a plain LIF"):
        attention(Silent(), is_causal=True).step(x)


def test_empty_batches_and_sequences_pass():
    for shape in ((4, 0, 6, 16), (4, 2, 0, 16)):
        assert attention()(torch.randn(shape)).shape == shape


def test_activation_checkpointing_gives_the_same_gradients():
    module, x = attention(), (torch.randn(4, 2, 5, 16) * 3).requires_grad_()
    kept = torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False)
    assert torch.equal(*(torch.autograd.grad(out.sum(), x)[0] for out in (kept, module(x))))


def test_the_alive_start_needs_a_leak():
    with pytest.raises(ValueError, match="needs a finite tau"):
        attention(tau=float("inf"))
    assert attention(tau=float("inf"), init="published")(torch.randn(2, 1, 3, 16)).shape == (2, 1, 3, 16)
