"""swap_attention changes what runs, and nothing that comes out."""

import copy
import pickle

import pytest
import torch
from spikingjelly.activation_based import functional, monitor, neuron, surrogate
from spikingjelly.activation_based.layer import attention
from spikingjelly.activation_based.model.maxformer import MaxFormer
from spikingjelly.activation_based.model.qkformer import QKFormer
from spikingjelly.activation_based.model.spike_driven_transformer import SpikeDrivenTransformer
from spikingjelly.activation_based.model.spikformer import Spikformer
from torch import nn

import spikeattn
from spikeattn.interop import swap
from spikeattn.interop.spikingjelly import swap_attention

SMALL = {"num_classes": 5, "embed_dims": 32}
STAGES = {"num_heads": (1, 2, 2), "depths": (1, 1, 1)}
# Model, its attention layers, and what they are afterwards.
MODELS = {
    "spikformer": (
        lambda **options: Spikformer(
            img_size_h=32, img_size_w=32, patch_size=4, num_heads=4, depths=2, **SMALL, **options
        ),
        ["FusedSelfAttention"] * 2,
    ),
    "qkformer_token": (
        lambda **options: QKFormer(**STAGES, **SMALL, **options),
        ["QKAttention"] * 2 + ["FusedSelfAttention"],
    ),
    "qkformer_channel": (
        lambda **options: QKFormer(qka_type="channel", **STAGES, **SMALL, **options),
        ["QKAttention"] * 2 + ["FusedSelfAttention"],
    ),
    "sdt": (
        lambda **options: SpikeDrivenTransformer(num_heads=4, depths=2, pooling_stat="0011", **SMALL, **options),
        ["SpikeDrivenSelfAttention"] * 2,
    ),
    "maxformer": (lambda **options: MaxFormer(depths=(1, 1, 1), **SMALL, **options), ["FusedSelfAttention"]),
}
LAYERS = [
    attention.SpikingSelfAttention,
    attention.TokenQKAttention,
    attention.ChannelQKAttention,
    attention.SpikeDrivenSelfAttention,
]
every_model = pytest.mark.parametrize("name", MODELS)
every_layer = pytest.mark.parametrize("kind", LAYERS)
OURS = (spikeattn.LIF, spikeattn.IF, spikeattn.ParametricLIF)


def enliven(model):
    """Gains and biases of the norms at which neurons fire."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 2.0, 4.0)
            nn.init.uniform_(module.bias, 0.0, 1.0)
            module.momentum = 1.0  # the statistics of one batch
    return model


def pair(name, seed=0, stateful=True, **options):
    """A model whose neurons fire, also in eval mode, and its swapped copy."""
    torch.manual_seed(seed)
    theirs = enliven(MODELS[name][0](T=4, **options))
    theirs(torch.randn(4, 3, 32, 32))
    functional.reset_net(theirs)
    return theirs, swap_attention(copy.deepcopy(theirs), stateful=stateful)


def layer_pair(kind, stateful=True, seed=0, **options):
    """A layer of width 24 whose neurons fire, and its swapped copy."""
    torch.manual_seed(seed)
    theirs = enliven(kind(24, num_heads=3, **options))
    return theirs, swap_attention(copy.deepcopy(theirs), stateful=stateful)


def inputs(kind, T=4, N=2, dtype=torch.float32):
    """Currents for such a layer, [T, N, 24, 12] or [T, N, 24, 3, 4]."""
    space = (3, 4) if kind is attention.SpikeDrivenSelfAttention else (12,)
    return torch.randn(T, N, 24, *space, dtype=dtype) * 2


def attention_layers(model):
    """Attention layers, swapped or not, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, swap._LAYERS)}


def run(model, x):
    """Output, and that of each attention layer; state is reset."""
    seen, handles = {}, []
    for name, module in attention_layers(model).items():
        handles.append(module.register_forward_hook(lambda _, args, out, name=name: seen.update({name: out})))
    out = model(x)
    for handle in handles:
        handle.remove()
    functional.reset_net(model)
    return out, seen


def assert_near(ours, theirs, size=None):
    """Gradients agree within float32 rounding of sums as large as ``theirs``, or as another of the same layer."""
    sizes = [grad.abs().max() for grad in (theirs, size) if grad is not None]
    assert (ours - theirs).abs().max() <= 1e-4 * max(sizes)


@every_model
@pytest.mark.parametrize("stateful", [True, False])
@pytest.mark.parametrize("T", [1, 4])
@pytest.mark.parametrize("seed", [0, 1])
def test_models_give_the_same_bits_in_eval(name, T, stateful, seed):
    theirs, ours = pair(name, seed, stateful)
    assert [type(module).__name__ for module in attention_layers(ours).values()] == MODELS[name][1]
    theirs.eval(), ours.eval()
    x = torch.randn(T, 2, 3, 32, 32)
    (a, layers_a), (b, layers_b) = run(ours, x), run(theirs, x)
    assert torch.equal(a, b)
    assert layers_a.keys() == layers_b.keys()
    for key in layers_b:
        assert torch.equal(layers_a[key], layers_b[key])
        assert T == 1 or layers_b[key].unique().numel() > 1


@every_model
@pytest.mark.parametrize("stateful", [True, False])
def test_models_train_alike(name, stateful):
    theirs, ours = pair(name, stateful=stateful)
    x, target = torch.randn(4, 2, 3, 32, 32), torch.randn(5)
    outs = []
    for model in (ours, theirs):
        out, _ = run(model, x)
        (out - target).square().sum().backward()
        outs.append(out)
    assert torch.equal(*outs)
    grads = {key: parameter.grad for key, parameter in theirs.named_parameters()}
    for key, parameter in ours.named_parameters():
        # A bias before a norm has the gradient 0, and what is computed is rounding beside the gradient of its weight.
        assert_near(parameter.grad, grads[key], grads.get(key.replace("bias", "weight")))
    for a, b in zip(ours.buffers(), theirs.buffers(), strict=True):
        assert torch.equal(a, b)  # statistics of the norms
    assert all(grad.any() for key, grad in grads.items() if key.endswith("weight"))


@every_layer
@pytest.mark.parametrize("stateful", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tau": 3.3, "decay_input": False, "detach_reset": False},
        {"v_reset": None, "surrogate_function": surrogate.ATan()},
        {"v_reset": -0.25, "v_threshold": 0.75},
        {"spiking_neuron": neuron.IFNode},
        {"spiking_neuron": neuron.ParametricLIFNode, "init_tau": 1.7},
    ],
    ids=lambda options: "-".join(options) or "default",
)
def test_layers_keep_every_setting(kind, options, stateful):
    theirs, ours = layer_pair(kind, stateful, **options)
    assert not any(isinstance(module, swap._THEIRS) for module in ours.modules())
    x = inputs(kind)
    results = []
    for layer in (ours, theirs):
        own = x.clone().requires_grad_()
        out = layer(own)
        (out * torch.linspace(-1, 1, 12).view(x.shape[3:])).sum().backward()
        results.append((out, own.grad, {key: p.grad for key, p in layer.named_parameters()}))
    (out, grad, grads), (out_b, grad_b, grads_b) = results
    assert torch.equal(out, out_b)
    assert out.unique().numel() > 1
    assert_near(grad, grad_b)
    assert grads.keys() == grads_b.keys()
    for key, b in grads_b.items():
        assert_near(grads[key], b)


@every_layer
def test_a_stream_goes_on_as_theirs_and_reset_net_ends_it(kind):
    theirs, ours = layer_pair(kind)
    x = inputs(kind, T=9)
    with torch.no_grad():
        for piece in x.split([4, 1, 4]):
            assert torch.equal(ours(piece), theirs(piece))
            assert ours.attn_lif.v.shape == theirs.attn_lif.v.shape
            assert torch.equal(ours.attn_lif.v, theirs.attn_lif.v)
        functional.reset_net(ours), functional.reset_net(theirs)
        assert torch.equal(ours(x[:4]), theirs(x[:4]))


@pytest.mark.parametrize("kind", [attention.SpikingSelfAttention, attention.TokenQKAttention])
@pytest.mark.parametrize("stateful", [True, False])
def test_set_step_mode_reaches_the_neurons(kind, stateful):
    theirs, ours = layer_pair(kind, stateful)
    x = inputs(kind, T=6)
    with torch.no_grad():
        for layer in (theirs, ours):
            functional.set_step_mode(layer, "s")
        for piece in x.split(2):  # neurons take each piece for one step
            assert torch.equal(ours(piece), theirs(piece))
        for layer in (theirs, ours):
            functional.reset_net(layer)
            functional.set_step_mode(layer, "m")
        assert torch.equal(ours(x), theirs(x))


def test_a_swap_in_the_middle_of_a_stream_keeps_the_potentials():
    theirs, _ = layer_pair(attention.SpikingSelfAttention)
    x = inputs(attention.SpikingSelfAttention, T=8)
    with torch.no_grad():
        theirs(x[:4])
        ours = swap_attention(copy.deepcopy(theirs))
        assert torch.equal(ours(x[4:]), theirs(x[4:]))


def test_stateless_attention_starts_from_rest_in_one_operation(monkeypatch):
    _, ours = layer_pair(attention.SpikingSelfAttention, stateful=False)
    fired = []
    real = swap.spiking_attention
    monkeypatch.setattr(
        swap, "spiking_attention", lambda *a, **k: fired.append(k.get("fire", "output")) or real(*a, **k)
    )
    ours.eval()
    x = inputs(attention.SpikingSelfAttention)
    first = ours(x)
    assert torch.equal(ours(x), first)  # nothing to reset
    with monitor.OutputMonitor(ours, neuron.BaseNode) as seen:
        assert torch.equal(ours(x), first)  # somebody looks: the neuron itself is called
        assert seen.monitored_layers == ["qkv_lif", "attn_lif", "proj_lif"]
        assert len(seen["attn_lif"]) == 1
    assert fired == ["output", "output", None]


@pytest.mark.parametrize("scale", [0.25, 0.3])
@pytest.mark.parametrize("stateful", [True, False])
def test_another_scale_is_taken(scale, stateful):
    theirs, ours = layer_pair(attention.SpikingSelfAttention, stateful)
    theirs.scale = ours.scale = scale
    x = inputs(attention.SpikingSelfAttention)
    assert torch.equal(ours(x), theirs(x))


@every_layer
@pytest.mark.parametrize("stateful", [True, False])
def test_potentials_can_be_kept(kind, stateful):
    theirs, ours = layer_pair(kind, stateful, store_v_seq=True)
    x = inputs(kind)
    assert torch.equal(ours(x), theirs(x))
    assert torch.equal(ours.attn_lif.v_seq, theirs.attn_lif.v_seq)


def test_step_mode_and_backend_reach_every_neuron():
    layer = attention.SpikingSelfAttention(12, 3)
    layer.proj_lif.step_mode = "s"
    swap_attention(layer, backend="torch")
    assert [layer.qkv_lif.step_mode, layer.attn_lif.step_mode, layer.proj_lif.step_mode] == ["m", "m", "s"]
    assert {layer.backend, layer.qkv_lif.backend, layer.attn_lif.backend, layer.proj_lif.backend} == {"torch"}
    layer.backend = "cupy"
    with pytest.raises(spikeattn.BackendUnavailableError, match='spiking_attention: backend "cupy"'):
        layer(torch.zeros(2, 1, 12, 5))


def test_float64_gives_the_same_bits():
    theirs, ours = layer_pair(attention.SpikingSelfAttention)
    x = inputs(attention.SpikingSelfAttention, dtype=torch.float64)
    assert torch.equal(ours.double()(x), theirs.double()(x))


@every_model
def test_state_dicts_load_both_ways(name):
    theirs, ours = pair(name)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    other, swapped = pair(name, seed=1)
    other.load_state_dict(ours.state_dict())
    swapped.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(run(other, x)[0], run(ours, x)[0])


def test_parameters_and_hooks_stay_the_same_objects():
    model = nn.Sequential(attention.SpikingSelfAttention(12, 3, spiking_neuron=neuron.ParametricLIFNode))
    parameters, layer = list(model.parameters()), model[0]
    seen = []
    layer.register_forward_hook(lambda *_: seen.append(True))
    assert swap_attention(model) is model
    assert model[0] is layer
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    model(torch.randn(2, 1, 12, 5))
    assert seen == [True]


def test_a_swapped_model_can_be_copied_and_pickled():
    _, ours = layer_pair(attention.SpikingSelfAttention)
    ours.eval()
    x = inputs(attention.SpikingSelfAttention)
    again = pickle.loads(pickle.dumps(copy.deepcopy(ours)))
    assert torch.equal(again(x), ours(x))


class DoubleNode(neuron.LIFNode):
    """A neuron of a user's, whose spikes are twos."""

    def multi_step_forward(self, x_seq):
        return 2 * super().multi_step_forward(x_seq)


class OtherSurrogate(surrogate.Sigmoid):
    """A surrogate of a user's."""


@every_layer
@pytest.mark.parametrize("keep", ["class", "hook", "surrogate", "threshold"])
def test_a_neuron_without_counterpart_stays(kind, keep, caplog):
    theirs, _ = layer_pair(kind)
    if keep == "class":
        theirs.attn_lif = DoubleNode(v_threshold=0.5, step_mode="m")
    elif keep == "hook":
        theirs.attn_lif.register_forward_hook(lambda _, args, out: 1 - out)
    elif keep == "surrogate":
        theirs.attn_lif.surrogate_function = OtherSurrogate()
    else:
        theirs.attn_lif.v_threshold = -0.5
    ours = swap_attention(copy.deepcopy(theirs))
    assert type(ours.attn_lif) is type(theirs.attn_lif)
    assert type(ours.q_lif if hasattr(ours, "q_lif") else list(ours.children())[1]) is spikeattn.LIF
    assert "left to spikingjelly: attn_lif" in caplog.text
    x = inputs(kind)
    assert torch.equal(ours(x), theirs(x))


def test_a_neuron_with_a_precision_of_its_own_stays():
    layer = attention.SpikingSelfAttention(12, 3)
    layer.proj_lif._neuron_precision = (torch.float16, "fp32", "fp32")  # as convert_model_for_precision sets it
    swap_attention(layer)
    assert type(layer.proj_lif) is neuron.LIFNode
    assert type(layer.attn_lif) is spikeattn.LIF


def test_products_of_other_values_than_spikes_stay(caplog):
    layers = [attention.SpikingSelfAttention(12, 3) for _ in range(3)]
    layers[0].qkv_lif = DoubleNode(step_mode="m")
    layers[1].qkv_lif.surrogate_function = surrogate.Sigmoid(spiking=False)
    model = swap_attention(nn.Sequential(*layers))
    kinds = ["SpikingSelfAttention", "SpikingSelfAttention", "FusedSelfAttention"]
    assert [type(layer).__name__ for layer in model] == kinds
    assert "0 (qkv_lif is DoubleNode, not known to give 0 and 1), 1 (qkv_lif is LIFNode" in caplog.text


def test_what_was_swapped_is_logged(caplog):
    caplog.set_level("INFO", "spikeattn")
    pair("qkformer_token")
    assert "swapped 2 QKAttention, 1 SpikingSelfAttention" in caplog.text


@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(2, 2), lambda: spikeattn.SpikingSelfAttention(8, 2), lambda: pair("sdt")[1]]
)
def test_a_model_with_nothing_to_swap_is_refused(make):
    model = make()
    with pytest.raises(ValueError, match=rf"not swapped yet, got none in {type(model).__name__}\.$"):
        swap_attention(model)


def test_a_refusal_names_what_was_left():
    layer = attention.SpikingSelfAttention(12, 3)
    layer.qkv_lif = DoubleNode(step_mode="m")
    with pytest.raises(ValueError, match=r"Left as they are: SpikingSelfAttention \(qkv_lif is DoubleNode"):
        swap_attention(layer)


def test_input_of_another_shape_is_refused():
    _, ours = layer_pair(attention.SpikingSelfAttention)
    with pytest.raises(ValueError, match=r"x_seq must be \[T, N, C, L\], got shape \(4, 24, 12\)"):
        ours(torch.zeros(4, 24, 12))


@every_layer
@pytest.mark.parametrize("stateful", [True, False])
def test_another_batch_needs_a_reset_where_state_is_kept(kind, stateful):
    _, ours = layer_pair(kind, stateful)
    ours(inputs(kind, N=2))
    if stateful:
        with pytest.raises(ValueError, match=r"functional\.reset_net"):
            ours(inputs(kind, N=3))
        functional.reset_net(ours)
    assert ours(inputs(kind, N=3)).shape[1] == 3
