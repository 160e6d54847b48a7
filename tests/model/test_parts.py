"""DialogueRNN, DSWA and MultiAttn against their equations, written out slowly."""

import pytest
import torch
from model_helpers import random_batch

from spikeattn import LIF
from spikemo_model.config import DSWAConfig, FusionConfig, ModalityConfig
from spikemo_model.context import (
    DialogueCell,
    DialogueRNN,
    GRUContext,
    ModalityEncoder,
    ModalityEncoders,
    reversed_order,
)  # fmt: skip
from spikemo_model.dswa import DynamicSpikingWeightAdaptation
from spikemo_model.fusion import MultiAttn

D = 16


def slow_dialogue(cell, u, speakers):
    """One dialogue [L, D]: a list of past global states, a dictionary of parties."""
    zero = u.new_zeros(D)
    g_past, parties, e, out = [], {}, zero, []
    for u_t, s in zip(u, speakers.tolist(), strict=True):
        p = parties.get(s, zero)
        g = cell.g_cell(torch.cat([u_t, p]), g_past[-1] if g_past else zero)
        if g_past:
            past = torch.stack(g_past)
            weights = torch.softmax(cell.attention(past).squeeze(-1), dim=0)
            c = weights @ past
        else:
            c = zero
        parties[s] = cell.p_cell(torch.cat([u_t, c]), p)
        e = cell.e_cell(parties[s], e)
        g_past.append(g)
        out.append(e)
    return torch.stack(out)


def test_dialogue_cell_is_its_equations():
    cell = DialogueCell(D).double()
    batch = random_batch([7, 4, 1])
    u = torch.randn(3, 7, D, dtype=torch.float64)
    states = cell(u, batch.speakers, batch.mask)
    for b, n in enumerate([7, 4, 1]):
        wanted = slow_dialogue(cell, u[b, :n], batch.speakers[b, :n])
        torch.testing.assert_close(states[b, :n], wanted, rtol=1e-12, atol=1e-12)


def test_large_scores_do_not_overflow_the_running_softmax():
    cell = DialogueCell(D).double()
    with torch.no_grad():
        cell.attention.weight.mul_(1e5)
    u = torch.randn(1, 9, D, dtype=torch.float64)
    speakers, mask = torch.zeros(1, 9).long(), torch.ones(1, 9).bool()
    wanted = slow_dialogue(cell, u[0], speakers[0])
    torch.testing.assert_close(cell(u, speakers, mask)[0], wanted, rtol=1e-10, atol=1e-10)


def test_the_reverse_direction_reads_each_dialogue_from_its_own_end():
    rnn = DialogueRNN(D, bidirectional=True).double().eval()
    batch = random_batch([6, 3])
    u = torch.randn(2, 6, D, dtype=torch.float64)
    out = rnn(u, batch.speakers, batch.mask)
    for b, n in enumerate([6, 3]):
        own, who = u[b, :n], batch.speakers[b, :n]
        both = torch.cat(
            [
                slow_dialogue(rnn.forward_cell, own, who),
                slow_dialogue(rnn.reverse_cell, own.flip(0), who.flip(0)).flip(0),
            ],
            dim=-1,
        )
        torch.testing.assert_close(out[b, :n], torch.relu(rnn.merge(both)), rtol=1e-12, atol=1e-12)


def test_modalities_that_advance_together_do_not_meet():
    contexts = ["bidirectional", "none", "forward", "gru", "bidirectional"]
    configs = {f"m{i}": ModalityConfig(5 + i, context) for i, context in enumerate(contexts)}
    encoders = ModalityEncoders({name: ModalityEncoder(config, D) for name, config in configs.items()}).double()
    batch = random_batch([7, 4])
    features = {name: torch.randn(2, 7, config.features, dtype=torch.float64) for name, config in configs.items()}
    encoded = encoders(features, batch.speakers, batch.mask)
    assert list(encoded) == list(features)
    for name, encoder in encoders.items():
        alone = ModalityEncoders({name: encoder})(features, batch.speakers, batch.mask)[name]
        torch.testing.assert_close(encoded[name], alone, rtol=1e-12, atol=1e-12)


def test_reversed_order_is_its_own_inverse():
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    order = reversed_order(mask)
    assert order.tolist() == [[2, 1, 0, 3], [0, 1, 2, 3]]
    assert torch.equal(order.gather(1, order), torch.arange(4).expand(2, 4))


def test_dswa_is_its_equations():
    dswa = DynamicSpikingWeightAdaptation(D, DSWAConfig(time_steps=5, depth=1, num_heads=2, tau=2.0)).double()
    x = torch.randn(1, 6, D, dtype=torch.float64)
    mask = torch.ones(1, 6, dtype=torch.bool)
    spikes = (dswa.centre(x) >= 0).double()
    E = dswa.norm(dswa.blocks(spikes.expand(5, 1, 6, D))).mean(0)
    wanted = torch.exp(E) / torch.exp(E).sum(1, keepdim=True) * x + x
    torch.testing.assert_close(dswa(x, mask), wanted, rtol=1e-12, atol=1e-12)


def test_a_dialogue_of_one_utterance_is_doubled():
    dswa = DynamicSpikingWeightAdaptation(D, DSWAConfig(time_steps=3, depth=1, num_heads=2)).double()
    x = torch.randn(2, 1, D, dtype=torch.float64)
    assert torch.equal(dswa(x, torch.ones(2, 1, dtype=torch.bool)), 2 * x)


def test_the_encoder_sees_features_that_are_never_negative():
    x = torch.randn(4, 9, D).relu()
    centred = DynamicSpikingWeightAdaptation(D, DSWAConfig(time_steps=2, depth=1, num_heads=2))
    published = DynamicSpikingWeightAdaptation(D, DSWAConfig(time_steps=2, depth=1, num_heads=2), published=True)
    assert published.encoder(published.centre(x)).mean() == 1.0
    assert 0.05 < centred.encoder(centred.centre(x)).mean() < 0.5


def test_membranes_are_carried_only_as_published_and_until_reset():
    config = DSWAConfig(time_steps=3, depth=1, num_heads=2, tau=2.0)
    x, mask = torch.randn(2, 5, D), torch.ones(2, 5, dtype=torch.bool)
    ours = DynamicSpikingWeightAdaptation(D, config)
    assert torch.equal(ours(x, mask), ours(x, mask))
    published = DynamicSpikingWeightAdaptation(D, config, published=True)
    first, second = published(x, mask), published(x, mask)
    assert not torch.equal(first, second)
    published.reset()
    assert torch.equal(published(x, mask), first)
    assert all(m.stateful for m in published.modules() if isinstance(m, LIF))


@pytest.mark.parametrize("keys", ["features", "layer"])
def test_multiattn_attends_in_the_published_order(keys):
    names = ["text", "audio", "visual"]
    fusion = MultiAttn(names, D, FusionConfig(layers=2, num_heads=2, hidden=8, keys=keys)).double().eval()
    features = {name: torch.randn(1, 4, D, dtype=torch.float64) for name in names}
    mask = torch.tensor([[True, True, True, False]])
    out = fusion(features, mask)
    order = {"text": ["audio", "visual"], "audio": ["text", "visual"], "visual": ["text", "audio"]}
    state = dict(features)
    for layer in range(2):
        source = features if keys == "features" else state
        after = {}
        for name, others in order.items():
            block = fusion.stacks[name][layer]
            x = state[name]
            for attention, norm, other in zip(block.attentions, block.norms, others, strict=False):
                attended, _ = attention(x[:, :], source[other][:, :3], source[other][:, :3])
                x = norm(x + attended)
            after[name] = block.norms[-1](x + block.feed_forward(x))
        state = after
    for name in names:
        torch.testing.assert_close(out[name], state[name], rtol=1e-10, atol=1e-10)


def test_one_modality_has_no_attention():
    fusion = MultiAttn(["text"], D, FusionConfig(layers=3, num_heads=2, hidden=8))
    assert sum(isinstance(m, torch.nn.MultiheadAttention) for m in fusion.modules()) == 0
    x = torch.randn(2, 3, D)
    out = fusion({"text": x}, torch.ones(2, 3, dtype=torch.bool))["text"]
    for layer in fusion.stacks["text"]:
        x = layer.norms[0](x + layer.feed_forward(x))
    assert torch.equal(out, x)


def test_gru_context_is_two_grus_beside_the_utterance():
    lengths, D = [4, 1, 3], 6
    context = GRUContext(D).double().eval()
    mask = torch.arange(5) < torch.tensor(lengths).unsqueeze(1)
    u = torch.randn(3, 5, D, dtype=torch.float64)
    out = context(u, torch.zeros(3, 5).long(), mask)
    for b, L in enumerate(lengths):
        own = torch.relu(u[b : b + 1, :L])
        ahead, _ = context.forward_gru(own)
        back, _ = context.reverse_gru(own.flip(1))
        torch.testing.assert_close(out[b : b + 1, :L], own + torch.cat([ahead, back.flip(1)], -1), rtol=0, atol=1e-12)
