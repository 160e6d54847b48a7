"""Training with Lightning: the module, the data, and one function that runs a whole experiment."""

import atexit
import gc
import os
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torchmetrics.classification import MulticlassF1Score

from spikeattn import firing_rates
from spikemo_model.batch import DialogueBatch
from spikemo_model.checkpoints import (
    AtomicCheckpointIO,
    BestAndLast,
    RandomStates,
    ResumableEarlyStopping,
    averaged_weights,
    replace_atomically,
)
from spikemo_model.config import Preset, TrainingConfig, to_dict
from spikemo_model.data.corpus import Corpus, collate
from spikemo_model.data.loader import DialogueLoader
from spikemo_model.evaluation import Scores, predict, score, write_predictions
from spikemo_model.graphs import GraphedSpikEmo
from spikemo_model.hub import Origin
from spikemo_model.losses import LossTerms, spikemo_loss
from spikemo_model.model import SpikEmo, SpikEmoOutput
from spikemo_model.runs import open_run, write_json


class TrainingDivergedError(RuntimeError):
    """The loss is no longer finite; the message says where, and which checkpoint is still good."""


class SpikEmoTask(pl.LightningModule):
    """SpikEmo with its loss, optimiser and validation score.

    Args:
        preset: The model and how to train it.
        class_shares: [C], each class's share of the training utterances, > 0.
        cuda_graphs: Whether one GPU runs the model by CUDA graphs.
    """

    class_shares: Tensor

    def __init__(self, preset: Preset, class_shares: Tensor, cuda_graphs: bool = True) -> None:
        super().__init__()
        self.register_buffer("class_shares", class_shares, persistent=False)
        self.training_config = preset.training
        self.model = SpikEmo(preset.model)
        self.valid_f1 = MulticlassF1Score(len(preset.model.classes), average="weighted")
        self.cuda_graphs = cuda_graphs
        self._graphed: GraphedSpikEmo | None = None

    def on_fit_start(self) -> None:
        """On one GPU the model runs by CUDA graphs."""
        alone = self.device.type == "cuda" and self.trainer.world_size == 1
        if self.cuda_graphs and alone and not self.model.config.published_behaviour:
            self._graphed = GraphedSpikEmo(self.model)

    def on_fit_end(self) -> None:
        """Give the memory of the graphs back."""
        self._graphed = None

    def on_train_start(self) -> None:
        """Give each process its own dropout; the first keeps that of a single one."""
        if self.global_rank:
            torch.manual_seed(self.training_config.seed + self.global_rank)

    def training_step(self, batch: DialogueBatch, batch_idx: int) -> dict[str, Any]:
        """Loss of a batch, its terms and how many utterances they are the mean of.

        Of several processes each has the loss of the whole batch, so that they train as one would.

        Raises:
            TrainingDivergedError: The loss is not finite.
        """
        logits, fused = self._run(self._some_modalities(batch))
        labels, labelled = self._labelled(batch)
        rows = [logits[labelled], labels, *(x[labelled] for x in fused.values())]
        if self.trainer.world_size > 1:
            rows = self._of_all_processes(rows)
        logits, labels, *by_modality = rows
        features = dict(zip(fused, by_modality, strict=True))
        terms = spikemo_loss(logits, features, labels, self.training_config.loss, self.class_shares)
        if not torch.isfinite(terms.total):
            raise TrainingDivergedError(
                f"The loss is {terms.total.item()} at step {self.global_step} (epoch {self.current_epoch}), on the "
                f"dialogues {', '.join(batch.ids)}. The last good checkpoint is {self._last_checkpoint()}; try a "
                "smaller learning rate, or gradient_clip."
            )
        for name, term in terms._asdict().items():
            self.log(
                f"train_{name}", term.detach(), on_step=False, on_epoch=True, sync_dist=True, batch_size=len(labels)
            )
        return {"loss": terms.total, "terms": torch.stack(terms).detach(), "utterances": len(labels)}

    def validation_step(self, batch: DialogueBatch, batch_idx: int) -> None:
        """Collect the predictions of a batch."""
        labels, labelled = self._labelled(batch)
        self.valid_f1.update(self._run(batch).logits[labelled].argmax(-1), labels)

    def on_validation_epoch_end(self) -> None:
        """Weighted F1 of all processes' predictions, in percent."""
        self.log("valid_weighted_f1", 100 * self.valid_f1.compute(), prog_bar=True, sync_dist=True)
        self.valid_f1.reset()

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Adam or AdamW, and the step decay of the learning rate."""
        config = self.training_config
        cls = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
        optimizer = cls(
            self.parameters(),
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
            # Lightning clips no gradient for a fused one under mixed precision; None leaves the choice to PyTorch.
            fused=(self.device.type == "cuda" and not (config.gradient_clip and config.precision != "32-true")) or None,
        )
        decay = torch.optim.lr_scheduler.StepLR(optimizer, config.lr_decay_epochs, config.lr_decay)
        return {"optimizer": optimizer, "lr_scheduler": decay}

    def _run(self, batch: DialogueBatch) -> SpikEmoOutput:
        """The model on ``batch``."""
        return self.model(batch) if self._graphed is None else self._graphed(batch)

    def _labelled(self, batch: DialogueBatch) -> tuple[Tensor, Tensor]:
        """Labels [N] of the labelled utterances of a batch, and where they are [B, L]."""
        if batch.labels is None:
            raise ValueError("SpikEmoTask: the batch has no labels.")
        labelled = batch.mask & (batch.labels >= 0)
        return batch.labels[labelled], labelled

    def _some_modalities(self, batch: DialogueBatch) -> DialogueBatch:
        """A batch without some of its modalities, at least one left: the same in all processes, and after a resume."""
        share = self.model.config.modality_dropout
        if not share:
            return batch
        generator = torch.Generator().manual_seed(self.training_config.seed * 1_000_003 + self.global_step)
        chances = torch.rand(len(batch.features), generator=generator)
        kept = (chances >= share) | (chances == chances.max())
        features = {name: x for (name, x), keep in zip(batch.features.items(), kept.tolist(), strict=True) if keep}
        return replace(batch, features=features)

    def _of_all_processes(self, rows: list[Tensor]) -> list[Tensor]:
        """Tensors [N, ...] of all processes, one after another, N each process's own.

        The backward pass adds up what the P processes have for a row. They have the same loss, so that is P times its
        gradient, and by DDP's mean over processes the gradient of that loss.
        """
        gather = self.trainer.strategy.all_gather
        counts = gather(torch.tensor([len(rows[0])], device=self.device)).flatten().tolist()
        whole = []
        for x in rows:
            padded = torch.cat([x, x.new_zeros(max(counts) - len(x), *x.shape[1:])])
            gathered = gather(padded, sync_grads=x.requires_grad)  # [P, max N, ...]
            whole.append(torch.cat([own[:count] for own, count in zip(gathered, counts, strict=True)]))
        return whole

    def _last_checkpoint(self) -> str:
        """Path of the newest checkpoint, or that there is none."""
        callback = self.trainer.checkpoint_callback
        if isinstance(callback, BestAndLast) and callback.last.is_file():
            return str(callback.last)
        return "none: the first epoch was not finished"


class History(Callback):
    """One row of scores an epoch, kept in the checkpoint and so through any number of resumes.

    Args:
        announce: Print a line an epoch, where there is no progress bar to show it.
    """

    def __init__(self, announce: bool = False) -> None:
        self.rows: list[dict[str, float]] = []
        self.announce = announce
        self._sums = torch.zeros(len(LossTerms._fields) + 2)  # of the terms by utterance, utterances, seconds
        self._mark = 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, idx: int) -> None:
        """Start the clock."""
        self._mark = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, idx: int
    ) -> None:
        """Add the batch to the sums of the epoch."""
        count = outputs["utterances"]
        own = torch.cat([outputs["terms"] * count, outputs["terms"].new_tensor([count, time.monotonic() - self._mark])])
        self._sums = self._sums.to(own.device) + own

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add the row of the epoch."""
        *terms, utterances, seconds = trainer.strategy.reduce(self._sums, reduce_op="sum").tolist()
        self._sums = torch.zeros_like(self._sums)
        row = {f"train_{name}": term / utterances for name, term in zip(LossTerms._fields, terms, strict=True)}
        row["valid_weighted_f1"] = float(trainer.callback_metrics["valid_weighted_f1"])
        row |= {"epoch": trainer.current_epoch, "seconds": seconds / trainer.world_size}
        self.rows.append(row)
        if self.announce and trainer.is_global_zero:
            print(
                f"epoch {trainer.current_epoch + 1:3d} of {trainer.max_epochs}: loss {row['train_total']:.4f}, "
                f"validation {row['valid_weighted_f1']:.2f} % weighted F1, {row['seconds']:.1f} s"
            )

    def state_dict(self) -> dict[str, Any]:
        """The rows, and the sums of an epoch under way."""
        return {"rows": self.rows, "sums": self._sums.tolist()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the rows of the checkpoint."""
        self.rows, self._sums = state_dict["rows"], torch.tensor(state_dict["sums"])


@dataclass(frozen=True)
class RunResult:
    """What a run leaves behind, also as ``metrics.json``.

    Args:
        seed: Of the run.
        best_epoch: The epoch, from 0, whose weights were selected.
        parameters: How many the model has.
        valid: Scores of those weights on the validation split.
        test: The same on the test split, scored once.
        history: One row an epoch.
        rates_before: Firing rate of each spiking layer before training, on validation dialogues.
        rates_after: The same after training.
        seconds: Wall time of the training steps.
    """

    seed: int
    best_epoch: int
    parameters: int
    valid: Scores
    test: Scores
    history: list[dict[str, float]]
    rates_before: dict[str, float]
    rates_after: dict[str, float]
    seconds: float


def train(
    corpus: Corpus,
    preset: Preset,
    run_dir: Path,
    *,
    accelerator: str = "auto",
    progress: bool = True,
    save_every: int = 0,
    cuda_graphs: bool = True,
) -> RunResult | None:
    """Train, select on validation, score the test split once, and leave everything in ``run_dir``.

    If ``run_dir`` holds a run of the same configuration, that run is resumed: on a CPU to the same bits.

    Args:
        corpus: Data, with the modalities and widths of the configuration.
        preset: The model and how to train it.
        run_dir: Gets ``config.json``, ``checkpoints/``, ``logs/``, ``predictions.csv`` and ``metrics.json``, and is a
            model directory in the end (`SpikEmo.from_pretrained`).
        accelerator: As in Lightning's Trainer: "auto", "cpu" or "gpu". Started by ``torchrun``, the run uses all
            its processes.
        progress: Whether to show a progress bar, or a line an epoch where the output is no terminal.
        save_every: Steps between two checkpoints inside an epoch; 0 saves at the end of each.
        cuda_graphs: Whether a single GPU runs the model by CUDA graphs (`GraphedSpikEmo`).

    Returns:
        The result; None in all processes but the first.

    Raises:
        ValueError: The corpus does not fit the configuration, or ``run_dir`` holds a run of another one.
        TrainingDivergedError: The loss is no longer finite.
    """
    _check_fit(corpus, preset)
    open_run(run_dir, preset)
    pl.seed_everything(preset.training.seed, verbose=False)
    task = SpikEmoTask(preset, class_shares(corpus), cuda_graphs)
    bar = progress and sys.stderr.isatty()
    history = History(announce=progress and not bar)
    trainer, best = _trainer(preset.training, run_dir, history, accelerator, bar, save_every)
    rates_before = _rates(task.to(trainer.strategy.root_device).model, corpus)
    size, process = preset.training.batch_size, (trainer.global_rank, trainer.world_size)
    train_loader = DialogueLoader(corpus.splits["train"], size, preset.training.seed, *process)
    valid_loader = DialogueLoader(corpus.splits["valid"], size, None, *process)
    resume_from = str(best.last) if best.last.is_file() else None
    trainer.fit(task, train_loader, valid_loader, ckpt_path=resume_from, weights_only=True)
    if not trainer.is_global_zero:
        return None

    state = AtomicCheckpointIO().load_checkpoint(best.best_model_path)["state_dict"]
    task.load_state_dict(state)
    model = task.model.to(trainer.strategy.root_device)
    valid = score(predict(model, corpus.splits["valid"], size), corpus.splits["valid"], corpus.classes)
    probabilities = predict(model, corpus.splits["test"], size)
    test = score(probabilities, corpus.splits["test"], corpus.classes)
    f1 = [row["valid_weighted_f1"] for row in history.rows]
    result = RunResult(
        seed=preset.training.seed,
        best_epoch=max(range(len(f1)), key=f1.__getitem__),
        parameters=sum(p.numel() for p in model.parameters()),
        valid=valid,
        test=test,
        history=history.rows,
        rates_before=rates_before,
        rates_after=_rates(model, corpus),
        seconds=sum(row["seconds"] for row in history.rows),
    )
    write_predictions(run_dir / "predictions.csv", corpus.splits["test"], probabilities, corpus.classes)
    model.origin = _origin(corpus, test)
    for name, content in model.files(training=to_dict(preset.training)).items():
        replace_atomically(run_dir / name, lambda file, content=content: file.write(content))
    write_json(run_dir / "metrics.json", asdict(result))
    return result


def _trainer(
    config: TrainingConfig, run_dir: Path, history: History, accelerator: str, bar: bool, save_every: int
) -> tuple[pl.Trainer, BestAndLast]:
    """Lightning's Trainer with what every run has, and its checkpoint callback."""
    best = BestAndLast(run_dir / "checkpoints", "valid_weighted_f1", save_every)
    callbacks: list[Callback] = [RandomStates(), history, best]
    if config.ema_decay:
        callbacks.append(averaged_weights(config.ema_decay))
    if config.patience:
        callbacks.append(ResumableEarlyStopping("valid_weighted_f1", mode="max", patience=config.patience))
    if bar:
        callbacks.append(TQDMProgressBar(refresh_rate=10))
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if processes > 1:  # else gloo's threads outlive the interpreter now and then, and end the process by abort()
        atexit.register(_leave_process_group)
    trainer = pl.Trainer(
        accelerator=accelerator,
        devices=processes,
        num_nodes=int(os.environ.get("WORLD_SIZE", "1")) // processes,
        strategy="ddp_find_unused_parameters_true" if processes > 1 else "auto",
        precision=config.precision,
        max_epochs=config.epochs,
        gradient_clip_val=config.gradient_clip or None,
        callbacks=callbacks,
        logger=[CSVLogger(run_dir / "logs", "csv"), TensorBoardLogger(run_dir / "logs", "tensorboard")],
        plugins=[AtomicCheckpointIO()],
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_model_summary=False,
        enable_progress_bar=bar,
    )
    return trainer, best


def _leave_process_group() -> None:
    """Stop the threads by which this process talks to the others.

    The model in DDP first: its reducer, if it is the last to let go of the group, joins Gloo's threads while it holds
    the interpreter's lock, which one of them may be waiting for.
    """
    gc.collect()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def class_shares(corpus: Corpus) -> Tensor:
    """Share [C] of each class among the labelled training utterances, each counted once more, so that none is 0."""
    labels = torch.cat([d.labels for d in corpus.splits["train"]])
    counts = torch.bincount(labels[labels >= 0], minlength=len(corpus.classes)) + 1
    return counts / counts.sum()


def _origin(corpus: Corpus, test: Scores) -> Origin:
    """What the model is to remember of its data."""
    return Origin(
        data=corpus.name,
        about=corpus.about,
        extractors={name: made for name, made in corpus.extractors.items() if name in corpus.about},
        scores={"weighted F1": test.weighted_f1, "accuracy": test.accuracy},
        standardised={name: x for name, x in corpus.standardised.items() if name in corpus.about},
        reduced={name: x for name, x in corpus.reduced.items() if name in corpus.about},
    )


def _check_fit(corpus: Corpus, preset: Preset) -> None:
    """The corpus has the modalities, widths and classes of the configuration, and its loss fits its modalities."""
    config = preset.model
    if config.modality_dropout and preset.training.loss.corr_pair_weights:
        raise ValueError("train: modality_dropout leaves pairs of modalities out; leave corr_pair_weights empty.")
    wanted = {name: modality.features for name, modality in config.modalities.items()}
    if corpus.widths != wanted:
        raise ValueError(f"train: {corpus.name} has features {corpus.widths}, the configuration wants {wanted}.")
    if corpus.classes != config.classes:
        raise ValueError(f"train: {corpus.name} has the classes {corpus.classes}, not {config.classes}.")


def _rates(model: SpikEmo, corpus: Corpus, dialogues: int = 16) -> dict[str, float]:
    """Firing rates on the first validation dialogues, in eval mode."""
    batch = collate(corpus.splits["valid"][:dialogues]).to(next(model.parameters()).device)
    training = model.training
    rates = firing_rates(model.eval(), batch, key_padding_mask=_together(model, ~batch.mask))
    model.train(training)
    return rates


def _together(model: SpikEmo, padding: Tensor) -> Tensor:
    """The padding mask as DSWA sees it: once for each modality where they share one."""
    return padding.repeat(len(model.encoders), 1) if "shared" in model.dswa else padding
