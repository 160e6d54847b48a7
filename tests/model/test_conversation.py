"""Conversations of users: read from JSON Lines and CSV, classified, and refused by line."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from model_helpers import small_config
from safetensors.torch import save_file

from spikemo_model import SpikEmo, SpikEmoConfig, Utterance
from spikemo_model.config import ModalityConfig
from spikemo_model.conversation import ConversationError, read_conversations, read_live
from spikemo_model.data import Conversation, standardise, synthetic_corpus
from spikemo_model.data.corpus import reduce_by
from spikemo_model.evaluation import predict
from spikemo_model.hub import Origin
from spikemo_model.prediction import fit

GOOD = {"speaker": "Joey", "text": "Hi."}
WIDTHS = {"text": 6, "audio": 3, "visual": 5}


def drawn():
    """Features of one utterance."""
    return {name: torch.randn(width) for name, width in WIDTHS.items()}


@pytest.fixture
def model():
    """A model that standardises audio."""
    model = SpikEmo(small_config()).eval()
    model.origin = Origin(
        data="made up",
        about=dict.fromkeys(WIDTHS, "drawn at random"),
        standardised={"audio": (torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 0.5, torch.inf]))},
    )
    return model


@pytest.fixture
def jsonl(tmp_path):
    """Write lines, objects or raw text, to a JSON Lines file."""

    def write(*lines):
        path = tmp_path / "chat.jsonl"
        path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines), "utf-8")
        return path

    return write


def test_csv_and_json_lines_give_the_same_conversation(tmp_path, jsonl):
    features = [drawn(), drawn()]
    for i, tensors in enumerate(features):
        save_file(tensors, tmp_path / f"{i}.safetensors")
        np.save(tmp_path / f"{i}.npy", tensors["text"].numpy())
    rows = [
        {"speaker": "Joey", "text": 'He said "hi",\nthen left 🙂', "dialogue": "a", "features": "0.safetensors"},
        {"speaker": "Ünal", "text": "", "dialogue": "b", "features": "1.safetensors", "clip": "clips/u.mp4"},
        {**GOOD, "text": "y" * 10_000, "dialogue": "a", "features": {"text": "1.npy", "audio": [1, 2.5, -3]}},
    ]
    read = read_conversations(jsonl(*rows[:1], "", *rows[1:]))
    assert {name: [u.speaker for u in dialogue] for name, dialogue in read.items()} == {
        "a": ["Joey", "Joey"],
        "b": ["Ünal"],
    }
    (first, third), (second,) = read["a"], read["b"]
    assert first.text == rows[0]["text"]
    assert second.text == ""
    assert second.clip == tmp_path / "clips" / "u.mp4"
    assert third.text == "y" * 10_000
    assert [u.where[-6:] for u in (first, second, third)] == ["line 1", "line 3", "line 4"]
    assert all(torch.equal(first.features[name], x) for name, x in features[0].items())
    assert np.array_equal(third.features["text"], features[1]["text"].numpy())
    assert third.features["audio"] == [1, 2.5, -3]

    table = tmp_path / "chat.csv"
    lines = ["\ufeffspeaker,text,dialogue,features,clip"]
    lines += ['Joey,"He said ""hi"",\nthen left 🙂",a,0.safetensors,', "", "Ünal,,b,1.safetensors,clips/u.mp4"]
    lines += [f'Joey,{"y" * 10_000},a,"{{""text"": ""1.npy"", ""audio"": [1, 2.5, -3]}}",']
    table.write_text("\n".join(lines), "utf-8")
    again = read_conversations(table)
    assert list(again) == list(read)
    for name, dialogue in read.items():
        for ours, theirs in zip(dialogue, again[name], strict=True):
            assert (ours.speaker, ours.text, ours.clip) == (theirs.speaker, theirs.text, theirs.clip)
            assert ours.features.keys() == theirs.features.keys()
            assert all(np.array_equal(x, theirs.features[m]) for m, x in ours.features.items())


@pytest.mark.parametrize("end", ["\r", "\r\n", "\n"])
def test_tables_of_any_line_end_are_read(tmp_path, end):
    lines = ["speaker,text", 'Ünal,"Hi.\rBye, all"', "Ross," + "\N{WAVING HAND SIGN}" * 5000, "Joey,"]
    path = tmp_path / "chat.csv"
    path.write_bytes(("\ufeff" + end.join(lines)).encode())
    (said,) = read_conversations(path).values()
    assert [(u.speaker, len(u.text)) for u in said] == [("Ünal", 12), ("Ross", 5000), ("Joey", 0)]
    assert said[0].text == "Hi.\rBye, all"
    assert [u.where[-6:] for u in said] == ["line 3", "line 4", "line 5"]


BAD_LINES = {
    "half a line": ('{"speaker": "Joey", "te', "line 2: this is no JSON"),
    "a list": ("[1, 2]", r"line 2: a line must be a JSON object, got \[1, 2\]"),
    "a bottomless list": ("[" * 100_000, "line 2: this is no JSON"),
    "no speaker": ({"text": "Hi."}, r"line 2: speaker is missing\. Add the column"),
    "no text": ({"speaker": "Joey"}, "line 2: text is missing"),
    "a number for a speaker": ({"speaker": 3, "text": "Hi."}, "line 2: speaker must be a string, got 3"),
    "half an emoji": ('{"speaker": "Joey", "text": "\\ud83d"}', "line 2: text holds half a character"),
    "an unknown kind of features": ({**GOOD, "features": 3}, r"line 2: features must be a \.safetensors file or an"),
    "features of which modality": ({**GOOD, "features": "a.npy"}, r'line 2: features must be .*"a\.npy"'),
    "a missing file": ({**GOOD, "features": "a.safetensors"}, r"line 2: features cannot be read .*a\.safetensors"),
    "a missing array": ({**GOOD, "features": {"text": "a.npy"}}, r"line 2: features cannot be read .*a\.npy"),
    "a pickle": ({**GOOD, "features": {"text": "evil.npy"}}, "line 2: features cannot be read .*allow_pickle"),
    "no tensors": ({**GOOD, "features": "evil.safetensors"}, "line 2: features cannot be read"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_lines_are_named(tmp_path, jsonl, case):
    line, message = BAD_LINES[case]
    np.save(tmp_path / "evil.npy", np.array([print], dtype=object), allow_pickle=True)
    (tmp_path / "evil.safetensors").write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(ConversationError, match=message) as caught:
        read_conversations(jsonl(GOOD, line))
    assert str(caught.value).startswith(str(tmp_path / "chat.jsonl"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"name,text\nJoey,Hi.\n", r"chat\.csv, line 2: speaker is missing"),
        (b"speaker,said\nJoey,Hi.\n", r"chat\.csv, line 2: text is missing"),
        (b"speaker,text\nJoey,Hi, you\n", "line 2: more cells than columns. Quote the text"),
        (b"speaker,text\nJoey,Hi.\nRoss," + b"x" * 200_000 + b"\n", r"line 3: this is no CSV \(field larger"),
        (b'speaker,text\n"Joey,Hi.\nRoss,Hi.\n', r"line 3: this is no CSV \(unexpected end of data"),
        (b"speaker,text\n\nJo\xe9y,Hi.\n", "line 3: this is not UTF-8"),
        (b"speaker,text\rJoey,Hi.\rJo\xe9y,Hi.\r", "line 3: this is not UTF-8"),
        (b"speaker,text\n" + 3000 * b"Joey,Hi.\n" + b"Joey,\xc3", "line 3002: this is not UTF-8"),
        (b"speaker,text\n\n", "holds no utterance"),
        (b"", "holds no utterance"),
    ],
)
def test_bad_tables_are_named(tmp_path, content, message):
    path = tmp_path / "chat.csv"
    path.write_bytes(content)
    with pytest.raises(ConversationError, match=message):
        read_conversations(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "standard input holds no utterance"),
        (b"\xef\xbb\xbf\n\n", "standard input holds no utterance"),
        (b"speaker,text\n", "standard input holds no utterance"),
        (b"[1]", r"standard input, line 1: a line must be a JSON object, got \[1\]"),
        (b'"speaker": "Joey", "text": "Hi."}\n', "standard input, line 1: this is no JSON"),
        (b"speaker,said\nJoey,Hi.\n", "standard input, line 1: this is no JSON"),
        (b"speaker,text\nJo\xe9y,Hi.\n", "standard input, line 2: this is not UTF-8"),
        (b"speaker,text\rJoey,Hi.\r", "standard input, line 1: this is no"),
    ],
)
def test_a_stream_that_holds_nothing_or_no_utterances_is_an_error(content, message):
    with pytest.raises(ConversationError, match=message):
        list(read_live(io.BytesIO(content)))


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize(
    "content",
    [
        'dialogue,"text","speaker"\r\na,Hi.,Joey\r\n',
        '{"speaker": "Joey", "text": "Hi.", "dialogue": "a"}',
        '\n\n  {"speaker": "Joey", "text": "Hi.", "dialogue": "a"}\r\n',
    ],
)
def test_a_stream_is_csv_by_its_header_else_json_lines(content, mark):
    ((dialogue, said),) = read_live(io.BytesIO((mark + content).encode()))
    assert (dialogue, said.speaker, said.text) == ("a", "Joey", "Hi.")


def test_probabilities_are_those_of_the_standardised_dialogue(model):
    utterances = [Utterance(who, "", drawn()) for who in ("a", "b", "a", "somebody new")]
    rows = model.predict(utterances)
    features = {name: torch.stack([u.features[name] for u in utterances]) for name in WIDTHS}
    mean, std = model.origin.standardised["audio"]
    features["audio"] = ((features["audio"] - mean) / std).clamp(-5, 5)
    dialogue = Conversation("d", features, ("a", "b", "a", "c"), torch.full((4,), -1), ("1", "2", "3", "4"))
    (wanted,) = predict(model, [dialogue])
    assert [list(row) for row in rows] == 4 * [list(model.config.classes)]
    assert torch.equal(torch.tensor([list(row.values()) for row in rows]), wanted)
    assert torch.allclose(wanted.sum(1), torch.ones(4))
    others = model.predict([replace(u, speaker="a") for u in utterances])
    assert others != rows


@pytest.mark.parametrize("length", [1, 500])
def test_conversations_of_any_length_are_classified(model, length):
    rows = model.predict([Utterance(f"speaker {i % 40}", "🙂", drawn()) for i in range(length)])
    assert len(rows) == length
    assert all(sum(row.values()) == pytest.approx(1, abs=1e-4) for row in rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"audio": torch.tensor([1.0, torch.nan, 2.0])}, r"line 7: audio features hold NaN or infinity"),
        ({"audio": [1e300, 0, 0]}, "line 7: audio features hold NaN or infinity"),
        ({"audio": torch.zeros(4)}, r"line 7: audio features must have shape \(3,\), got \(4,\)"),
        ({"audio": torch.zeros(1, 3)}, r"line 7: audio features must have shape \(3,\), got \(1, 3\)"),
        ({"audio": ["a", 1, 2]}, "line 7: audio features must be numbers"),
        ({"audio": [[1], [2, 3]]}, "line 7: audio features must be numbers"),
        ({"audio": [10**400, 1, 2]}, "line 7: audio features must be numbers"),
        ({"audio": None}, r"line 7: there are no audio features, and the model cannot make them: .*'drawn at random'"),
        ({"smell": torch.zeros(3)}, r"line 7: the model has no modality 'smell', but \['text', 'audio', 'visual'\]"),
    ],
)
def test_bad_features_are_named_by_line_or_number(model, change, message):
    good = Utterance("Joey", "Hi.", drawn())
    features = {name: x for name, x in {**drawn(), **change}.items() if x is not None}
    with pytest.raises(ConversationError, match=message):
        model.predict([good, Utterance("Ross", "Hi.", features, where="line 7")])
    with pytest.raises(ConversationError, match=message.replace("line 7", "utterance 2")):
        model.predict([good, Utterance("Ross", "Hi.", features)])


def test_a_model_of_modality_dropout_does_without_what_no_utterance_has():
    model = SpikEmo(small_config(modality_dropout=0.3)).eval()
    heard = [{name: x for name, x in drawn().items() if name != "visual"} for _ in range(3)]
    rows = model.predict([Utterance("a", "", x) for x in heard])
    features = {name: torch.stack([x[name] for x in heard]) for name in ("text", "audio")}
    (wanted,) = predict(model, [Conversation("d", features, tuple("aaa"), torch.full((3,), -1), tuple("123"))])
    assert [list(row.values()) for row in rows] == wanted.tolist()
    with pytest.raises(ConversationError, match="utterance 1: there are no visual features"):
        model.predict([Utterance("a", "", x) for x in [heard[0], drawn()]])
    with pytest.raises(ConversationError, match="no utterance has text or audio or visual features"):
        model.predict([Utterance("a", "Hi.")])


def test_an_empty_conversation_is_an_error(model):
    with pytest.raises(ConversationError, match="holds no utterance"):
        model.predict([])


def test_a_corpus_is_standardised_as_the_model_has_learned_it_and_once():
    raw = synthetic_corpus(8)
    own = standardise(raw, ["text", "audio"])
    config = small_config()
    modalities = {name: replace(config.modalities[name], features=raw.widths[name]) for name in ("audio", "text")}
    config = replace(config, modalities=modalities)
    origin = Origin(about=dict.fromkeys(modalities, ""), standardised=own.standardised)
    for corpus in (raw, own):
        fitted = fit(corpus, config, origin)
        assert list(fitted.widths) == ["audio", "text"]
        for ours, theirs in zip(fitted.splits["test"], own.splits["test"], strict=True):
            assert all(torch.equal(x, theirs.features[name]) for name, x in ours.features.items())
    with pytest.raises(ValueError, match="synthetic: audio features are standardised in another way"):
        fit(standardise(synthetic_corpus(8, seed=1), ["audio"]), config, origin)
    with pytest.raises(ValueError, match="standardised in another way"):
        fit(own, config, replace(origin, standardised={}))
    with pytest.raises(ValueError, match=r"has features \{'audio': 24, 'text': 64\} .*the model wants"):
        fit(raw, replace(config, classes=("glad", "sad")), origin)


def test_a_corpus_is_reduced_by_a_model_that_has_no_words_for_it_and_not_before_it_is_standardised():
    raw = synthetic_corpus(8).select(["audio"])
    own = standardise(raw, ["audio"])
    reduction = {"audio": (torch.randn(24), torch.randn(24, 2))}
    own = reduce_by(own, reduction)
    origin = Origin(standardised=own.standardised, reduced=reduction)
    config = SpikEmoConfig({"audio": ModalityConfig(2, "none")}, dim=16)
    fitted = fit(raw, config, origin)
    for ours, theirs in zip(fitted.splits["test"], own.splits["test"], strict=True):
        assert torch.equal(ours.features["audio"], theirs.features["audio"])
    with pytest.raises(ValueError, match="synthetic: audio features are standardised in another way"):
        fit(reduce_by(raw, reduction), config, origin)
