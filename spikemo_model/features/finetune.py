"""Fine-tune a text encoder for emotion, and store its features: what the paper's text features are."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler
from torchmetrics.classification import MulticlassF1Score

from spikemo_model.checkpoints import AtomicCheckpointIO, BestAndLast, RandomStates
from spikemo_model.data.corpus import Conversation, Corpus, DataError
from spikemo_model.data.store import save_corpus
from spikemo_model.features.text import DEFAULT_ENCODER, ContextEncoder, Window
from spikemo_model.features.work import claim, describe, lasting

Example = tuple[Window, int]


class EmotionTask(pl.LightningModule):
    """A context encoder with a linear layer on top, trained by cross-entropy.

    AdamW; the learning rate rises for a tenth of the steps and falls to 0 on a straight line.

    Args:
        context: The encoder.
        classes: How many emotions.
        learning_rate: Of the optimiser, at its highest.
    """

    def __init__(self, context: ContextEncoder, classes: int, learning_rate: float) -> None:
        super().__init__()
        self.context = context
        self.encoder = context.model.train()
        self.classifier = nn.Sequential(nn.Dropout(0.1), nn.Linear(self.encoder.config.hidden_size, classes))
        self.learning_rate = learning_rate
        self.valid_f1 = MulticlassF1Score(classes, average="weighted")

    def forward(self, windows: Sequence[Window]) -> Tensor:
        """Logits [len(windows), C]."""
        return self.classifier(self.context.vectors(windows))

    def training_step(self, batch: tuple[list[Window], Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of a batch."""
        windows, labels = batch
        return nn.functional.cross_entropy(self(windows), labels)

    def validation_step(self, batch: tuple[list[Window], Tensor], batch_idx: int) -> None:
        """Collect the predictions of a batch."""
        windows, labels = batch
        self.valid_f1.update(self(windows).argmax(-1), labels)

    def on_validation_epoch_end(self) -> None:
        """Weighted F1 in percent."""
        self.log("valid_weighted_f1", 100 * self.valid_f1.compute(), prog_bar=True)
        self.valid_f1.reset()

    def configure_optimizers(self) -> Any:
        """AdamW and its schedule."""
        from transformers import get_linear_schedule_with_warmup

        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate, weight_decay=0.01)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def finetune_text(
    corpus: Corpus,
    out: Path,
    encoder: str = DEFAULT_ENCODER,
    *,
    max_tokens: int | None = None,
    epochs: int = 5,
    batch_size: int = 16,
    learning_rate: float = 1e-5,
    seed: int = 0,
    accelerator: str = "auto",
) -> Corpus:
    """Fine-tune an encoder for emotion on the training split, and store its features of all splits.

    The epoch is selected by weighted F1 on validation. A run that was stopped goes on from its last whole epoch.
    The vectors of the training split have seen their labels: they say more than those of the other splits.

    Args:
        corpus: Conversations with transcripts and labels.
        out: New folder: ``checkpoints/`` while training, ``encoder/`` in transformers' format, and ``features/``, a
            feature store of the corpus whose text features are the encoder's (`ContextEncoder`).
        encoder: A name on the hub or a local folder.
        max_tokens: Length of a window; None for the longest that the encoder takes.
        epochs: Passes over the training utterances.
        batch_size: Utterances a step.
        learning_rate: At its highest.
        seed: Of the classifier's start, order and dropout.
        accelerator: As in Lightning's Trainer: "auto", "cpu" or "gpu".

    Returns:
        What ``features/`` holds.

    Raises:
        OSError: The encoder cannot be loaded.
        ValueError: ``out`` holds other settings' work, or the result already; or there are no transcripts or labels.
    """
    import transformers

    if (out / "features").exists():
        raise FileExistsError(f"finetune_text: {out / 'features'} is there already. Choose another folder.")
    pl.seed_everything(seed, verbose=False)
    context = ContextEncoder(encoder, max_tokens)
    train, valid = (_examples(corpus, split, context) for split in ("train", "valid"))
    settings = {
        "transformers": transformers.__version__,
        "encoder": encoder,
        "max_tokens": context.max_tokens,
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "seed": seed,
    }
    claim(out, settings)
    task = EmotionTask(context, len(corpus.classes), learning_rate)
    best = BestAndLast(out / "checkpoints", "valid_weighted_f1")
    bar = sys.stderr.isatty()
    callbacks: list[Callback] = [RandomStates(), best, *([TQDMProgressBar()] if bar else [])]
    trainer = pl.Trainer(
        accelerator=accelerator,
        devices=1,
        max_epochs=epochs,
        gradient_clip_val=1.0,
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        logger=False,
        num_sanity_val_steps=0,
        enable_model_summary=False,
        enable_progress_bar=bar,
    )
    order: Any = DistributedSampler(train, num_replicas=1, rank=0, seed=seed)  # type: ignore[arg-type]
    trainer.fit(
        task,
        _loader(train, batch_size, order),
        _loader(valid, batch_size),
        ckpt_path=str(best.last) if best.last.is_file() else None,
        weights_only=True,
    )
    task.load_state_dict(AtomicCheckpointIO().load_checkpoint(best.best_model_path)["state_dict"])
    context.model.to(trainer.strategy.root_device).eval()
    context.model.save_pretrained(out / "encoder")
    context.tokenizer.save_pretrained(out / "encoder")
    splits = {
        split: tuple(replace(d, features={**d.features, "text": context.features(d, batch_size)}) for d in dialogues)
        for split, dialogues in corpus.splits.items()
    }
    tuned = {"name": "ContextEncoder", **settings, "encoder": lasting(str(out / "encoder")), "start": encoder}
    result = replace(
        corpus,
        splits=splits,
        about={**corpus.about, "text": describe(tuned)},
        standardised={name: constants for name, constants in corpus.standardised.items() if name != "text"},
        reduced={name: constants for name, constants in corpus.reduced.items() if name != "text"},
        extractors={**corpus.extractors, "text": tuned},
    )
    save_corpus(result, out / "features")
    return result


def _examples(corpus: Corpus, split: str, context: ContextEncoder) -> list[Example]:
    """Windows of the labelled utterances of a split, with their labels."""
    examples = [pair for d in corpus.splits[split] for pair in _labelled(d, context)]
    if not examples:
        raise DataError(f"{corpus.name}: no utterance of the {split} split has a label.")
    return examples


def _labelled(dialogue: Conversation, context: ContextEncoder) -> list[Example]:
    pairs = zip(context.windows(dialogue), dialogue.labels.tolist(), strict=True)
    return [(window, label) for window, label in pairs if label >= 0]


def _loader(examples: list[Example], batch_size: int, order: Any = None) -> Any:
    """Batches of windows and labels. The loader draws from a generator of its own: dropout's must be as saved."""
    return DataLoader(
        examples,  # type: ignore[arg-type]
        batch_size,
        sampler=order,
        collate_fn=_collate,
        generator=torch.Generator(),
    )


def _collate(examples: list[Example]) -> tuple[list[Window], Tensor]:
    return [window for window, _ in examples], torch.tensor([label for _, label in examples])
