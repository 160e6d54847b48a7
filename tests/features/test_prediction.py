"""A model that remembers its extractors classifies from text and clips alone, with the features it was trained on."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from spikemo_model import SpikEmo, SpikEmoConfig, Utterance
from spikemo_model.config import DSWAConfig, FusionConfig, ModalityConfig
from spikemo_model.conversation import ConversationError
from spikemo_model.data import Conversation
from spikemo_model.data.text import encoder_features
from spikemo_model.features import ContextEncoder, FaceEncoder, Pictures, faces, functionals
from spikemo_model.hub import Origin

WIDTHS = {"text": 32, "audio": 6373, "visual": 12}


def remembering(extractors):
    """A small model of the modalities of ``extractors``, with random weights."""
    config = SpikEmoConfig(
        {name: ModalityConfig(WIDTHS[name], "forward") for name in extractors},
        dim=16,
        classifier_hidden=12,
        dswa=DSWAConfig(time_steps=2, depth=1, num_heads=2, tau=2.0),
        fusion=FusionConfig(layers=1, num_heads=2, hidden=16),
    )
    model = SpikEmo(config).eval()
    constants = {"audio": (torch.zeros(6373), torch.full((6373,), 100.0))} if "audio" in extractors else {}
    model.origin = Origin(data="made up", extractors=extractors, standardised=constants)
    return model


def test_text_is_read_in_its_dialogue_by_the_encoder_of_the_model(text_encoder, tmp_path):
    extractor = {"name": "ContextEncoder", "encoder": text_encoder, "max_tokens": 40}
    remembering({"text": extractor}).save_pretrained(tmp_path / "model")
    model = SpikEmo.from_pretrained(tmp_path / "model")
    texts = ["Hi.", "", "Oh my God! 🙂", "no " * 3333]
    utterances = [Utterance(who, text) for who, text in zip("abac", texts, strict=True)]
    rows = model.predict(utterances)
    dialogue = Conversation("d", {}, tuple("abac"), torch.full((4,), -1), tuple("1234"), tuple(texts))
    features = ContextEncoder(text_encoder, 40).features(dialogue)
    given = [replace(u, features={"text": x}) for u, x in zip(utterances, features, strict=True)]
    assert model.predict(given) == rows
    assert model.predict(utterances[2:]) != rows[2:]
    mixed = [replace(utterances[0], features={"text": features[0] + 1}), *utterances[1:]]
    assert model.predict(mixed)[0] != rows[0]


def test_text_is_read_alone_where_the_model_was_trained_so(text_encoder):
    model = remembering({"text": {"name": "encoder_features", "encoder": text_encoder}})
    texts = ["Hi.", "Oh!"]
    features = encoder_features({"test": texts}, text_encoder)["test"]
    wanted = model.predict([Utterance("a", "", {"text": x}) for x in features])
    assert model.predict([Utterance("a", text) for text in texts]) == wanted


def test_an_encoder_that_is_gone_is_named(tmp_path):
    (tmp_path / "gone").mkdir()
    for name in ("encoder_features", "ContextEncoder"):
        model = remembering({"text": {"name": name, "encoder": str(tmp_path / "gone"), "max_tokens": 40}})
        with pytest.raises(OSError, match=r"the encoder '.*gone' cannot be loaded"):
            model.predict([Utterance("a", "Hi.")])


@pytest.fixture
def film(face_encoder):
    """A model that sees and hears."""
    visual = {"name": "FaceEncoder", "encoder": face_encoder, "pictures": 4}
    return remembering({"audio": {"name": "functionals"}, "visual": visual})


def test_sound_and_faces_come_from_the_clip(film, clip, face_encoder):
    features = {"audio": functionals(clip), "visual": FaceEncoder(face_encoder)(faces(Pictures(clip), 4))}
    assert features["visual"].any()
    wanted = film.predict([Utterance("a", "", features)])
    assert film.predict([Utterance("a", "", clip=clip)]) == wanted
    assert film.predict([Utterance("a", "", {"audio": features["audio"]}, clip)]) == wanted


def test_what_no_clip_gives_is_named(film, clip, tmp_path):
    good = Utterance("a", "", clip=clip)
    (tmp_path / "empty.mp4").touch()
    for bad, message in (
        (Utterance("a"), "there are no audio features and no clip"),
        (Utterance("a", clip=Path("nowhere.mp4")), "there is no nowhere.mp4"),
        (Utterance("a", clip=tmp_path / "empty.mp4"), r"empty\.mp4 cannot be decoded"),
    ):
        with pytest.raises(ConversationError, match=f"utterance 2: .*{message}"):
            film.predict([good, bad])
    film.origin = replace(film.origin, extractors={"audio": {"name": "functionals", "reduced_to": 20}})
    with pytest.raises(ConversationError, match="the model cannot make them"):
        film.predict([good])


def test_silent_and_very_long_clips_are_classified_and_an_empty_one_is_one_line(tmp_path):
    hearing = remembering({"audio": {"name": "functionals"}})
    clips = {seconds: tmp_path / f"{seconds}.wav" for seconds in (0, 1, 305)}
    for seconds, path in clips.items():
        soundfile.write(path, np.zeros(seconds * 16_000), 16_000)
    rows = hearing.predict([Utterance("a", "", clip=clips[1]), Utterance("nobody knows", "🙂", clip=clips[305])])
    assert [sum(row.values()) for row in rows] == pytest.approx([1, 1], abs=1e-5)
    with pytest.raises(ConversationError, match=r"utterance 2: .*0\.wav has 0\.000 s of sound") as caught:
        hearing.predict([Utterance("a", clip=clips[1]), Utterance("a", clip=clips[0])])
    assert len(str(caught.value).splitlines()) == 1
