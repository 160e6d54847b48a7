"""A run's result, and small conversations, to report on."""

from dataclasses import replace

import torch

from spikemo_model.config import MELD_EMOTIONS
from spikemo_model.data.corpus import Conversation, Corpus
from spikemo_model.evaluation import Scores
from spikemo_model.training import RunResult

WIDTHS = {"text": 6, "audio": 3, "visual": 5}  # those of `model_helpers.small_config`

SCORES = Scores(
    weighted_f1=59.5,
    accuracy=61.0,
    class_f1={name: 10.0 + i for i, name in enumerate(MELD_EMOTIONS)},
    confusion=[[5 if i == j else 1 for j in range(7)] for i in range(7)],
    utterances=77,
)
RESULT = RunResult(
    seed=3,
    best_epoch=1,
    parameters=12345,
    valid=replace(SCORES, weighted_f1=57.0),
    test=SCORES,
    history=[{"epoch": e, "train_total": 2.0 - e / 2, "valid_weighted_f1": 50.0 + e} for e in range(3)],
    rates_before={"dswa.shared.encoder": 0.3},
    rates_after={"dswa.shared.encoder": 0.2},
    seconds=90.0,
)


def conversations(lengths, texts=(), modalities=tuple(WIDTHS), seed=0) -> Corpus:
    """A corpus with test dialogues ``d0``, ``d1``, ... of these lengths, whose utterances say ``texts`` in turn."""
    generator = torch.Generator().manual_seed(seed)

    def dialogue(name: str, L: int) -> Conversation:
        return Conversation(
            id=name,
            features={m: torch.randn(L, WIDTHS[m], generator=generator) for m in modalities},
            speakers=tuple("ab"[i % 2] for i in range(L)),
            labels=torch.randint(7, (L,), generator=generator),
            utterance_ids=tuple(map(str, range(L))),
            texts=tuple(texts[i % len(texts)] for i in range(L)) if texts else (),
        )

    splits = {split: (dialogue("d", 2),) for split in ("train", "valid")}
    splits["test"] = tuple(dialogue(f"d{i}", L) for i, L in enumerate(lengths))
    return Corpus("made up", MELD_EMOTIONS, splits, {m: f"random {m}" for m in modalities})
