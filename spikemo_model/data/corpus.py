"""Conversations in memory: what every reader returns and everything else works on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spikemo_model.batch import DialogueBatch

SPLITS = ("train", "valid", "test")


class DataError(ValueError):
    """Something is wrong with the data; the message names the file or dialogue and the cure."""


class TextFeatures(NamedTuple):
    """Features of transcripts: [rows, F] by split, in the order of the transcripts, and what they are in words.

    ``extractor`` is what made them, as in `Corpus`; empty if it cannot do so again.
    """

    rows: dict[str, Tensor]
    about: str
    extractor: dict[str, Any] = {}  # noqa: RUF012 - never changed


@dataclass(frozen=True)
class Conversation:
    """One dialogue of L utterances.

    Args:
        id: Name, unique within its split.
        features: By modality, [L, F_m] float32.
        speakers: L names.
        labels: [L] int64, indices of the corpus's classes, -1 where unknown.
        utterance_ids: L names, unique within the dialogue.
        texts: L transcripts; empty if there are none.
    """

    id: str
    features: dict[str, Tensor]
    speakers: tuple[str, ...]
    labels: Tensor
    utterance_ids: tuple[str, ...]
    texts: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Number of utterances L."""
        return len(self.speakers)


@dataclass(frozen=True)
class Corpus:
    """A data set in three splits, with what to call it and where its features come from.

    Args:
        name: E.g. "MELD".
        classes: Emotions, in the order of the labels.
        splits: Conversations by "train", "valid" and "test".
        about: What each modality's features are, by modality; goes into the report.
        notes: What a reader of the results must know; goes into the report.
        standardised: Mean [F] and standard deviation [F] that were taken out of each modality (`standardise`).
        reduced: Centre [F] and axes [F, K] by which each modality was then brought from width F to K (`reduced_by`).
        extractors: By modality, what made its features and can make them for other conversations: "name", and its
            settings, as JSON has them; a modality of which that is not known is left out.

    Raises:
        DataError: A split is missing or empty, a dialogue is empty, a label is unknown, features are missing, of
            another width or not finite.
    """

    name: str
    classes: tuple[str, ...]
    splits: dict[str, tuple[Conversation, ...]]
    about: dict[str, str]
    notes: tuple[str, ...] = ()
    standardised: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    reduced: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    extractors: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check everything that training relies on, before it starts."""
        for split in SPLITS:
            if not self.splits.get(split):
                raise DataError(f"{self.name}: the {split} split is missing or empty.")
            seen: set[str] = set()
            for dialogue in self.splits[split]:
                _check_dialogue(self, split, dialogue)
                if dialogue.id in seen:
                    raise DataError(f"{self.name}: {split} dialogue {dialogue.id} is there twice.")
                seen.add(dialogue.id)

    @property
    def widths(self) -> dict[str, int]:
        """Width of each modality's features."""
        return {name: x.shape[1] for name, x in self.splits["train"][0].features.items()}

    def select(self, modalities: Sequence[str]) -> "Corpus":
        """The same corpus with some of its modalities, in the order given.

        Raises:
            DataError: It lacks one of them.
        """
        missing = [name for name in modalities if name not in self.about]
        if missing or not modalities:
            raise DataError(
                f"{self.name}: asked for the modalities {list(modalities)}, but there are {list(self.about)}."
            )
        splits = {
            split: tuple(replace(d, features={name: d.features[name] for name in modalities}) for d in dialogues)
            for split, dialogues in self.splits.items()
        }
        return replace(
            self,
            splits=splits,
            about={name: self.about[name] for name in modalities},
            standardised={name: x for name, x in self.standardised.items() if name in modalities},
            reduced={name: x for name, x in self.reduced.items() if name in modalities},
            extractors={name: made for name, made in self.extractors.items() if name in modalities},
        )


def _check_dialogue(corpus: Corpus, split: str, dialogue: Conversation) -> None:
    """One dialogue is complete, finite and as wide as the first of the training split."""
    where = f"{corpus.name}: {split} dialogue {dialogue.id}"
    L = len(dialogue)
    if L == 0:
        raise DataError(f"{where} has no utterance. Leave it out.")
    if dialogue.features.keys() != corpus.about.keys():
        missing = sorted(corpus.about.keys() ^ dialogue.features.keys())
        raise DataError(f"{where} must have features of {sorted(corpus.about)}; it differs in {missing}.")
    if dialogue.labels.shape != (L,) or len(dialogue.utterance_ids) != L:
        raise DataError(f"{where} has {L} speakers, but labels of shape {tuple(dialogue.labels.shape)}.")
    if int(dialogue.labels.min()) < -1 or int(dialogue.labels.max()) >= len(corpus.classes):
        raise DataError(f"{where} has labels {dialogue.labels.tolist()} outside 0 ... {len(corpus.classes) - 1}.")
    for name, x in dialogue.features.items():
        width = corpus.widths[name]
        if x.shape != (L, width):
            raise DataError(
                f"{where}: {name} features must be {L} utterances x {width}, got {tuple(x.shape)}. "
                "Extract them again with one encoder."
            )
        finite = x.isfinite().all(dim=1)
        if not finite.all():
            bad = dialogue.utterance_ids[int((~finite).nonzero()[0, 0])]
            raise DataError(f"{where}, utterance {bad}: {name} features hold NaN or infinity. Extract them again.")


def standardise(corpus: Corpus, modalities: Sequence[str]) -> Corpus:
    """Give features mean 0 and standard deviation 1 on the training split, clipped (`scaled_by`).

    Args:
        corpus: Any.
        modalities: Which of its modalities.

    Returns:
        The corpus with those features changed; a feature that is constant in training becomes 0.

    Raises:
        DataError: One of them is reduced already.
    """
    late = [name for name in modalities if name in corpus.reduced]
    if late:
        raise DataError(f"{corpus.name}: {late[0]} is reduced already. Standardise before the reduction.")
    constants = {}
    for name in modalities:
        x = torch.cat([d.features[name] for d in corpus.splits["train"]]).double()
        mean, std = x.mean(0), x.std(0, correction=0)
        constants[name] = mean.float(), torch.where(std > 1e-6 * x.abs().amax(0), std, torch.inf).float()
    return standardise_by(corpus, constants)


def standardise_by(corpus: Corpus, constants: dict[str, tuple[Tensor, Tensor]]) -> Corpus:
    """The corpus with the mean [F] and standard deviation [F] of ``constants`` taken out of those modalities."""
    return replace(_changed(corpus, scaled_by, constants), standardised={**corpus.standardised, **constants})


def reduce_by(corpus: Corpus, constants: dict[str, tuple[Tensor, Tensor]]) -> Corpus:
    """The corpus with the modalities of ``constants`` reduced by their centre [F] and axes [F, K]."""
    return replace(_changed(corpus, reduced_by, constants), reduced={**corpus.reduced, **constants})


def _changed(
    corpus: Corpus,
    change: Callable[[Tensor, tuple[Tensor, Tensor]], Tensor],
    constants: dict[str, tuple[Tensor, Tensor]],
) -> Corpus:
    """The corpus with ``change`` by ``constants`` made to the features of their modalities."""

    def changed(d: Conversation) -> Conversation:
        return replace(d, features={**d.features, **{m: change(d.features[m], own) for m, own in constants.items()}})

    return replace(corpus, splits={split: tuple(map(changed, own)) for split, own in corpus.splits.items()})


def scaled_by(x: Tensor, constants: tuple[Tensor, Tensor]) -> Tensor:
    """Features [rows, F] without a mean [F] and standard deviation [F], at most 5 standard deviations large.

    Measurements such as clip durations have outliers.
    """
    mean, std = constants
    return ((x - mean) / std).clamp(-5.0, 5.0)


def reduced_by(x: Tensor, constants: tuple[Tensor, Tensor]) -> Tensor:
    """Features [rows, F] as coordinates [rows, K] along axes [F, K], from a centre [F]."""
    centre, axes = constants
    return (x - centre) @ axes


def collate(dialogues: Sequence[Conversation]) -> DialogueBatch:
    """Pad dialogues to a batch: zeros, no speaker beyond those of a dialogue, labels of -1."""
    B, L = len(dialogues), max(map(len, dialogues))
    mask = torch.zeros(B, L, dtype=torch.bool)
    speakers = torch.zeros(B, L, dtype=torch.long)
    labels = torch.full((B, L), -1)
    features = {name: torch.zeros(B, L, x.shape[1]) for name, x in dialogues[0].features.items()}
    parties = 1
    for b, dialogue in enumerate(dialogues):
        n = len(dialogue)
        order = {name: i for i, name in enumerate(dict.fromkeys(dialogue.speakers))}  # by first appearance
        parties = max(parties, len(order))
        mask[b, :n] = True
        speakers[b, :n] = torch.tensor([order[name] for name in dialogue.speakers])
        labels[b, :n] = dialogue.labels
        for name, x in dialogue.features.items():
            features[name][b, :n] = x
    return DialogueBatch(features, speakers, mask, labels, tuple(d.id for d in dialogues), parties)
