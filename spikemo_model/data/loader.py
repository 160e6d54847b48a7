"""Batches of dialogues: a pure function of the seed and the epoch, that remembers where it is."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch

from spikemo_model.batch import DialogueBatch
from spikemo_model.data.corpus import Conversation, collate

# Dialogues of similar length share a batch; they are sought among so many batches' worth of dialogues.
_BUCKET = 8


class DialogueLoader:
    """Iterate over batches of dialogues, this process's share of each.

    The order depends on the seed and the epoch alone. ``state_dict`` holds the position; after ``load_state_dict``
    the first pass goes on from there.

    Args:
        dialogues: What to batch.
        batch_size: Dialogues a batch, over all processes.
        seed: Of the order; None keeps dialogues sorted by length, for evaluation.
        rank: Number of this process.
        world_size: How many processes share each batch. In training a process for which a batch has no dialogue
            gets its first one without labels, so that all of them take the same steps.
    """

    def __init__(
        self,
        dialogues: Sequence[Conversation],
        batch_size: int,
        seed: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size < world_size or len(dialogues) < world_size:
            raise ValueError(
                f"DialogueLoader: {world_size} processes need at least as many dialogues a batch and in all, got "
                f"{batch_size} and {len(dialogues)}."
            )
        self.dialogues, self.batch_size, self.seed = dialogues, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.epoch, self.position = 0, 0
        self.sampler = self.batch_sampler = self  # where Lightning looks for set_epoch

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; the position is kept if it is the present one."""
        if epoch != self.epoch:
            self.epoch, self.position = epoch, 0

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return len(self._batches())

    def __iter__(self) -> Iterator[DialogueBatch]:
        """The batches of the epoch from the present position on."""
        batches = self._batches()
        if self.position >= len(batches):
            self.position = 0
        for batch in batches[self.position :]:
            self.position += 1
            own = batch if self.seed is None else batch[self.rank :: self.world_size]
            yield collate([self.dialogues[i] for i in own] or [_without_labels(self.dialogues[batch[0]])])

    def state_dict(self) -> dict[str, int]:
        """Epoch and how many of its batches have been given out."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where `state_dict` was taken."""
        self.epoch, self.position = state["epoch"], state["position"]

    def _batches(self) -> list[list[int]]:
        """Dialogues, by index, of every batch of this epoch: in training of all processes, else of this one."""
        if self.seed is None:
            own = self._by_length(range(len(self.dialogues)))[self.rank :: self.world_size]
            return _chunks(own, self.batch_size // self.world_size)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.dialogues), generator=generator).tolist()
        batches = [
            batch
            for bucket in _chunks(order, _BUCKET * self.batch_size)
            for batch in _chunks(self._by_length(bucket), self.batch_size)
        ]
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]

    def _by_length(self, indices: Iterable[int]) -> list[int]:
        return sorted(indices, key=lambda i: len(self.dialogues[i]))


def _without_labels(dialogue: Conversation) -> Conversation:
    return replace(dialogue, labels=torch.full_like(dialogue.labels, -1))


def _chunks(items: list[int], size: int) -> list[list[int]]:
    return [items[i : i + size] for i in range(0, len(items), size)]
