"""Audio that was reduced for training is reduced alike for clips that come later, on real recordings."""

import json
import os
from dataclasses import replace

import pytest
import torch
from feature_helpers import write_meld

from spikemo_model import SpikEmo, Utterance
from spikemo_model.cli import main
from spikemo_model.data import load_corpus, save_corpus
from spikemo_model.data.corpus import Conversation
from spikemo_model.evaluation import predict
from spikemo_model.features import functionals
from spikemo_model.prediction import fit, prepare


@pytest.fixture(scope="module")
def voices(data):
    """All real recordings, German and English."""
    return sorted((data / "audio").glob("*.wav")) + sorted((data / "audio").glob("*.flac"))


@pytest.fixture(scope="module")
def place(voices, tmp_path_factory):
    """A store of those recordings with audio reduced to 3, and a model trained on it, by the command line."""
    folder = tmp_path_factory.mktemp("reduced")
    root = write_meld(folder / "meld", voices[0])
    clips = [*sorted((root / "train_splits").iterdir()), *sorted((root / "output_repeated_splits_test").iterdir())]
    for clip, voice in zip(clips, voices, strict=False):
        clip.unlink()
        os.symlink(voice, clip)
    threads = torch.get_num_threads()
    for arguments in (
        ["extract", root, folder / "store", "--modality", "audio", "--audio-width", 3, "--workers", 1],
        ["train", "--data-dir", folder / "store", "--run-dir", folder / "run", "--epochs", 1, "--time-steps", 2],
    ):
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        assert not stopped.value.code
    torch.set_num_threads(threads)
    return folder


def test_a_store_and_a_model_keep_the_reduction(place):
    store, model = load_corpus(place / "store"), SpikEmo.from_pretrained(place / "run" / "seed0")
    assert (store.widths, model.config.modalities["audio"].features) == ({"audio": 3}, 3)
    centre, axes = store.reduced["audio"]
    assert (centre.shape, axes.shape) == ((6373,), (6373, 3))
    torch.testing.assert_close(axes.T @ axes, torch.eye(3), atol=1e-5, rtol=0)
    assert all(map(torch.equal, model.origin.reduced["audio"], store.reduced["audio"]))
    assert all(map(torch.equal, model.origin.standardised["audio"], store.standardised["audio"]))
    assert "torch.zeros(6373)" in (place / "run" / "seed0" / "README.md").read_text()


def test_raw_clips_give_what_the_store_gave(place, capsys):
    model = SpikEmo.from_pretrained(place / "run" / "seed0")
    (dialogue,) = load_corpus(place / "store").splits["test"]
    clips = [place / "meld" / "output_repeated_splits_test" / f"{dialogue.id}_{u}.mp4" for u in dialogue.utterance_ids]
    said = [Utterance(who, "", clip=clip) for who, clip in zip(dialogue.speakers, clips, strict=True)]
    features = prepare(said, model.config, model.origin).features["audio"]
    torch.testing.assert_close(features, dialogue.features["audio"], atol=1e-3, rtol=1e-4)
    assert features.std(0).min() > 0.1  # they are different voices
    (wanted,) = predict(model, [dialogue])

    lines = [{"speaker": u.speaker, "text": "", "clip": str(u.clip)} for u in said]
    (place / "chat.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(SystemExit) as stopped:
        main(["predict", str(place / "run" / "seed0"), str(place / "chat.jsonl"), "--json"])
    assert not stopped.value.code
    rows = [json.loads(line)["probabilities"].values() for line in capsys.readouterr().out.splitlines()]
    torch.testing.assert_close(torch.tensor([list(row) for row in rows]), wanted, atol=1e-4, rtol=0)


def test_raw_features_are_as_good_as_a_clip_and_reduced_ones_are_refused(place, voices):
    model = SpikEmo.from_pretrained(place / "run" / "seed0")
    raw = functionals(voices[-1])
    assert model.predict([Utterance("a", "", {"audio": raw})]) == model.predict([Utterance("a", clip=voices[-1])])
    with pytest.raises(ValueError, match=r"audio features must have shape \(6373,\), got \(3,\)"):
        model.predict([Utterance("a", "", {"audio": torch.zeros(3)})])


def test_a_store_of_raw_features_is_scored_as_the_reduced_one(place):
    model, store = SpikEmo.from_pretrained(place / "run" / "seed0"), load_corpus(place / "store")
    files = {"train": "train_splits", "valid": "dev_splits_complete", "test": "output_repeated_splits_test"}

    def raw(split: str, d: Conversation) -> Conversation:
        clips = [place / "meld" / files[split] / f"{d.id}_{u}.mp4" for u in d.utterance_ids]
        return replace(d, features={"audio": torch.stack([functionals(clip) for clip in clips])})

    splits = {split: tuple(raw(split, d) for d in dialogues) for split, dialogues in store.splits.items()}
    save_corpus(replace(store, splits=splits, standardised={}, reduced={}), place / "raw")
    fitted = fit(load_corpus(place / "raw"), model.config, model.origin)
    for split, dialogues in fit(store, model.config, model.origin).splits.items():
        for own, other in zip(fitted.splits[split], dialogues, strict=True):
            torch.testing.assert_close(own.features["audio"], other.features["audio"], atol=1e-3, rtol=1e-4)
    turned = replace(store, reduced={"audio": (store.reduced["audio"][0], -store.reduced["audio"][1])})
    with pytest.raises(ValueError, match="audio features are reduced in another way"):
        fit(turned, model.config, model.origin)
