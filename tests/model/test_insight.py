"""What the report measures on a model, against values worked out by hand or by other means."""

import math

import pytest
import torch
from model_helpers import small_config
from report_helpers import conversations
from spikingjelly.activation_based.neuron import BaseNode
from torch import nn

from spikeattn import Spike, firing_rates
from spikemo_model import SpikEmo
from spikemo_model.config import DSWAConfig
from spikemo_model.data.corpus import Conversation, collate
from spikemo_model.evaluation import predict, score
from spikemo_model.insight import (
    Judged,
    costs,
    gates,
    judge,
    largest_errors,
    measure,
    rasters,
    subset_scores,
    with_relu,
)

SMALL = {"time_steps": 4, "num_heads": 2, "tau": 2.0}
MODELS = {
    "shared": small_config(dswa=DSWAConfig(depth=2, **SMALL)),
    "own": small_config(dswa=DSWAConfig(depth=1, shared=False, **SMALL)),
    "map": small_config(dswa=DSWAConfig(depth=1, fire="map", **SMALL)),
    "published": small_config(published_behaviour=True),
    "causal": small_config(contexts=("none", "forward", "forward"), is_causal=True),
    "one": small_config(modalities=("audio",), contexts=("gru",)),
}
every_model = pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)


def batch_of(lengths, **kwargs):
    return collate(conversations(lengths, **kwargs).splits["test"])


def test_a_dialogue_is_judged_by_its_labelled_utterances():
    dialogue = Conversation("x", {}, ("a", "b", "a"), torch.tensor([0, -1, 1]), ("0", "1", "2"), ("Hi.", "No!", ""))
    judged = judge(dialogue, torch.tensor([[0.5, 0.5 - 0.25, 0.25], [0.0, 0.0, 1.0], [0.9, 0.1, 0.0]]), ("p", "q", "r"))
    assert judged.error == pytest.approx((math.log(2) + math.log(10)) / 2, rel=1e-6)
    assert [line[:4] for line in judged.lines] == [("a", "Hi.", "p", "p"), ("b", "No!", "", "r"), ("a", "", "q", "p")]
    assert [line.probability for line in judged.lines] == pytest.approx([0.5, 1.0, 0.9])
    assert judged.lines[1].label_probability is None
    assert judged.lines[2].label_probability == pytest.approx(0.1)
    impossible = judge(dialogue, torch.tensor([[0.0, 1.0, 0.0]] * 3), ("p", "q", "r"))
    assert 40 < impossible.error < 50  # half of -log of the smallest number, not infinite
    unknown = Conversation("y", {}, ("a",), torch.tensor([-1]), ("0",))
    assert math.isnan(judge(unknown, torch.tensor([[0.2, 0.8]]), ("p", "q")).error)


def test_the_largest_errors_come_first_and_short_dialogues_only_if_there_are_no_others():
    def judged(name, error, length):
        return Judged(name, error, [None] * length)

    several = [
        judged("a", 1.0, 3),
        judged("b", 3.0, 9),
        judged("c", 9.0, 1),
        judged("d", math.nan, 5),
        judged("e", 2.0, 4),
    ]
    assert [dialogue.id for dialogue in largest_errors(several)] == ["b", "e", "a"]
    assert [dialogue.id for dialogue in largest_errors(several, count=1)] == ["b"]
    assert [dialogue.id for dialogue in largest_errors([judged("x", 1.0, 1), judged("y", 2.0, 2)])] == ["y", "x"]


@every_model
def test_gates_are_the_softmax_of_equation_2_around_1(config):
    model = SpikEmo(config).eval().double()
    batch = batch_of((5,), modalities=tuple(config.modalities))
    batch = type(batch)({m: x.double() for m, x in batch.features.items()}, batch.speakers, batch.mask)
    found = gates(model, batch)
    encoded = model.encoders(batch.features, batch.speakers, batch.mask)
    assert list(found) == list(config.modalities)
    for name, x in encoded.items():
        dswa = model.dswa["shared" if "shared" in model.dswa else name]
        with torch.no_grad():
            relevance = dswa.norm(dswa.blocks(dswa._encoded(x, None if dswa.published else ~batch.mask))).mean(0)
        if config.is_causal:
            softmax = [torch.softmax(relevance[:, : i + 1], dim=1)[:, i] * (i + 1) for i in range(5)]
            expected = torch.stack(softmax, dim=1)
        else:
            expected = torch.softmax(relevance, dim=1) * 5
        expected = expected.masked_fill(x == 0, math.nan).nanmean(-1)[0]
        torch.testing.assert_close(found[name], expected, equal_nan=True)
    assert max(gate.std() for gate in found.values()) > 1e-3


@every_model
def test_one_utterance_alone_has_a_gate_of_1(config):
    model = SpikEmo(config).eval()
    for gate in gates(model, batch_of((1,), modalities=tuple(config.modalities))).values():
        torch.testing.assert_close(gate, torch.ones(1), rtol=1e-5, atol=1e-5)


@every_model
def test_rasters_hold_the_spikes_of_every_layer(config):
    model, batch = SpikEmo(config).eval(), batch_of((5,), modalities=tuple(config.modalities))
    rates = firing_rates(model, batch)
    found = rasters(model, batch)
    assert {f"dswa.{owner}.{layer}" for owner in model.dswa for layer in found} == set(rates)
    for layer, by_modality in found.items():
        assert list(by_modality) == list(config.modalities)
        assert {tuple(spikes.shape[:2]) for spikes in by_modality.values()} == {(4, 5)}
        for owner in model.dswa:
            own = by_modality.values() if owner == "shared" else [by_modality[owner]]
            spikes = torch.stack(list(own))
            assert set(spikes.unique().tolist()) <= {0.0, 1.0}
            assert spikes.double().mean().item() == pytest.approx(rates[f"dswa.{owner}.{layer}"], rel=1e-9)


def test_with_relu_no_neuron_is_left_in_the_copy_and_all_in_the_model():
    model, batch = SpikEmo(MODELS["shared"]).eval(), batch_of((5,))
    before = model(batch).logits
    relu = with_relu(model)
    kinds = (BaseNode, Spike)
    assert not any(isinstance(module, kinds) for module in relu.modules())
    assert sum(isinstance(module, kinds) for module in model.modules()) == 15
    assert sum(isinstance(module, nn.ReLU) for module in relu.dswa.modules()) == 15
    assert relu.dswa["shared"].time_steps == 1
    assert torch.equal(model(batch).logits, before)
    assert not torch.equal(relu(batch).logits, before)
    assert relu.state_dict().keys() == model.state_dict().keys()


def test_costs_are_those_counted_by_hand():
    config = small_config(("text", "audio"), ("none", "none"), dswa=DSWAConfig(depth=1, mlp_ratio=2.0, **SMALL))
    model, batch = SpikEmo(config).eval(), batch_of((5,), modalities=("text", "audio"))
    T, M, L, D, H, hidden = 4, 2, 5, 16, 2, 32
    found = costs(model, batch)
    attention = 2 * M * L * L * D  # Q K^T and the product with V: L < D / H
    assert found.relu.mac == M * L * (4 * D * D + 2 * D * hidden) + attention
    assert found.relu.synop == 0
    assert found.relu.memory_bytes == 4 * M * L * (4 * D * D + 2 * D * hidden + 5 * D + hidden)

    spikes = {layer: torch.stack(list(own.values())) for layer, own in rasters(model, batch).items()}  # [M, T, L, N]
    fired = {layer.removeprefix("blocks.blocks.0."): int(x.sum()) for layer, x in spikes.items()}
    q, k = (spikes[f"blocks.blocks.0.attn.{name}.lif"].unflatten(-1, (H, -1)) for name in "qk")
    scores = int(torch.einsum("mtihe,mtjhe->", q, k))
    synapses = fired["encoder"] // T * 3 * D + (fired["attn.attn_lif"] + fired["mlp.fc1.lif"]) * D
    assert found.spiking.synop == synapses + scores + fired["attn.v.lif"] * L
    assert found.spiking.mac == T * M * L * D * hidden  # the MLP is given sums of spikes

    fusion = 2 * M * (L * (4 * D * D + 2 * D * 24) + 2 * L * L * D)  # two layers
    classifier = L * (M * D * D + D * 12 + 12 * 7)
    assert found.rest.mac == L * D * (6 + 3) + fusion + classifier
    assert (found.prices.e_mac_pj, found.prices.e_ac_pj) == (4.6, 0.9)
    assert found.spiking.compute_pj == pytest.approx(4.6 * found.spiking.mac + 0.9 * found.spiking.ac)
    assert found.spiking.memory_pj == pytest.approx(24.96 * found.spiking.memory_bytes)


@every_model
def test_every_model_can_be_counted(config):
    model, batch = SpikEmo(config).eval(), batch_of((3,), modalities=tuple(config.modalities))
    found = costs(model, batch)
    assert 0 < found.spiking.synop < found.spiking.ac
    assert found.relu.synop == found.rest.synop == 0
    assert min(found.relu.mac, found.rest.mac) > 0


def test_each_subset_of_the_modalities_is_scored_without_the_others():
    corpus, model = conversations((10, 4, 7)), SpikEmo(small_config(modality_dropout=0.2)).eval()
    found = subset_scores(model, corpus)
    names = ("text", "audio", "visual")
    pairs = [("text", "audio"), ("text", "visual"), ("audio", "visual")]
    assert list(found) == [("text",), ("audio",), ("visual",), *pairs, names]
    for subset in (("visual",), ("text", "audio"), names):
        test = corpus.select(subset).splits["test"]
        assert found[subset] == score(predict(model, test), test, corpus.classes).weighted_f1
    assert len(set(found.values())) > 1


def test_a_measure_has_the_parts_that_the_model_has():
    corpus = conversations((3, 12, 9, 1))
    full = measure(SpikEmo(small_config()), corpus)
    assert full.shown.id == "d2"  # of the length nearest to 10
    assert len(full.gates["text"]) == 9
    assert len(full.errors) == 3  # not the dialogue of one
    assert full.subsets == {}
    plain = measure(SpikEmo(small_config(dswa=None, modality_dropout=0.1)), corpus)
    assert (plain.gates, plain.rasters, plain.costs) == ({}, {}, None)
    assert len(plain.subsets) == 7
