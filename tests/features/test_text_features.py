"""Windows of an utterance and its context, and the vectors of their own tokens."""

import shutil
from pathlib import Path

import pytest
import torch
from feature_helpers import LINES

from spikemo_model.data import Conversation, DataError
from spikemo_model.features.text import ContextEncoder


def conversation(texts, speakers=None) -> Conversation:
    n = len(texts)
    names = tuple(speakers or ["A"] * n)
    return Conversation(
        "d", {}, names, torch.zeros(n, dtype=torch.long), tuple(f"u{i}" for i in range(n)), tuple(texts)
    )


@pytest.fixture(scope="module")
def context(text_encoder) -> ContextEncoder:
    return ContextEncoder(text_encoder)


def read(context, window) -> tuple[str, str]:
    """A window as text, and its own part of it."""
    return context.tokenizer.decode(window.ids), context.tokenizer.decode(window.ids[window.own])


def test_a_window_holds_the_utterance_with_its_speaker_between_past_and_future(context):
    windows = context.windows(conversation(["a b", "c \N{FACE WITH TEARS OF JOY}", "d"], ["Joey", "Ross", "Joey"]))
    assert [read(context, w) for w in windows] == [
        ("<s></s>Joey: a b</s>Ross: c \N{FACE WITH TEARS OF JOY}Joey: d</s>", "Joey: a b"),
        ("<s>Joey: a b</s>Ross: c \N{FACE WITH TEARS OF JOY}</s>Joey: d</s>", "Ross: c \N{FACE WITH TEARS OF JOY}"),
        ("<s>Joey: a bRoss: c \N{FACE WITH TEARS OF JOY}</s>Joey: d</s></s>", "Joey: d"),
    ]
    (alone,) = context.windows(conversation([""]))
    assert read(context, alone) == ("<s></s>A: </s></s>", "A: ")


def test_the_nearest_neighbours_come_first_whole_up_to_the_encoders_limit(text_encoder, context):
    assert context.max_tokens == 64
    dialogue = conversation([f"{i}" * 9 for i in range(10)], [str(i) for i in range(10)])
    size = len(context.tokenizer("5: 555555555", add_special_tokens=False)["input_ids"])
    for i, window in enumerate(context.windows(dialogue)):
        text, own = read(context, window)
        assert own == f"{i}: {str(i) * 9}"
        room = (64 - 4 - size) // size
        included = [j for j in range(10) if f"{j}: " in text]
        nearest = sorted(range(10), key=lambda j: (abs(j - i), j))  # the past first, then the future
        assert included == sorted(nearest[: 1 + room])
        assert len(window.ids) <= 64


@pytest.mark.parametrize("text", ["word " * 2_000, "\N{FACE WITH TEARS OF JOY}" * 100, "", "."])
def test_texts_of_any_length_give_finite_vectors(context, text):
    dialogue = conversation(["before", text, "after"])
    assert all(len(window.ids) <= 64 for window in context.windows(dialogue))
    x = context.features(dialogue)
    assert x.shape == (3, 32)
    assert x.isfinite().all()


def test_500_utterances_are_encoded(context):
    x = context.features(conversation([f"line {i}" for i in range(500)]))
    assert x.shape == (500, 32)
    assert len(x.unique(dim=0)) == 500


def test_a_vector_is_the_mean_of_the_last_hidden_states_at_the_own_tokens(context):
    dialogue = conversation([text for _, text, _ in LINES])
    windows = context.windows(dialogue)
    with torch.no_grad():
        expected = [context.model(input_ids=w.ids[None]).last_hidden_state[0, w.own].mean(0) for w in windows]
    for batch_size in (1, 3, 16):
        torch.testing.assert_close(context.features(dialogue, batch_size), torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_past_future_and_speaker_all_reach_a_vector(context):
    base = context.features(conversation(["x", "same", "y"]))[1]
    for texts, speakers in ((["z", "same", "y"], "AAA"), (["x", "same", "z"], "AAA"), (["x", "same", "y"], "ABA")):
        assert (context.features(conversation(texts, speakers))[1] - base).abs().max() > 1e-3


def test_a_shorter_window_may_be_asked_for(text_encoder):
    short = ContextEncoder(text_encoder, 8)
    (window,) = short.windows(conversation(["a rather long line of text"]))
    assert len(window.ids) == 8
    for wrong in (7, 65):
        with pytest.raises(ValueError, match=rf"max_tokens must be 8 \.\.\. 64 for .*, got {wrong}"):
            ContextEncoder(text_encoder, wrong)


def test_a_dialogue_without_transcripts_is_an_error(context):
    silent = Conversation("d", {}, ("A",), torch.tensor([0]), ("u",))
    with pytest.raises(DataError, match="dialogue d has no transcripts"):
        context.features(silent)


def test_an_encoder_that_cannot_be_loaded_says_what_to_download(text_encoder, tmp_path, monkeypatch):
    cure = r"download config\.json, model\.safetensors and the tokenizer's files of roberta-base"
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match=rf"empty' cannot be loaded .*{cure}"):
        ContextEncoder(str(tmp_path / "empty"))
    folder = Path(shutil.copytree(text_encoder, tmp_path / "cut"))
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(OSError, match=rf"its weights cannot be read.*{cure}"):
        ContextEncoder(str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match=cure):
        ContextEncoder(str(folder))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=rf"'roberta-base' cannot be loaded .*{cure}"):
        ContextEncoder()
