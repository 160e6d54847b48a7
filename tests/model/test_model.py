"""The whole model: padding and neighbours never matter, sizes are the published ones, every neuron is alive."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_helpers import random_batch, small_config

from spikeattn import firing_rates
from spikemo_model import DialogueBatch, SpikEmo
from spikemo_model.config import DSWAConfig, FusionConfig, ModalityConfig, compact, iemocap, meld
from spikemo_model.data import collate, locate_meld

SUBSETS = [("text",), ("audio",), ("visual", "text"), ("text", "audio"), ("text", "audio", "visual")]


def part(batch, rows, L, order=None):
    """Some dialogues of a batch, cut to L places."""
    rows = torch.as_tensor(rows)
    return DialogueBatch(
        {name: x[rows, :L] for name, x in batch.features.items()},
        batch.speakers[rows, :L],
        batch.mask[rows, :L],
        batch.labels[rows, :L],
    )


@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    extra=st.integers(0, 3),
    fire=st.sampled_from(["output", "map"]),
    shared=st.booleans(),
    keys=st.sampled_from(["features", "layer"]),
    modalities=st.sampled_from(SUBSETS),
    contexts=st.permutations(["none", "forward", "bidirectional", "gru"]),
)
@settings(max_examples=25)
def test_padding_and_neighbours_never_change_a_prediction(lengths, extra, fire, shared, keys, modalities, contexts):
    dswa = DSWAConfig(time_steps=4, depth=1, num_heads=2, tau=2.0, fire=fire, shared=shared)
    fusion = FusionConfig(layers=2, num_heads=2, hidden=24, keys=keys)
    config = small_config(modalities, contexts, dswa=dswa, fusion=fusion)
    model = SpikEmo(config).double().eval()
    batch = random_batch(lengths, extra, modalities)
    with torch.no_grad():
        whole = model(batch).logits
        poisoned = DialogueBatch(
            {m: x.masked_fill(~batch.mask.unsqueeze(-1), 1e3) for m, x in batch.features.items()},
            batch.speakers,
            batch.mask,
        )
        torch.testing.assert_close(model(poisoned).logits[batch.mask], whole[batch.mask], rtol=1e-9, atol=1e-9)
        for b, n in enumerate(lengths):
            alone = model(part(batch, [b], n)).logits
            torch.testing.assert_close(whole[b : b + 1, :n], alone, rtol=1e-9, atol=1e-9)
        order = torch.randperm(len(lengths))
        shuffled = model(part(batch, order, batch.mask.shape[1])).logits
    torch.testing.assert_close(shuffled[batch.mask[order]], whole[order][batch.mask[order]], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("modalities", SUBSETS)
def test_any_modalities_give_logits_and_gradients(modalities):
    model = SpikEmo(small_config(modalities, ("bidirectional",) * 3)).double()
    batch = random_batch([3, 5], modalities=modalities)
    out = model(batch)
    assert out.logits.shape == (2, 5, 7)
    assert list(out.fused) == list(modalities)
    (out.logits[batch.mask] * torch.randn(8, 7)).sum().backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not missing


def test_the_published_configurations_have_the_published_number_of_live_parameters():
    centring = 2 * 256  # gain and bias of the LayerNorm before the encoder
    for preset, live in ((meld(), 24_621_063), (iemocap(), 31_258_118)):
        model = SpikEmo(preset.model)
        assert sum(p.numel() for p in model.parameters()) == live + centring
        published = SpikEmo(replace(preset.model, published_behaviour=True))
        assert sum(p.numel() for p in published.parameters()) == live


@pytest.mark.parametrize("preset", ["published", "compact"])
def test_every_layer_and_the_encoder_fire_on_real_meld_features(data, preset):
    corpus = locate_meld(data).corpus
    if preset == "compact":
        config = compact(corpus.widths).model
    else:
        config = replace(
            meld().model,
            modalities={"text": ModalityConfig(384, "none"), "audio": ModalityConfig(8, "forward")},
            fusion=FusionConfig(layers=1),
        )
        assert (config.dswa.time_steps, config.dswa.tau, config.dswa.v_threshold) == (32, 10.0, 1.0)
    batch = collate(corpus.splits["train"][:16])
    model = SpikEmo(config).eval()
    rates = firing_rates(model, batch, key_padding_mask=~batch.mask.repeat(2, 1))
    assert len(rates) == 1 + 7 * config.dswa.depth
    assert "dswa.shared.encoder" in rates
    assert all(0.01 < rate < 0.5 for rate in rates.values()), rates


def test_without_dswa_the_features_pass_unchanged():
    model = SpikEmo(small_config(dswa=None)).double().eval()
    batch = random_batch([3])
    seen = {}
    model.fusion.register_forward_hook(lambda module, args, out: seen.update(args[0]))
    model(batch)
    encoded = model.encoders(batch.features, batch.speakers, batch.mask)
    assert set(encoded) == set(batch.features)
    assert all(torch.equal(seen[name], wanted) for name, wanted in encoded.items())


def test_bad_batches_are_named():
    model = SpikEmo(small_config())
    batch = random_batch([2], dtype=torch.float32)
    with pytest.raises(ValueError, match="lacks the modality 'audio'; it has"):
        model(replace(batch, features={"text": batch.features["text"]}))
    wide = {**batch.features, "audio": torch.zeros(1, 2, 4)}
    with pytest.raises(ValueError, match="audio features must be 3 wide, got 4"):
        model(replace(batch, features=wide))
    with pytest.raises(ValueError, match=r"text must be \[B, L, F\]"):
        replace(batch, features={"text": torch.zeros(1, 3, 6)})
    with pytest.raises(TypeError, match="mask must be bool"):
        replace(batch, mask=batch.mask.float())
    with pytest.raises(ValueError, match="at least one modality"):
        replace(batch, features={})
    with pytest.raises(ValueError, match="speakers must be"):
        replace(batch, speakers=torch.zeros(1, 3).long())


def test_dropout_acts_in_training_only():
    model = SpikEmo(small_config(dropout=0.5, input_dropout=0.5)).double()
    batch = random_batch([4])
    assert not torch.equal(model(batch).logits, model(batch).logits)
    model.eval()
    assert torch.equal(model(batch).logits, model(batch).logits)


def without(batch, *names):
    return replace(batch, features={name: x for name, x in batch.features.items() if name not in names})


def test_a_model_of_all_modalities_refuses_a_batch_that_lacks_one_and_says_what_helps():
    with pytest.raises(ValueError, match=r"lacks the modality 'audio'.*modality_dropout"):
        SpikEmo(small_config()).double()(without(random_batch([3]), "audio"))


@pytest.mark.parametrize("missing", [("audio",), ("text", "visual")])
def test_missing_modalities_are_those_of_a_model_without_them(missing):
    model = SpikEmo(small_config(modality_dropout=0.3)).double().eval()
    batch = random_batch([5, 3])
    logits, fused = model(without(batch, *missing))
    assert set(fused) == set(batch.features) - set(missing)
    for name in missing:  # what its part of the model would do makes no difference
        for parameter in [*model.encoders[name].parameters(), *model.fusion.stacks[name].parameters()]:
            parameter.data.fill_(7.0)
    assert torch.equal(model(without(batch, *missing)).logits, logits)
    assert not torch.equal(model(batch).logits, logits)
    with pytest.raises(ValueError, match="has none of"):
        model(replace(batch, features={"other": batch.features["text"]}))
