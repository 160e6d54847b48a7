"""A live conversation hears what one pass over the whole conversation hears."""

import pytest
import torch
from model_helpers import small_config

from spikemo_model import SpikEmo
from spikemo_model.conversation import ConversationError, Utterance
from spikemo_model.hub import Origin
from spikemo_model.live import LiveConversation


def causal():
    return SpikEmo(small_config(("text", "audio"), ("forward", "none"), is_causal=True))


def conversation(length=6):
    speakers = ["Joey", "Rachel", "Joey", "Ross", "Rachel", "Ross"]
    return [
        Utterance(speakers[i % 6], f"utterance {i}", {"text": torch.randn(6), "audio": torch.randn(3)})
        for i in range(length)
    ]


def test_what_is_heard_live_is_what_the_whole_conversation_says():
    model = causal()
    model.origin = Origin(standardised={"audio": (torch.full((3,), 0.5), torch.full((3,), 2.0))})
    said = conversation()
    live = LiveConversation(model)
    heard = [live.add(utterance) for utterance in said]
    for own, wanted in zip(heard, model.predict(said), strict=True):
        assert own.keys() == wanted.keys()
        assert list(own.values()) == pytest.approx(list(wanted.values()), abs=1e-5)


def test_two_conversations_do_not_meet():
    model, said = causal(), conversation()
    first, second = LiveConversation(model), LiveConversation(model)
    for utterance in said[:4]:
        first.add(utterance)
    assert second.add(said[0]) == LiveConversation(model).add(said[0])


def test_what_cannot_be_heard_live_says_so():
    with pytest.raises(ValueError, match="train one with is_causal"):
        LiveConversation(SpikEmo(small_config()))
    live = LiveConversation(causal())
    with pytest.raises(ConversationError, match="audio"):
        live.add(Utterance("Joey", "hm", {"text": torch.randn(6)}))
    live.model.origin = Origin(extractors={"text": {"name": "ContextEncoder", "encoder": "x", "max_tokens": 8}})
    with pytest.raises(ConversationError, match="future included"):
        live.add(Utterance("Joey", "hm", {"audio": torch.randn(3)}))


def test_other_modalities_than_before_are_named_and_change_nothing():
    model = SpikEmo(small_config(("text", "audio"), ("forward", "none"), is_causal=True, modality_dropout=0.3))
    text, audio = {"text": torch.randn(6)}, {"audio": torch.randn(3)}
    live, other = LiveConversation(model), LiveConversation(model)
    assert live.add(Utterance("Joey", "", text)) == other.add(Utterance("Joey", "", text))
    with pytest.raises(ConversationError, match=r"^line 2: there are text and audio features, but text in the utt"):
        live.add(Utterance("Ross", "", {**audio, **text}, where="line 2"))
    with pytest.raises(ConversationError, match=r"^LiveConversation: there are audio .* for the whole conversation"):
        live.add(Utterance("Ross", "", audio))
    assert live.add(Utterance("Rachel", "", text)) == other.add(Utterance("Rachel", "", text))
