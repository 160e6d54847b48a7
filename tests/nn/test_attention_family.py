"""What all attention modules share: padding, a live start, learning, 16 bit, compilation, messages, options."""

import copy
import inspect

import pytest
import torch
from spikingjelly.activation_based.neuron import LIFNode

from spikeattn import (
    LIF,
    DualSpikeSelfAttention,
    QKAttention,
    SpatioTemporalAttention,
    SpikeDrivenSelfAttention,
    SpikingCrossAttention,
    SpikingSelfAttention,
    firing_rates,
)
from spikeattn.nn.projection import TokenBatchNorm

T, B, L, D, H = 4, 3, 6, 32, 4

# What is made by these arguments; cross-attention is given its own input as memory.
FAMILY = {
    "cross-output": (SpikingCrossAttention, {}),
    "cross-map": (SpikingCrossAttention, {"fire": "map"}),
    "driven-1": (SpikeDrivenSelfAttention, {"version": 1}),
    "driven-3": (SpikeDrivenSelfAttention, {"version": 3}),
    "qk-token": (QKAttention, {"kind": "token"}),
    "qk-channel": (QKAttention, {"kind": "channel"}),
    "chunks": (SpatioTemporalAttention, {"chunk": 2}),
    "dual": (DualSpikeSelfAttention, {}),
}
every_module = pytest.mark.parametrize("name", FAMILY)
both_norms = pytest.mark.parametrize("norm", ["layer", "batch"])


def make(name, **options):
    cls, own = FAMILY[name]
    return cls(D, H, **own, **options)


def call(module, x, mask=None):
    """``module`` of ``x``, as memory too where it takes one."""
    if isinstance(module, SpikingCrossAttention):
        return module(x, x, mask, mask)
    return module(x, mask)


def tokens(lengths, longest):
    """Random tokens, and the mask of their padding."""
    mask = torch.arange(longest) >= torch.tensor(lengths).unsqueeze(1)
    return torch.randn(T, len(lengths), longest, D, dtype=torch.float64), mask


def settled(module):
    """In evaluation, with running statistics as one batch leaves them, at which every layer goes on firing."""
    for part in module.modules():
        if isinstance(part, TokenBatchNorm):
            part.momentum = 1.0
    call(module.train(), tokens([9, 9, 9, 9], 9)[0])
    return module.eval()


@every_module
@both_norms
def test_padding_never_changes_a_token(name, norm):
    module = settled(make(name, norm=norm, dtype=torch.float64))
    lengths = [1, 4, 6]
    x, mask = tokens(lengths, 9)
    padded = call(module, x, mask)
    assert not padded[:, mask].any()
    assert padded[:, ~mask].any()
    for b, n in enumerate(lengths):
        assert torch.equal(padded[:, b : b + 1, :n], call(module, x[:, b : b + 1, :n]))
    poisoned = x.masked_fill(mask[None, :, :, None], 1e6)
    assert torch.equal(call(module, poisoned, mask), padded)


@every_module
@both_norms
def test_training_sees_no_padding(name, norm):
    module = make(name, norm=norm, dtype=torch.float64).train()
    other = copy.deepcopy(module)
    x, mask = tokens([2, 5, 3], 8)
    padded, trimmed = call(module, x, mask), call(other, x[:, :, :5], mask[:, :5])
    assert torch.equal(padded[:, :, :5], trimmed)
    assert not padded[:, :, 5:].any()
    state, wanted = module.state_dict(), other.state_dict()
    assert all(torch.equal(state[key], wanted[key]) for key in state)


@every_module
@pytest.mark.parametrize(("steps", "tau"), [(4, 2.0), (32, 10.0)])
@pytest.mark.parametrize("train", [True, False])
def test_every_layer_fires_at_the_start(name, steps, tau, train):
    """Rates between 1 % and 60 % on a static input, which the gains are designed for; some spikes on white noise."""
    module = make(name, tau=tau).train(train)
    for x, least in ((torch.randn(4, 24, D).expand(steps, 4, 24, D), 0.01), (torch.randn(steps, 4, 24, D), 1e-5)):
        rates = firing_rates(module, *((x, x) if "cross" in name else (x,)))
        assert len(rates) == sum(isinstance(m, LIF) for m in module.modules())
        assert all(least < rate < 0.6 for rate in rates.values()), rates


@every_module
def test_padding_does_not_thin_the_rates(name):
    module = make(name).eval()
    x, mask = tokens([6], 15)
    x = x.float()
    alone, padded = x[:, :, :6], (x, x, mask, mask) if "cross" in name else (x, mask)
    rates = firing_rates(module, *padded, key_padding_mask=mask)
    assert rates == pytest.approx(firing_rates(module, *((alone, alone) if "cross" in name else (alone,))), rel=1e-9)


@every_module
@both_norms
def test_every_parameter_learns(name, norm):
    module = make(name, norm=norm)
    x = torch.randn(8, 4, 10, D, requires_grad=True)
    out = call(module, x)
    (out * torch.randn_like(out)).sum().backward()
    assert x.grad.any()
    silent = [key for key, p in module.named_parameters() if p.grad is None or not p.grad.any()]
    if norm == "batch":  # a bias before a batch norm has no effect
        silent = [key for key in silent if not key.endswith("linear.bias")]
    assert not silent


@every_module
def test_gradients_are_those_of_autograd_and_never_reach_padding(name):
    """A neuron that is looked at is a layer of its own, so that PyTorch differentiates the products around it."""
    module = make(name, dtype=torch.float64)
    x, mask = tokens([2, 5], 6)
    x.requires_grad_()
    weight = torch.randn_like(x)
    grads = []
    for watched in (False, True):
        module.attn_lif.store_v_seq = watched
        inputs = [x, *module.parameters()]
        grads.append(torch.autograd.grad((call(module, x, mask) * weight).sum(), inputs))
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)
    assert not grads[0][0][:, mask].any()
    assert grads[0][0][:, ~mask].any()


@every_module
def test_16_bit_training_step_is_finite_and_spikes_are_spikes(name):
    module = make(name)
    with torch.autocast("cpu", torch.bfloat16):
        out = call(module, torch.randn(T, B, L, D))
    assert set(out.unique().tolist()) <= {0.0, 1.0}
    out.sum().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())


@every_module
def test_exports_and_compiles(name):
    module = make(name).eval()
    x, mask = torch.randn(T, B, L, D), torch.zeros(B, L, dtype=torch.bool)
    mask[0, 4:] = True
    inputs = (x, x, mask, mask) if "cross" in name else (x, mask)
    wanted = module(*inputs)
    assert torch.equal(torch.export.export(module, inputs).module()(*inputs), wanted)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), wanted)


@every_module
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_neuron_that_is_looked_at_or_replaced_fires_the_same(name, dtype):
    module = make(name).to(dtype).eval()
    x, mask = tokens([2, 6], 6)
    x = x.to(dtype)
    wanted = call(module, x, mask)
    assert wanted.dtype == dtype
    own = module.attn_lif
    own.store_v_seq = True
    assert torch.equal(call(module, x, mask), wanted)
    assert own.v_seq.shape[0] == T
    own.store_v_seq = False
    if dtype == torch.float64:  # theirs would round its potential to 16 bits
        module.attn_lif = LIFNode(own.tau, True, own.v_threshold, own.v_reset, step_mode="m")
        assert torch.equal(call(module, x, mask), wanted)


@every_module
def test_options_reach_every_neuron(name):
    module = make(name, tau=3.0, v_threshold=1.5, attn_v_threshold=0.75, v_reset=None, detach_reset=False)
    for key, layer in module.named_modules():
        if isinstance(layer, LIF):
            assert layer.v_threshold == (0.75 if key == "attn_lif" else 1.5)
            assert (layer.tau, layer.v_reset, layer.detach_reset) == (3.0, None, False)


def test_signatures_share_their_options():
    """One name, one default, in every class, but for what each paper sets."""
    reference = inspect.signature(SpikingSelfAttention).parameters
    own = {"kv_dim", "version", "kind", "chunk", "scale"}
    for cls in {cls for cls, _ in FAMILY.values()}:
        for name, parameter in inspect.signature(cls).parameters.items():
            if name in own or (cls is DualSpikeSelfAttention and name == "attn_v_threshold"):
                continue
            assert (parameter.default, parameter.kind) == (reference[name].default, reference[name].kind)


@every_module
def test_bad_inputs_are_named(name):
    module = make(name)
    cls = type(module).__name__
    with pytest.raises(ValueError, match=rf"{cls}: x must be .* D = 32, got shape \(4, 3, 6, 33\)\.$"):
        call(module, torch.zeros(T, B, L, D + 1))
    with pytest.raises(ValueError, match=r"got shape \(4, 3, 32, 6\).*Tokens come before channels: \[T, B, L, D\]"):
        call(module, torch.zeros(T, B, D, L))
    with pytest.raises(ValueError, match=r"got shape \(4, 3, 32, 2, 3\).*picture"):
        call(module, torch.zeros(T, B, D, 2, 3))
    with pytest.raises(ValueError, match="T >= 1"):
        call(module, torch.zeros(0, B, L, D))
    with pytest.raises(TypeError, match=r"x must be float32, .*got torch\.int64"):
        call(module, torch.zeros(T, B, L, D).long())
    with pytest.raises(ValueError, match=r"padding_mask must be \[B, L\] = \(3, 6\), got \(3, 5\)"):
        call(module, torch.zeros(T, B, L, D), torch.zeros(B, L - 1, dtype=torch.bool))
    with pytest.raises(TypeError, match="True at padding, got"):
        call(module, torch.zeros(T, B, L, D), torch.zeros(B, L))
    with pytest.raises(ValueError, match="dim = 250 and num_heads = 8"):
        type(module)(250, 8)
    with pytest.raises(ValueError, match="norm must be one of 'layer', 'batch'"):
        make(name, norm="group")
    with pytest.raises(ValueError, match="init must be one of"):
        make(name, init="lucky")
