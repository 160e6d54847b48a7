"""spikingjelly's operation counters see our fused neurons as they see its own."""

import copy

import pytest
import torch
from spikingjelly.activation_based import functional, neuron, op_counter, surrogate
from spikingjelly.activation_based.model.spikformer import Spikformer
from torch import nn

import spikeattn
from spikeattn.interop import spikingjelly as rules

COUNTERS = {
    op_counter.FlopCounter: rules.flop_rules,
    op_counter.MACCounter: rules.mac_rules,
    op_counter.ACCounter: rules.ac_rules,
    op_counter.SynOpCounter: rules.synop_rules,
    op_counter.MemoryAccessCounter: rules.memory_access_rules,
}
every_counter = pytest.mark.parametrize(("kind", "extra"), COUNTERS.items(), ids=lambda v: getattr(v, "__name__", ""))


class NormedNode(nn.Module):
    """spikingjelly's neuron with the call of our `LIF`: after a norm, and silent at padding, if they are given."""

    def __init__(self, ours: spikeattn.LIF) -> None:
        super().__init__()
        theirs = getattr(surrogate, type(ours.surrogate_function).__name__)(ours.surrogate_function.alpha)
        self.tau = ours.tau
        options = {"surrogate_function": theirs, "detach_reset": ours.detach_reset, "step_mode": "m"}
        self.node = neuron.LIFNode(ours.tau, ours.decay_input, ours.v_threshold, ours.v_reset, **options)

    def forward(self, x_seq, norm=None, padding_mask=None):
        x_seq = x_seq if norm is None else norm(x_seq)
        return self.node(x_seq if padding_mask is None else x_seq.masked_fill(padding_mask.unsqueeze(-1), 0.0))


class MatmulAttention(nn.Module):
    """Our `SpikingSelfAttention` written with matmul and spikingjelly's neuron."""

    def __init__(self, ours: spikeattn.SpikingSelfAttention) -> None:
        super().__init__()
        self.ours, self.node = ours, NormedNode(ours.attn_lif)

    def forward(self, x, key_padding_mask=None):
        ours, heads = self.ours, (*x.shape[:3], self.ours.num_heads, -1)
        projections = (ours.q, ours.k, ours.v)
        q, k, v = (project(x, key_padding_mask).view(heads).transpose(2, 3) for project in projections)
        if key_padding_mask is not None:
            q, k, v = (y.masked_fill(key_padding_mask[:, None, :, None], 0.0) for y in (q, k, v))
        keys = ours._seen(x, key_padding_mask, 0)
        scale = ours._scale(keys if ours.is_causal else keys[:, -1:])
        if isinstance(scale, torch.Tensor) and scale.numel() == 1:
            scale = scale.item()
        attended = self.node(attend(q, k, v, scale, ours.is_causal)) if ours.fire == "output" else None
        if attended is None:
            weights = q @ k.transpose(-1, -2)
            attended = self.node((weights.tril() if ours.is_causal else weights) * scale) @ v
        return ours.out(attended.transpose(2, 3).flatten(3), key_padding_mask)


def attend(q, k, v, scale, is_causal=False):
    """Attention without neurons, in the order that takes fewer multiplications."""
    if not is_causal and q.shape[-1] < k.shape[-2]:
        return (q @ (k.transpose(-1, -2) @ v)) * scale
    weights = q @ k.transpose(-1, -2)
    return ((weights.tril() if is_causal else weights) @ v) * scale


def with_their_nodes(model: nn.Module) -> nn.Module:
    """A copy of the model with spikingjelly's neurons, matmul and PyTorch's Linear in the place of ours."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, spikeattn.SpikingSelfAttention):
                setattr(module, name, MatmulAttention(child))
            if isinstance(child, spikeattn.LIF):
                setattr(module, name, NormedNode(child))
            if isinstance(child, spikeattn.EventLinear):
                setattr(module, name, plain_linear(child))
    return model


def plain_linear(ours: spikeattn.EventLinear) -> nn.Linear:
    """PyTorch's layer with the parameters of ours."""
    theirs = nn.Linear(ours.in_features, ours.out_features)
    theirs.weight, theirs.bias = ours.weight, ours.bias
    return theirs


def totals(model, x, counter, backward, calls=1):
    """Counts by scope of ``calls`` forward passes, and of one backward through them all."""
    model.zero_grad()  # adding to a gradient of before would be counted
    with op_counter.DispatchCounterMode([counter]):
        out = sum(model(x).sum() for _ in range(calls))
        if backward:
            out.backward()
    sums = {scope: sum(counts.values()) for scope, counts in counter.get_counts().items()}
    return {scope: total for scope, total in sums.items() if total}


PAIRS = [
    (spikeattn.LIF, neuron.LIFNode, {}),
    (spikeattn.LIF, neuron.LIFNode, {"decay_input": False, "tau": 3.0, "detach_reset": True}),
    (spikeattn.LIF, neuron.LIFNode, {"v_reset": None, "store_v_seq": True}),
    (spikeattn.LIF, neuron.LIFNode, {"v_reset": 0.25}),
    (spikeattn.IF, neuron.IFNode, {}),
    (spikeattn.ParametricLIF, neuron.ParametricLIFNode, {}),
    (spikeattn.ParametricLIF, neuron.ParametricLIFNode, {"decay_input": False, "v_reset": None}),
]


@every_counter
@pytest.mark.parametrize(("ours", "theirs", "options"), PAIRS)
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("T", [1, 4])
def test_linear_and_neuron_count_like_spikingjelly(kind, extra, ours, theirs, options, backward, T):
    linear = nn.Linear(6, 5)
    x = (torch.rand(T, 3, 6) < 0.5).float()
    a = totals(nn.Sequential(linear, ours(**options)), x, kind(extra_rules=extra()), backward)
    b = totals(nn.Sequential(linear, theirs(step_mode="m", **options)), x, kind(), backward)
    assert a.get("Global") == b.get("Global")
    if not backward:
        assert a.get("Sequential.1", 0) == b.get("Sequential.1", 0)
    assert a or kind is op_counter.MACCounter


@every_counter
@pytest.mark.parametrize("name", spikeattn.ops.surrogate._BY_CLASS_NAME)
def test_every_surrogate_counts_like_spikingjelly(kind, extra, name):
    x = torch.randn(3, 4)
    linear = nn.Linear(4, 4)
    a = nn.Sequential(linear, spikeattn.LIF(surrogate_function=getattr(spikeattn, name)(1.5)))
    b = nn.Sequential(linear, neuron.LIFNode(step_mode="m", surrogate_function=getattr(surrogate, name)(1.5)))
    assert totals(a, x, kind(extra_rules=extra()), True).get("Global") == totals(b, x, kind(), True).get("Global")


@every_counter
def test_streaming_counts_like_spikingjelly(kind, extra):
    linear, x = nn.Linear(6, 5), torch.randn(4, 3, 6)
    ours = nn.Sequential(linear, spikeattn.LIF(stateful=True))
    theirs = nn.Sequential(linear, neuron.LIFNode(step_mode="m"))
    assert totals(ours, x, kind(extra_rules=extra()), True, 3) == totals(theirs, x, kind(), True, 3)


class NoCopies(op_counter.MemoryAccessCounter):
    """Counts no copies.

    In a backward they depend on the layout in which an operation returns its gradients, not on what it computes.
    """

    def __init__(self, **options):
        super().__init__(**options)
        self.rules[torch.ops.aten.clone.default] = lambda args, kwargs, out: 0


def total(model, inputs, kind, backward, ours):
    """Count of a forward, and of the backward but for copies."""
    kind = NoCopies if backward and kind is op_counter.MemoryAccessCounter else kind
    counter = kind(extra_rules=rules._rules(kind)) if ours else kind()
    with op_counter.DispatchCounterMode([counter]):
        out = model(*inputs).sum()
        if backward:
            out.backward()
    return counter.get_total()


@pytest.mark.parametrize("kind", COUNTERS)
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_transformer_block_counts_like_spikingjelly(kind, backward, padded):
    model = spikeattn.SpikingTransformerBlock(8, num_heads=2, mlp_ratio=2.0)
    x = torch.randn(3, 2, 5, 8)
    mask = torch.arange(5) >= torch.tensor([[5], [3]]) if padded else None
    ours = total(model, (x, mask), kind, backward, True)
    assert ours == total(with_their_nodes(model), (x, mask), kind, backward, False) > 0


@pytest.mark.parametrize("kind", COUNTERS)
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("L", [5, 9])  # either order of the products is the cheaper
@pytest.mark.parametrize(
    "options",
    [
        {"init": "published"},
        {"fire": "map"},
        {"is_causal": True},
        {"fire": "map", "is_causal": True},
        {"v_reset": None, "detach_reset": False, "surrogate_function": spikeattn.Sigmoid()},
    ],
    ids=lambda options: "-".join(options),
)
def test_attention_counts_like_matmul_and_spikingjelly(kind, options, L, backward):
    model = spikeattn.SpikingSelfAttention(12, num_heads=2, **options)
    x = torch.randn(3, 4, L, 12)
    ours = total(model, (x,), kind, backward, True)
    assert ours == total(with_their_nodes(nn.Sequential(model)), (x,), kind, backward, False) > 0


@every_counter
def test_attention_without_neurons_counts_its_products(kind, extra):
    q, k, v = ((torch.rand(3, 2, 2, 9, 4) < 0.3).float() for _ in range(3))
    ours, theirs = kind(extra_rules=extra()), kind()
    with op_counter.DispatchCounterMode([ours]):
        spikeattn.spiking_attention(q, k, v, fire=None).transpose(2, 3).flatten(3)
    with op_counter.DispatchCounterMode([theirs]):
        attend(q, k, v, 0.125).transpose(2, 3).flatten(3)
    assert ours.get_total() == theirs.get_total()


@every_counter
def test_products_in_given_memory_count_like_others(kind, extra):
    x, y, bias = (torch.rand(2, 3, 4) < 0.5).float(), torch.rand(2, 4, 5), torch.rand(2, 3, 5)
    ours, theirs = kind(extra_rules=extra()), kind()
    with op_counter.DispatchCounterMode([theirs]):
        wanted = torch.baddbmm(bias, x, y), torch.bmm(x, y)
    with op_counter.DispatchCounterMode([ours]):
        got = bias.baddbmm_(x, y), torch.bmm(x, y, out=torch.empty(2, 3, 5))
    assert torch.equal(torch.stack(got), torch.stack(wanted))
    assert ours.get_total() == theirs.get_total()


@pytest.mark.parametrize("kind", [op_counter.FlopCounter, op_counter.ACCounter, op_counter.SynOpCounter])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("stateful", [True, False])
def test_a_swapped_model_counts_what_it_counted(kind, backward, stateful):
    theirs = Spikformer(T=3, img_size_h=16, img_size_w=16, patch_size=4, embed_dims=32, num_heads=4, depths=1)
    ours = rules.swap_attention(copy.deepcopy(theirs), stateful=stateful)
    x = torch.randn(2, 3, 16, 16)
    assert total(ours, (x,), kind, backward, True) == total(theirs, (x,), kind, backward, False) > 0


@pytest.mark.parametrize("kind", [op_counter.FlopCounter, op_counter.ACCounter, op_counter.MemoryAccessCounter])
def test_without_rules_a_fused_neuron_counts_nothing_and_is_reported(kind):
    counter = kind()
    with op_counter.DispatchCounterMode([counter]) as mode:
        spikeattn.LIF()(torch.randn(4, 5))
    assert counter.get_total() == 0
    assert "spikeattn.lif_forward.default" in mode.get_unsupported(counter)


def test_rules_satisfy_a_strict_mode():
    counter = op_counter.FlopCounter(extra_rules=rules.flop_rules())
    x = torch.rand(4, 5)
    with op_counter.DispatchCounterMode([counter], strict=True):
        spikeattn.LIF()(x)
    assert counter.get_total() == 4 * 5 * 10


def test_a_custom_surrogate_is_counted():
    fire = spikeattn.CustomSurrogate(torch.sigmoid, lambda x: torch.exp(-x.abs()))
    counter = op_counter.FlopCounter(extra_rules=rules.flop_rules())
    assert totals(
        nn.Sequential(nn.Linear(4, 4), spikeattn.LIF(surrogate_function=fire)), torch.randn(3, 4), counter, True
    )


def test_energy_of_attention_is_that_of_matmul_and_spikingjelly():
    model, x = spikeattn.SpikingSelfAttention(12, num_heads=2), torch.randn(3, 2, 9, 12)
    reports = []
    for net in (model, with_their_nodes(nn.Sequential(model))[0]):
        profiler = rules.add_rules(op_counter.SimpleEnergyProfiler())
        profiler.bind_model(net)
        with profiler, torch.no_grad():
            net(x)
        reports.append(profiler.get_report())
    assert reports[0].counts == reports[1].counts
    assert reports[0].energy_total_pj == reports[1].energy_total_pj > 0


@pytest.mark.parametrize("stateful", [False, True])
def test_energy_is_that_of_spikingjellys_twin(stateful):
    linear, x = nn.Linear(6, 5), (torch.rand(4, 3, 6) < 0.5).float()
    reports = []
    for node in (spikeattn.LIF(stateful=stateful), neuron.LIFNode(step_mode="m")):
        model = nn.Sequential(linear, node)
        profiler = rules.add_rules(op_counter.SimpleEnergyProfiler())
        profiler.bind_model(model)
        with profiler, torch.no_grad():
            model(x)
            functional.reset_net(model)
        reports.append(profiler.get_report())
    assert reports[0].counts == reports[1].counts
    assert reports[0].energy_total_pj == reports[1].energy_total_pj > 0
    assert reports[0].counts["neuron_state_read_bytes"] == 4 * 3 * 5 * 4


def test_a_counter_without_rules_to_take_is_refused():
    with pytest.raises(TypeError, match="got NeuronStateCounter"):
        rules.add_rules(op_counter.NeuronStateCounter())
