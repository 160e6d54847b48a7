"""Spiking attention and its blocks: padding, causality, static input, options, messages."""

import copy
import inspect

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from spikeattn import LIF, ATan, SpikingMLP, SpikingSelfAttention, SpikingTransformer, SpikingTransformerBlock
from spikeattn.nn.alive import attention_gain, design_rate, norm_gain
from spikeattn.nn.attention import attend_and_fire
from spikeattn.nn.projection import TokenBatchNorm

T, B, L, D, H = 4, 3, 6, 32, 4


def tokens(lengths, longest, dtype=torch.float64):
    """Random tokens, and the mask of their padding."""
    mask = torch.arange(longest) >= torch.tensor(lengths).unsqueeze(1)
    return torch.randn(T, len(lengths), longest, D, dtype=dtype), mask


def make(norm="layer", dtype=torch.float64, **kwargs):
    return SpikingTransformer(D, 2, H, norm=norm, dtype=dtype, **kwargs)


@given(
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    extra=st.integers(1, 3),
    fire=st.sampled_from(["output", "map"]),
    causal=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_padding_never_changes_a_token(lengths, extra, fire, causal, dtype):
    model = make(dtype=dtype, fire=fire, is_causal=causal).eval()
    x, mask = tokens(lengths, max(lengths) + extra, dtype)
    padded = model(x, mask)
    for b, n in enumerate(lengths):
        assert torch.equal(padded[:, b : b + 1, :n], model(x[:, b : b + 1, :n]))
    poisoned = x.masked_fill(mask[None, :, :, None], 1e6)
    assert torch.equal(model(poisoned, mask)[:, ~mask], padded[:, ~mask])


def test_padded_tokens_are_silent_and_unchanged():
    x, mask = tokens([2, 5], 5)
    attention = SpikingSelfAttention(D, H, dtype=torch.float64)
    assert not attention(x, mask)[:, mask].any()
    assert attention(x, mask)[:, ~mask].any()
    assert torch.equal(make()(x, mask)[:, mask], x[:, mask])


def test_statistics_of_batch_norm_see_no_padding():
    x, mask = tokens([2, 5, 3], 7)
    models = make("batch").train(), None
    model, other = models[0], copy.deepcopy(models[0])
    padded = model(x, mask)
    trimmed = other(x[:, :, :5], mask[:, :5])
    assert torch.equal(padded[:, ~mask], trimmed[:, ~mask[:, :5]])
    state, wanted = model.state_dict(), other.state_dict()
    running = [name for name in state if "running" in name]
    assert len(running) == 2 * 2 * 6
    assert all(torch.equal(state[name], wanted[name]) for name in running)


def test_batch_norm_without_padding_is_torchs():
    x = torch.randn(T, B, L, D)
    ours, theirs = TokenBatchNorm(D), torch.nn.BatchNorm1d(D)
    assert torch.equal(ours(x), theirs(x.reshape(-1, D)).view(x.shape))
    assert torch.equal(ours(x, torch.zeros(B, L, dtype=torch.bool)), ours(x))


@pytest.mark.parametrize("fire", ["output", "map"])
@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_static_input_equals_the_same_input_written_out(fire, norm):
    model = make(norm, fire=fire).train()
    x = torch.randn(B, L, D, dtype=torch.float64)
    other = copy.deepcopy(model)
    torch.testing.assert_close(model(x.expand(T, B, L, D)), other(x.repeat(T, 1, 1, 1)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("fire", ["output", "map"])
def test_causal_blocks_do_not_see_later_tokens(fire):
    model = make(fire=fire, is_causal=True)
    x, _ = tokens([L], L)
    whole = model(x)
    for n in range(1, L + 1):
        assert torch.equal(whole[:, :, :n], model(x[:, :, :n]))
    changed = x.clone()
    changed[:, :, -1] += 1.0
    assert not torch.equal(model(changed)[:, :, -1], whole[:, :, -1])
    full = make(fire=fire, is_causal=False)
    assert not torch.equal(full(changed)[:, :, :-1], full(x)[:, :, :-1])


def test_published_attention_is_its_equation():
    attention = SpikingSelfAttention(D, H, init="published", tau=2.0, dtype=torch.float64)
    with torch.no_grad():
        for p in attention.parameters():
            p.copy_(torch.randn_like(p))
    x = torch.randn(T, B, L, D, dtype=torch.float64)

    def fire(current, threshold=1.0):
        return LIF(2.0, v_threshold=threshold, surrogate_function=ATan(), detach_reset=True)(current)

    def split(spikes):
        return spikes.view(T, B, L, H, D // H).transpose(2, 3)

    q, k, v = (split(fire(p.norm(p.linear(x)))) for p in (attention.q, attention.k, attention.v))
    mixed = ((q @ k.transpose(-1, -2)) @ v * 0.125).transpose(2, 3).reshape(T, B, L, D)
    wanted = fire(attention.out.norm(attention.out.linear(fire(mixed, 0.5))))
    assert torch.equal(attention(x), wanted)
    assert wanted.any()


def test_a_block_adds_attention_then_mlp():
    block = SpikingTransformerBlock(D, H)
    x = torch.randn(T, B, L, D)
    middle = x + block.attn(x)
    assert torch.equal(block(x), middle + block.mlp(middle))
    assert block.mlp.fc1.linear.out_features == 4 * D


def test_every_parameter_learns():
    for norm in ("layer", "batch"):
        for fire in ("output", "map"):
            model = SpikingTransformer(64, 1, H, norm=norm, fire=fire)
            x = torch.randn(8, 4, 10, 64)
            (model(x) * torch.randn_like(x)).sum().backward()
            silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
            if norm == "batch":  # a bias before a batch norm has no effect
                silent = [name for name in silent if not name.endswith("linear.bias")]
            assert not silent


def test_options_reach_every_neuron():
    model = SpikingTransformer(
        D, 2, H, tau=3.0, v_threshold=1.5, attn_v_threshold=0.75, v_reset=None, detach_reset=False,
        surrogate_function=ATan(3.0),
    )  # fmt: skip
    lifs = {name: m for name, m in model.named_modules() if isinstance(m, LIF)}
    assert len(lifs) == 14
    for name, layer in lifs.items():
        assert layer.v_threshold == (0.75 if name.endswith("attn_lif") else 1.5)
        assert (layer.tau, layer.v_reset, layer.detach_reset) == (3.0, None, False)
        assert layer.surrogate_function == ATan(3.0)


def test_signatures_share_their_options():
    """One name, one default, in every class."""
    reference = inspect.signature(SpikingSelfAttention).parameters
    for cls in (SpikingMLP, SpikingTransformerBlock, SpikingTransformer):
        for name, parameter in inspect.signature(cls).parameters.items():
            if name not in ("dim", "depth", "mlp_ratio", "residual"):
                assert parameter.default == reference[name].default
                assert parameter.kind == reference[name].kind


def test_16_bit_training_step_is_finite():
    model = SpikingTransformer(D, 1, H)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(torch.randn(T, B, L, D))
    out.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_currents_of_a_neuron_that_is_looked_at_are_not_16_bit():
    """Counts of about 800, of which bfloat16 holds every fourth, close to the threshold."""
    q, k, v = ((torch.rand(T, B, H, 64, 16) < 0.92).bfloat16() for _ in range(3))
    neuron = LIF(2.0, v_threshold=400.0)
    wanted = attend_and_fire(neuron, q, k, v, fire="output", scale=1.0)
    assert 0.1 < wanted.mean() < 0.9
    neuron.store_v_seq = True
    assert torch.equal(attend_and_fire(neuron, q, k, v, fire="output", scale=1.0), wanted)


def test_exports_and_compiles():
    model = SpikingSelfAttention(D, H).eval()
    x, mask = torch.randn(T, B, L, D), torch.zeros(B, L, dtype=torch.bool)
    mask[0, 4:] = True
    wanted = model(x, mask)
    exported = torch.export.export(model, (x, mask)).module()
    assert torch.equal(exported(x, mask), wanted)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, mask), wanted)


def test_gain_is_a_power_of_two_that_falls_with_the_number_of_keys():
    gains = attention_gain(torch.arange(1, 500), 32, 10.0, "output")
    exponents = torch.log2(gains.double())
    assert torch.equal(exponents, exponents.round())
    assert (gains.diff() <= 0).all()
    assert gains[0] / gains[-1] == 2 ** round(torch.log2(torch.tensor(499.0)).item())
    assert attention_gain(torch.tensor([5, 50]), 32, 10.0, "map").unique().numel() == 1


@pytest.mark.parametrize("tau", [2.0, 5.0, 10.0, 20.0])
def test_design_rate_is_the_rate_of_constant_currents(tau):
    current = torch.randn(200_000, generator=torch.Generator().manual_seed(0)) * norm_gain(tau)
    rate = LIF(tau)(current.expand(1000, -1)).mean().item()
    assert design_rate(tau) == pytest.approx(rate, rel=0.02)


@pytest.mark.parametrize("tau", [2.0, 10.0])
def test_norm_gain_moves_a_membrane_by_one_threshold(tau):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(400, 5000, generator=generator) * norm_gain(tau)
    v = LIF(tau, v_threshold=1e9, store_v_seq=True)
    v(noise)
    assert v.v_seq[200:].std().item() == pytest.approx(1.0, rel=0.02)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SpikingSelfAttention(250, 8), "dim = 250 and num_heads = 8"),
        (lambda: SpikingSelfAttention(0, 8), "dim = 0"),
        (lambda: SpikingSelfAttention(D, H, fire="both"), "fire must be one of 'output', 'map', got 'both'"),
        (lambda: SpikingSelfAttention(D, H, norm="group"), "norm must be one of 'layer', 'batch'"),
        (lambda: SpikingSelfAttention(D, H, init="lucky"), "init must be one of"),
        (lambda: SpikingSelfAttention(D, H, tau=0.5), "tau must be > 1"),
        (lambda: SpikingSelfAttention(D, H, scale=float("nan")), "scale must be finite, got nan"),
        (lambda: SpikingTransformer(D, 0, H), "depth must be at least 1, got 0"),
        (lambda: SpikingMLP(D, mlp_ratio=0.0), "must be at least 1"),
        (lambda: SpikingSelfAttention(D, H)(torch.zeros(T, B, L, D + 1)), r"D = 32, got shape \(4, 3, 6, 33\)"),
        (lambda: SpikingSelfAttention(D, H)(torch.zeros(0, B, L, D)), "T >= 1"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_bad_masks_are_named():
    attention = SpikingSelfAttention(D, H)
    x = torch.zeros(T, B, L, D)
    with pytest.raises(ValueError, match=r"key_padding_mask must be \[B, L\] = \(3, 6\), got \(3, 5\)"):
        attention(x, torch.zeros(B, L - 1, dtype=torch.bool))
    with pytest.raises(TypeError, match="True at padding, got"):
        attention(x, torch.zeros(B, L))
    with pytest.raises(TypeError, match=r"x must be float32, .*got torch\.int64"):
        attention(x.long())


class _Conversions(TorchDispatchMode):
    """Shapes of what is converted to bfloat16."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default and out.dtype == torch.bfloat16:
            self.shapes.append(tuple(out.shape))
        return out


@pytest.mark.parametrize("static", [False, True])
def test_autocast_converts_what_is_projected_once(static):
    attention = SpikingSelfAttention(D, H).eval()
    x = torch.randn(1 if static else T, B, L, D)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), _Conversions() as seen:
        attention(x.expand(T, B, L, D))
    assert [shape for shape in seen.shapes if shape[1:] == (B, L, D)] == [x.shape]
