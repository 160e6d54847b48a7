"""A batch of dialogues, padded to one length."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class DialogueBatch:
    """B dialogues of up to L utterances, padded at the end.

    Args:
        features: By modality, [B, L, F_m]; anything finite at padding.
        speakers: [B, L] int64, the index of the speaker within the dialogue, >= 0.
        mask: [B, L] bool, True where there is an utterance; each row has at least one and all of them first.
        labels: [B, L] int64, -1 where unknown and at padding; None if there are none.
        ids: Names of the dialogues, for messages.
        parties: More than the largest index of a speaker; None looks it up, for which a GPU has to be waited.
    """

    features: dict[str, Tensor]
    speakers: Tensor
    mask: Tensor
    labels: Tensor | None = None
    ids: tuple[str, ...] = ()
    parties: int | None = None

    def __post_init__(self) -> None:
        """Check that the parts fit together."""
        B, L = self.mask.shape
        if self.mask.dtype != torch.bool:
            raise TypeError(f"DialogueBatch: mask must be bool with True at utterances, got {self.mask.dtype}.")
        if not self.features:
            raise ValueError("DialogueBatch: features must hold at least one modality.")
        for name, x in self.features.items():
            if x.ndim != 3 or x.shape[:2] != (B, L):
                raise ValueError(f"DialogueBatch: {name} must be [B, L, F] = [{B}, {L}, F], got {tuple(x.shape)}.")
        for name, indices in (("speakers", self.speakers), ("labels", self.labels)):
            if indices is not None and indices.shape != (B, L):
                raise ValueError(f"DialogueBatch: {name} must be [B, L] = {(B, L)}, got {tuple(indices.shape)}.")
        self._check_speakers()

    def _check_speakers(self) -> None:
        """They are counted from 0 and below ``parties``; a GPU is not waited for."""
        if self.speakers.dtype != torch.int64:
            raise TypeError(f"DialogueBatch: speakers must be int64, got {self.speakers.dtype}.")
        if self.speakers.device.type != "cpu" or torch.compiler.is_compiling() or not self.speakers.numel():
            return
        low, high = (int(x) for x in self.speakers.aminmax())
        if low < 0 or (self.parties is not None and high >= self.parties):
            below = "" if self.parties is None else f" and below parties = {self.parties}"
            raise ValueError(f"DialogueBatch: speakers must be at least 0{below}, got {low} to {high}.")

    def to(self, device: torch.device | str) -> "DialogueBatch":
        """The same batch on ``device``."""
        labels = None if self.labels is None else self.labels.to(device)
        features = {name: x.to(device) for name, x in self.features.items()}
        return replace(
            self, features=features, speakers=self.speakers.to(device), mask=self.mask.to(device), labels=labels
        )

    def pin_memory(self) -> "DialogueBatch":
        """The same batch in page-locked memory, for a DataLoader with ``pin_memory``."""
        labels = None if self.labels is None else self.labels.pin_memory()
        features = {name: x.pin_memory() for name, x in self.features.items()}
        return replace(
            self, features=features, speakers=self.speakers.pin_memory(), mask=self.mask.pin_memory(), labels=labels
        )

    def __len__(self) -> int:
        """Number of dialogues B."""
        return len(self.mask)
