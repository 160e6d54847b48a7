"""A causal SpikEmo takes a conversation as it goes on."""

import itertools
from dataclasses import replace

import pytest
import torch
from model_helpers import random_batch, small_config

from spikemo_model import DialogueBatch, SpikEmo
from spikemo_model.config import DSWAConfig, FusionConfig

CONTEXTS = ("none", "forward", "forward")


def causal(**kwargs):
    return SpikEmo(small_config(contexts=CONTEXTS, is_causal=True, **kwargs)).double().eval()


def part(batch, a, b):
    """Utterances ``a`` to ``b`` of a batch."""
    features = {name: x[:, a:b] for name, x in batch.features.items()}
    return DialogueBatch(features, batch.speakers[:, a:b], batch.mask[:, a:b])


def stream(model, batch, cuts):
    """Logits of all utterances, given piece by piece."""
    logits, state = [], None
    for a, b in itertools.pairwise([0, *cuts, batch.mask.shape[1]]):
        output, state = model.step(part(batch, a, b), state)
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


OPTIONS = [
    {},
    {"dswa": None},
    {"dswa": DSWAConfig(time_steps=4, depth=2, num_heads=2, tau=2.0, shared=False)},
    {"dswa": DSWAConfig(time_steps=4, depth=1, num_heads=2, tau=2.0, fire="map")},
    {"fusion": FusionConfig(layers=3, num_heads=2, hidden=24, keys="layer")},
    {"modalities": ("audio",)},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "default")
@pytest.mark.parametrize("cuts", [range(1, 9), [4], [1, 2, 7]], ids=["one by one", "halves", "pieces"])
def test_a_stream_equals_the_whole_dialogue(options, cuts):
    model = causal(**options)
    batch = random_batch([9, 9], parties=4)
    whole = model(batch).logits
    torch.testing.assert_close(stream(model, batch, list(cuts)), whole, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "default")
def test_no_utterance_sees_a_later_one(options):
    model = causal(**options)
    batch = random_batch([9, 9])
    later = (torch.arange(9) >= 5).unsqueeze(-1)
    moved = replace(batch, features={name: x + later for name, x in batch.features.items()})
    before, after = model(batch).logits, model(moved).logits
    torch.testing.assert_close(after[:, :5], before[:, :5], rtol=1e-10, atol=1e-10)
    assert (before[:, 5:] != after[:, 5:]).all(-1).all()


def test_padding_changes_nothing_in_a_causal_model():
    model = causal()
    batch = random_batch([7, 3], extra=2)
    logits = model(batch).logits
    for b, n in enumerate([7, 3]):
        alone = DialogueBatch(
            {name: x[b : b + 1, :n] for name, x in batch.features.items()},
            batch.speakers[b : b + 1, :n],
            batch.mask[b : b + 1, :n],
        )
        torch.testing.assert_close(logits[b, :n], model(alone).logits[0], rtol=1e-10, atol=1e-10)


def test_a_causal_model_trains():
    model = causal().train()
    batch = random_batch([6, 4])
    torch.nn.functional.cross_entropy(model(batch).logits[batch.mask], batch.labels[batch.mask]).backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not missing


def test_what_cannot_stream_says_so():
    batch = random_batch([4])
    with pytest.raises(ValueError, match="step needs a configuration with is_causal=True"):
        SpikEmo(small_config()).double().eval().step(batch)
    with pytest.raises(ValueError, match=r"and eval\(\)"):
        causal().train().step(batch)
    with pytest.raises(ValueError, match="without padding"):
        causal().step(random_batch([4, 2]))
    with pytest.raises(ValueError, match=r'is_causal needs contexts "none" or "forward"'):
        small_config(is_causal=True)
    with pytest.raises(ValueError, match="is_causal excludes published_behaviour"):
        small_config(contexts=CONTEXTS, is_causal=True, published_behaviour=True)


def test_a_stream_goes_on_with_what_it_began_with():
    model = SpikEmo(small_config(contexts=CONTEXTS, is_causal=True, modality_dropout=0.2)).double().eval()
    batch = random_batch([4, 4])
    text = replace(batch, features={"text": batch.features["text"]})
    _, state = model.step(part(text, 0, 2))
    again, _ = model.step(part(text, 2, 4), state)
    torch.testing.assert_close(again.logits, model(text).logits[:, 2:], rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match=r"before, 2 of \['text'\], got 2 of \['text', 'audio', 'visual'\]"):
        model.step(part(batch, 2, 4), state)
    alone = random_batch([2], modalities=("text",))
    with pytest.raises(ValueError, match=r"2 of \['text'\], got 1 of \['text'\]"):
        model.step(alone, state)
    with pytest.raises(ValueError, match="without padding"):
        model.step(part(text, 0, 0))
