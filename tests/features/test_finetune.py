"""Fine-tuning a text encoder: it learns, resumes to the same bits, and what it leaves gives the same features."""

from dataclasses import replace

import pytest
import torch
import transformers
from sklearn.linear_model import LogisticRegression

from spikemo_model.data import Conversation, Corpus, DataError, load_corpus
from spikemo_model.features.finetune import EmotionTask, finetune_text
from spikemo_model.features.text import ContextEncoder

CLASSES = ("neutral", "joy", "anger")
WORDS = ("so so", "great", "damn")
OPTIONS = {"max_tokens": 24, "epochs": 6, "batch_size": 8, "learning_rate": 3e-3, "accelerator": "cpu"}


def talk(seed: int, dialogues: int, classes=CLASSES) -> tuple[Conversation, ...]:
    """Dialogues of three lines, where everybody feels what the line before says (the first, what it says itself)."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(dialogues):
        said = torch.randint(len(classes), (3,), generator=generator)
        labels = said[[0, 0, 1]]
        texts = tuple(f"{WORDS[word]} {n}" for n, word in enumerate(said))
        features = {"audio": torch.ones(3, 2), "text": torch.zeros(3, 1)}
        made.append(Conversation(f"d{i}", features, ("A", "B", "A"), labels, ("0", "1", "2"), texts))
    return tuple(made)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    splits = {"train": talk(0, 40), "valid": talk(1, 6), "test": talk(2, 20)}
    return Corpus("made up", CLASSES, splits, {"audio": "ones", "text": "none"})


@pytest.fixture(scope="module")
def tuned(corpus, text_encoder, tmp_path_factory):
    out = tmp_path_factory.mktemp("tuned") / "out"
    return finetune_text(corpus, out, text_encoder, **OPTIONS), out


def separability(splits: dict) -> float:
    """Accuracy on test of a logistic regression on the text features of train."""
    x, y = (
        {s: torch.cat([value(d) for d in splits[s]]).numpy() for s in splits}
        for value in (lambda d: d.features["text"], lambda d: d.labels)
    )
    return LogisticRegression(max_iter=1000).fit(x["train"], y["train"]).score(x["test"], y["test"])


def test_the_features_of_unseen_dialogues_tell_the_emotions_apart(tuned, corpus, text_encoder):
    result, _ = tuned
    assert result.widths == {"audio": 2, "text": 32}
    context = ContextEncoder(text_encoder, 24)
    frozen = {
        split: tuple(replace(d, features={"text": context.features(d)}) for d in dialogues)
        for split, dialogues in corpus.splits.items()
    }
    assert separability(frozen) < 0.8  # emotions hang on the line before
    assert separability(result.splits) > 0.95
    assert f"transformers {transformers.__version__}, encoder " in result.about["text"]
    assert "epochs 6" in result.about["text"]
    assert result.extractors["text"]["max_tokens"] == 24


def test_what_is_stored_is_what_the_stored_encoder_gives(tuned):
    corpus, out = tuned
    stored = load_corpus(out / "features")
    assert stored.about == corpus.about
    assert stored.extractors == corpus.extractors
    context = ContextEncoder(stored.extractors["text"]["encoder"], stored.extractors["text"]["max_tokens"])
    for split, dialogues in stored.splits.items():
        for dialogue, same in zip(dialogues, corpus.splits[split], strict=True):
            assert torch.equal(dialogue.features["text"], same.features["text"])
            assert torch.equal(dialogue.features["audio"], torch.ones(3, 2))
            torch.testing.assert_close(context.features(dialogue), dialogue.features["text"], rtol=1e-4, atol=1e-5)


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(tuned, corpus, text_encoder, tmp_path, monkeypatch):
    steps = []

    def power_cut(task, batch, batch_idx, step=EmotionTask.training_step):
        steps.append(task.current_epoch)
        if steps == [0] * 15 + [1]:
            raise ConnectionError("power cut")
        return step(task, batch, batch_idx)

    monkeypatch.setattr(EmotionTask, "training_step", power_cut)
    with pytest.raises(ConnectionError):
        finetune_text(corpus, tmp_path / "out", text_encoder, **OPTIONS)
    assert not (tmp_path / "out" / "features").exists()
    with pytest.raises(ValueError, match=r"unfinished work of other settings; they differ in seed\. Remove the folder"):
        finetune_text(corpus, tmp_path / "out", text_encoder, **OPTIONS, seed=1)
    resumed = finetune_text(corpus, tmp_path / "out", text_encoder, **OPTIONS)
    assert steps == [0] * 15 + [1] + [epoch for epoch in range(1, 6) for _ in range(15)]
    for split, dialogues in tuned[0].splits.items():
        for dialogue, other in zip(dialogues, resumed.splits[split], strict=True):
            assert torch.equal(dialogue.features["text"], other.features["text"])
    with pytest.raises(FileExistsError, match="features is there already"):
        finetune_text(corpus, tmp_path / "out", text_encoder, **OPTIONS)


def test_a_corpus_without_labels_is_an_error(corpus, text_encoder, tmp_path):
    unlabelled = tuple(
        Conversation(d.id, d.features, d.speakers, torch.full((3,), -1), d.utterance_ids, d.texts)
        for d in corpus.splits["valid"]
    )
    without = Corpus("mine", CLASSES, {**corpus.splits, "valid": unlabelled}, corpus.about)
    with pytest.raises(DataError, match="mine: no utterance of the valid split has a label"):
        finetune_text(without, tmp_path / "out", text_encoder, **OPTIONS)
    assert not (tmp_path / "out").exists()
