"""Blocks with a membrane shortcut: equation, spikes into every Linear, a live start at depth, padding, streams."""

import copy

import pytest
import torch
from nn.plain import fire, heads, layer, merged, started
from torch import nn

from spikeattn import LIF, SpikingTransformer, SpikingTransformerBlock, firing_rates

T, B, L, D, H = 4, 3, 6, 32, 4


def make(depth=2, **options):
    return SpikingTransformer(D, depth, H, residual="membrane", **options)


def test_a_block_is_its_equation():
    block = started(SpikingTransformerBlock(D, H, residual="membrane", init="published", dtype=torch.float64))
    x = torch.randn(T, B, L, D, dtype=torch.float64)
    spikes = fire(block.attn_in.norm(x))
    q, k, v = (heads(layer(part, spikes), H) for part in (block.attn.q, block.attn.k, block.attn.v))
    counts = torch.einsum("tbhle,tbhse,tbhsf->tbhlf", q, k, v)
    attended = merged(fire(counts * 0.125, threshold=0.5))
    middle = x + block.attn.out.norm(block.attn.out.linear(attended))
    hidden = layer(block.mlp.fc1, fire(block.mlp_in.norm(middle)))
    wanted = middle + block.mlp.fc2.norm(block.mlp.fc2.linear(hidden))
    torch.testing.assert_close(block(x), wanted, rtol=1e-12, atol=1e-12)
    assert 0 < attended.mean() < 1
    assert 0 < hidden.mean() < 1


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_every_linear_is_given_spikes(norm):
    model, seen = make(norm=norm), []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda module, args: seen.append(set(args[0].unique().tolist())))
    model(torch.randn(T, B, L, D))
    assert len(seen) == 12
    assert all(values == {0.0, 1.0} for values in seen)


@pytest.mark.parametrize(("steps", "tau", "least"), [(4, 2.0, 0.01), (32, 10.0, 0.001)])
@pytest.mark.parametrize("size", [0.1, 10.0])
def test_every_layer_fires_at_the_start_at_any_depth_and_size(steps, tau, least, size):
    """Spikes reach the projections as noise, so the counts in attention are lower than those its gain expects."""
    model = make(6, tau=tau)
    rates = firing_rates(model, size * torch.randn(4, 24, D).expand(steps, 4, 24, D))
    assert len(rates) == 7 * 6 == sum(isinstance(m, LIF) for m in model.modules())
    assert all(least < rate < 0.6 for rate in rates.values()), rates


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_every_parameter_learns(norm):
    model = make(1, norm=norm)
    x = torch.randn(8, 4, 10, D, requires_grad=True)
    out = model(x)
    (out * torch.randn_like(out)).sum().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    if norm == "batch":  # a bias before a batch norm has no effect
        silent = [name for name in silent if not name.endswith("linear.bias")]
    assert not silent
    assert x.grad.any()


def test_padding_never_changes_a_token():
    model = make(dtype=torch.float64)
    lengths = [1, 4, 6]
    mask = torch.arange(9) >= torch.tensor(lengths)[:, None]
    x = torch.randn(T, 3, 9, D, dtype=torch.float64)
    padded = model(x, mask)
    assert torch.equal(padded[:, mask], x[:, mask])
    for b, n in enumerate(lengths):
        # Currents are real: the products of another shape may round their last bit otherwise.
        alone = model(x[:, b : b + 1, :n])
        torch.testing.assert_close(padded[:, b : b + 1, :n], alone, rtol=1e-12, atol=1e-12)


def test_a_stream_equals_the_whole_pass():
    model = make(is_causal=True, dtype=torch.float64)
    x = torch.randn(T, B, L, D, dtype=torch.float64)
    outs, state = [], None
    for i in range(L):
        out, state = model.step(x[:, :, i : i + 1], state)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, dim=2), model(x), rtol=1e-12, atol=1e-12)


def test_it_exports_compiles_and_runs_in_16_bit():
    model = make(1).eval()
    x, mask = torch.randn(T, B, L, D), torch.arange(L) >= torch.tensor([[6], [4], [1]])
    wanted = model(x, mask)
    assert torch.equal(torch.export.export(model, (x, mask)).module()(x, mask), wanted)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(x, mask), wanted)
    with torch.autocast("cpu", torch.bfloat16):
        model(x, mask).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_what_is_added_is_named():
    with pytest.raises(ValueError, match="residual must be one of 'add', 'membrane', got 'concatenate'"):
        SpikingTransformerBlock(D, H, residual="concatenate")
    added = SpikingTransformerBlock(D, H)
    assert added.state_dict().keys() < copy.deepcopy(make(1)).blocks[0].state_dict().keys()
