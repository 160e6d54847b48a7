"""Checkpoints that are whole or not there, load without executing anything, and resume to the same bits."""

import os
import random
import tempfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, WeightAveraging
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor


def replace_atomically(path: Path, write: Any) -> None:
    """Call ``write(file)`` on a temporary file beside ``path``, then put it in the place of ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, unfinished = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(unfinished, 0o644)
        os.replace(unfinished, path)
    except BaseException:
        Path(unfinished).unlink(missing_ok=True)
        raise


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, replaced atomically and read with ``weights_only=True``."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write ``checkpoint`` to ``path``."""
        replace_atomically(Path(path), lambda file: torch.save(checkpoint, file))

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        """Read a checkpoint; whatever is asked for, nothing in the file is executed.

        Raises:
            ValueError: The file is damaged or holds more than tensors and plain values.
        """
        try:
            return torch.load(path, map_location=map_location, weights_only=True)
        except (UnpicklingError, RuntimeError, EOFError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"checkpoint: {path} cannot be read ({reason}). Remove it to start from an older one, or anew."
            ) from error


class BestAndLast(ModelCheckpoint):
    """Keeps ``best.ckpt``, by a validation score, and ``last.ckpt``, of every epoch, in this order.

    A run that is killed between the two resumes from the older last one and finds the same best again.

    Args:
        folder: Of the checkpoints.
        monitor: The score, the higher the better.
        save_every: Steps after which ``last.ckpt`` is replaced inside an epoch, too; 0 for never. Not after an
            epoch's last step: validation belongs to the epoch.
    """

    def __init__(self, folder: Path, monitor: str, save_every: int = 0) -> None:
        super().__init__(
            folder,
            filename="best",
            monitor=monitor,
            mode="max",
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )
        self.save_every = save_every
        self.last = folder / "last.ckpt"

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace the best, if this epoch is, then the last."""
        super().on_train_epoch_end(trainer, pl_module)
        self._save_last(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Replace the last, if it is time."""
        if self.save_every and not trainer.is_last_batch and trainer.global_step % self.save_every == 0:
            self._save_last(trainer)

    def _save_last(self, trainer: Trainer) -> None:
        self.last_model_path = str(self.last)
        trainer.save_checkpoint(self.last)


class RandomStates(Callback):
    """Keeps the state of every random generator of every process in the checkpoint."""

    def __init__(self) -> None:
        self._restored: list[dict[str, Any]] | None = None

    def state_dict(self) -> dict[str, Any]:
        """States by process; called by Lightning on all of them."""
        algorithm, keys, position, has_gauss, cached = np.random.get_state()
        own = {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "python": random.getstate(),
            "numpy": (algorithm, np.asarray(keys).tolist(), position, has_gauss, cached),
        }
        states = [own]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            states = [own] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(states, own)
        return {"states": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the states until training goes on."""
        self._restored = state_dict["states"]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Put the generators back where they were, before the first batch after resuming."""
        if self._restored is None:
            return
        own = self._restored[trainer.global_rank % len(self._restored)]
        self._restored = None
        torch.set_rng_state(own["torch"])
        if own["cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(own["cuda"])
        random.setstate(own["python"])
        algorithm, keys, position, has_gauss, cached = own["numpy"]
        np.random.set_state((algorithm, np.array(keys, dtype=np.uint32), position, has_gauss, cached))


class ResumableEarlyStopping(EarlyStopping):
    """Early stopping that stays stopped when a run that it had ended is resumed."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do not train on past the patience."""
        if self.wait_count >= self.patience:
            trainer.should_stop = True


def averaged_weights(decay: float) -> WeightAveraging:
    """Exponential moving average of the weights; its memory grows with the number of steps n, up to ``decay``.

    The decay of step n is ``min(decay, (1 + n) / (10 + n))``, so that the random start is soon forgotten.
    """

    def average(averaged: Tensor, current: Tensor, count: Tensor | int) -> Tensor:
        n = int(count)
        return averaged.lerp(current, 1 - min(decay, (1 + n) / (10 + n)))

    return WeightAveraging(avg_fn=average)
