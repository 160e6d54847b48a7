"""One training job, as the command line and the examples start it: its options, its data, its folder."""

import json
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from spikemo_model.config import (
    IEMOCAP_EMOTIONS,
    ModalityConfig,
    Preset,
    TrainingConfig,
    compact,
    from_dict,
    iemocap,
    meld,
)
from spikemo_model.data import Corpus, DataError, Located, locate_meld, read_mosi, standardise
from spikemo_model.experiment import run_experiment
from spikemo_model.runs import write_json
from spikemo_model.training import RunResult

_OPTIONS = "options.json"


@dataclass(frozen=True)
class Job:
    """What to train, and on what; kept as ``options.json`` in the folder of its runs.

    Args:
        data: "meld", or "mosi" for CMU-MOSI.
        data_dir: Folder of the data, or a feature store of any data set; None looks in the usual places.
        text: Text features of MELD, as `locate_meld` takes them.
        modalities: A subset of those found, in the order of fusion; None takes all.
        preset: "compact", or the "published" one of IEMOCAP or MELD, by the classes of the data.
        epochs: At most; None takes the preset's, and so do the next two.
        batch_size: Dialogues a step.
        time_steps: T of the spiking blocks.
        patience: Epochs without a better validation score before training stops; 0 never stops early.
        precision: As in `TrainingConfig`.
        seeds: How many runs, each with the next seed.
        first_seed: Seed of the first.
        accelerator: As in Lightning's Trainer.
        save_every: Steps between two checkpoints inside an epoch; 0 saves at the end of each.
        causal: Train a model that sees the past only (`SpikEmoConfig`), with DialogueRNN for the compact preset's GRUs.
        modality_dropout: As in `SpikEmoConfig`.
    """

    data: Literal["meld", "mosi"] = "meld"
    data_dir: str | None = None
    text: str = "auto"
    modalities: tuple[str, ...] | None = None
    preset: Literal["compact", "published"] = "compact"
    epochs: int | None = None
    batch_size: int | None = None
    time_steps: int | None = None
    patience: int = 0
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    seeds: int = 1
    first_seed: int = 0
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    save_every: int = 0
    causal: bool = False
    modality_dropout: float = 0.0


def new_run_dir(name: str) -> Path:
    """A folder for runs that nobody has yet: ``runs/<name>-<time>-<process>``.

    Raises:
        ValueError: Several processes train together, and would each choose another one.
    """
    if "WORLD_SIZE" in os.environ:
        raise ValueError("several processes need one --run-dir.")
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"


def read_job(run_dir: Path) -> Job:
    """The job whose runs are in ``run_dir``.

    Raises:
        FileNotFoundError: There is none.
        ValueError: Its ``options.json`` is not one of ours.
    """
    saved = run_dir / _OPTIONS
    if not saved.is_file():
        raise FileNotFoundError(f"--resume: there is no {saved}; {run_dir} holds no run.")
    try:
        return from_dict(Job, json.loads(saved.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"--resume: {saved} cannot be read ({error}). Train anew in another folder.") from error


def locate(data: str, data_dir: str | Path | None, text: str = "auto") -> Located:
    """The data of a job, read and standardised on its training split.

    Args:
        data: As in `Job`, and so the others.
        data_dir: Folder of the data.
        text: Text features of MELD.

    Raises:
        DataError: It is not there, or not as it must be.
    """
    folder = Path(data_dir) if data_dir else None
    if data == "meld" or (folder and (folder / "index.json").is_file()):
        return locate_meld(folder, text)
    if folder is None and "SPIKEMO_DATA" not in os.environ:
        raise DataError("CMU-MOSI: set SPIKEMO_DATA to the folder that holds mosi/, or give --data-dir.")
    root = folder or Path(os.environ["SPIKEMO_DATA"]) / "mosi"
    corpus = read_mosi(root)
    return Located(standardise(corpus, list(corpus.about)), f"CMU-MOSI in {root}")


def configure(job: Job, corpus: Corpus) -> Preset:
    """The preset of ``job`` for ``corpus``, with the job's options over it.

    Raises:
        ValueError: An option is out of range.
    """
    if job.preset == "compact":
        model, training = compact(corpus.widths, corpus.classes)
    else:
        model, training = (iemocap if corpus.classes == IEMOCAP_EMOTIONS else meld)()
        contexts = {name: modality.context for name, modality in model.modalities.items()}
        if not corpus.widths.keys() <= contexts.keys():
            raise ValueError(f"the published preset knows {list(contexts)}, but the data has {list(corpus.widths)}.")
        modalities = {name: ModalityConfig(width, contexts[name]) for name, width in corpus.widths.items()}
        model = replace(model, modalities=modalities, classes=corpus.classes)
    if job.time_steps is not None and model.dswa is not None:
        model = replace(model, dswa=replace(model.dswa, time_steps=job.time_steps))
    if job.causal:
        onward = {
            name: replace(own, context="none" if own.context == "none" else "forward")
            for name, own in model.modalities.items()
        }
        model = replace(model, modalities=onward, is_causal=True)
    model = replace(model, modality_dropout=job.modality_dropout)
    return Preset(model, _configure_training(job, training))


def _configure_training(job: Job, training: TrainingConfig) -> TrainingConfig:
    """``training`` with the options of ``job``."""
    return replace(
        training,
        epochs=training.epochs if job.epochs is None else job.epochs,
        batch_size=training.batch_size if job.batch_size is None else job.batch_size,
        patience=job.patience,
        precision=job.precision,
        seed=job.first_seed,
    )


def run_job(job: Job, run_dir: Path, resume: bool = False) -> list[RunResult]:
    """Find the data, note the options in ``run_dir``, train with every seed, and report.

    Args:
        job: What to train on what.
        run_dir: Gets ``options.json`` and a folder a seed.
        resume: Go on with the runs that are there, instead of refusing a folder that has some.

    Returns:
        As `run_experiment`.

    Raises:
        FileExistsError: ``run_dir`` holds runs, and they were not to be resumed.
        DataError: The data is not there, or not as it must be.
        ValueError: An option is out of range.
        TrainingDivergedError: The loss is no longer finite.
    """
    first = int(os.environ.get("RANK", "0")) == 0
    if first and not resume and (run_dir / _OPTIONS).exists():
        raise FileExistsError(f"{run_dir} holds a run already; go on with it by --resume {run_dir}.")
    if job.preset == "compact":  # as fast at this size, and the result does not depend on the number of cores
        torch.set_num_threads(1)
    corpus, source = locate(job.data, job.data_dir, job.text)
    corpus = corpus.select(job.modalities) if job.modalities else corpus
    preset = configure(job, corpus)
    if first:
        write_json(run_dir / _OPTIONS, asdict(job))
    return run_experiment(Located(corpus, source), preset, run_dir, job.seeds, job.accelerator, job.save_every)
