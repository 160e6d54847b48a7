"""Scores of a trained model, and of the plain baseline beside it."""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_confusion_matrix,
    multiclass_f1_score,
)

from spikemo_model.data.corpus import Conversation, Corpus
from spikemo_model.data.loader import DialogueLoader
from spikemo_model.model import SpikEmo


@dataclass(frozen=True)
class Scores:
    """Scores of one split, in percent.

    Args:
        weighted_f1: F1 of each class, weighted by its number of utterances.
        accuracy: Share of utterances that are right.
        class_f1: F1 by class.
        confusion: Utterances by true class (row) and predicted class (column), counts.
        utterances: How many labelled utterances were scored.
    """

    weighted_f1: float
    accuracy: float
    class_f1: dict[str, float]
    confusion: list[list[int]]
    utterances: int


def predict(model: SpikEmo, dialogues: Sequence[Conversation], batch_size: int = 64) -> list[Tensor]:
    """Probabilities [L, C] of each dialogue, in the order given; the model is in eval mode afterwards."""
    model.eval()
    device = next(model.parameters()).device
    by_id: dict[str, Tensor] = {}
    with torch.no_grad():
        for batch in DialogueLoader(dialogues, batch_size):
            probabilities = torch.softmax(model(batch.to(device)).logits.float(), dim=-1).cpu()
            for name, rows, own in zip(batch.ids, probabilities, batch.mask, strict=True):
                by_id[name] = rows[own]
    return [by_id[d.id] for d in dialogues]


def score(probabilities: Iterable[Tensor], dialogues: Iterable[Conversation], classes: Sequence[str]) -> Scores:
    """Compare probabilities [L, C] of dialogues with their labels; utterances without a label do not count."""
    return score_labels(
        torch.cat([p.argmax(-1) for p in probabilities]), torch.cat([d.labels for d in dialogues]), classes
    )


def score_labels(predicted: Tensor, labels: Tensor, classes: Sequence[str]) -> Scores:
    """Compare predicted classes [N] with labels [N], -1 where unknown."""
    known = labels >= 0
    predicted, labels, C = predicted[known], labels[known], len(classes)
    if not len(labels):
        raise ValueError("score: none of the utterances has a label.")
    by_class = multiclass_f1_score(predicted, labels, C, average="none")
    return Scores(
        weighted_f1=100 * float(multiclass_f1_score(predicted, labels, C, average="weighted")),
        accuracy=100 * float(multiclass_accuracy(predicted, labels, C, average="micro")),
        class_f1={name: 100 * float(f1) for name, f1 in zip(classes, by_class, strict=True)},
        confusion=multiclass_confusion_matrix(predicted, labels, C).tolist(),
        utterances=len(labels),
    )


def logistic_regression(corpus: Corpus, seed: int = 0) -> Scores:
    """Test scores of multinomial logistic regression on the utterances' own features, without context.

    What the features tell by themselves; C = 0.1, fitted on the labelled training utterances.
    """
    rows, labels = {}, {}
    for split in ("train", "test"):
        dialogues = corpus.splits[split]
        rows[split] = torch.cat([torch.cat([d.features[m] for m in corpus.about], dim=1) for d in dialogues])
        labels[split] = torch.cat([d.labels for d in dialogues])
    known = labels["train"] >= 0
    model = LogisticRegression(C=0.1, max_iter=1000, random_state=seed)
    model.fit(rows["train"][known].numpy(), labels["train"][known].numpy())
    predicted = torch.from_numpy(model.predict(rows["test"].numpy()))
    return score_labels(predicted, labels["test"], corpus.classes)


def write_predictions(
    path: Path, dialogues: Sequence[Conversation], probabilities: Sequence[Tensor], classes: Sequence[str]
) -> None:
    """Write one row an utterance: where it stands, its label, the prediction and every probability."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["dialogue", "utterance", "speaker", "text", "label", "predicted", *classes])
        for d, rows in zip(dialogues, probabilities, strict=True):
            texts = d.texts or ("",) * len(d)
            for i, row in enumerate(rows):
                label = int(d.labels[i])
                writer.writerow(
                    [
                        d.id,
                        d.utterance_ids[i],
                        d.speakers[i],
                        texts[i],
                        classes[label] if label >= 0 else "",
                        classes[int(row.argmax())],
                        *(f"{p:.6f}" for p in row.tolist()),
                    ]
                )
