"""Run the cells of an experiment: each configuration with each seed, side by side, what is finished only once."""

import json
import multiprocessing
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from spikemo_model.config import Preset
from spikemo_model.data.corpus import SPLITS, Corpus, DataError
from spikemo_model.data.store import load_corpus, save_corpus
from spikemo_model.experiment import quiet_lightning
from spikemo_model.experiments.cells import Cell
from spikemo_model.experiments.gate import Gate, measure_gate
from spikemo_model.model import SpikEmo
from spikemo_model.runs import leave_with, open_run, write_json
from spikemo_model.training import train


@dataclass(frozen=True)
class CellResult:
    """One configuration with one seed, also as ``cell.json`` of its run.

    Args:
        seed: Of the run.
        valid: Weighted F1 of the selected epoch on validation, in percent.
        test: The same on test, scored once.
        rates: Firing rate of each spiking layer after training, on validation dialogues.
        gate: What DSWA's gate does; None without DSWA.
        seconds: Wall time of the training steps.
    """

    seed: int
    valid: float
    test: float
    rates: dict[str, float]
    gate: Gate | None
    seconds: float


def run_cells(
    corpus: Corpus,
    cells: Sequence[Cell],
    seeds: Sequence[int],
    out: Path,
    *,
    workers: int | None = None,
    accelerator: str = "auto",
    announce: Callable[[str], None] = lambda line: None,
) -> dict[str, list[CellResult]]:
    """Train every cell with every seed; what ``out`` holds already is not trained again.

    Each run has a process, with one thread of a CPU or one GPU to itself. One that was stopped is resumed.

    Args:
        corpus: The data, with all modalities that the cells name.
        cells: The configurations; the seed in them does not matter.
        seeds: Of the runs.
        out: Gets ``data/``, the corpus, and a folder ``<cell>/seed<k>`` for each run, as `train` leaves it.
        workers: Processes at a time; None for one on each GPU, or each core where there is none.
        accelerator: "auto", "cpu" or "gpu".
        announce: Called with a line for each run that is finished.

    Returns:
        By the cell's name, one result a seed, in their order.

    Raises:
        DataError: ``out`` holds an experiment on other data.
        ValueError: ``out`` holds one of the runs with another configuration.
        RuntimeError: A run failed; the message says which. Those that had begun are finished and kept.
    """
    _keep_data(corpus, out / "data")
    jobs: list[tuple[Cell, int, Preset, Path]] = []
    for seed in seeds:  # all cells with the first seed before any with the second
        for cell in cells:
            preset = cell.preset._replace(training=replace(cell.preset.training, seed=seed))
            run_dir = out / _slug(cell.name) / f"seed{seed}"
            open_run(run_dir, preset)
            jobs.append((cell, seed, preset, run_dir))
    waiting = [job for job in jobs if not (job[3] / "cell.json").is_file()]
    announce(f"{len(jobs)} runs, {len(jobs) - len(waiting)} of them finished before")
    if waiting:
        devices = _devices(accelerator)
        workers = min(workers or len(devices) or os.cpu_count() or 1, len(waiting))
        context = multiprocessing.get_context("spawn")
        places = context.SimpleQueue()
        for i in range(workers):
            places.put(devices[i % len(devices)] if devices else None)
        with ProcessPoolExecutor(workers, context, _start, (places, os.getpid())) as pool:
            futures = {
                pool.submit(_run, out / "data", preset, run_dir, accelerator): (cell.name, seed, run_dir)
                for cell, seed, preset, run_dir in waiting
            }
            for done, future in enumerate(as_completed(futures), start=1):
                name, seed, run_dir = futures[future]
                error = future.exception()
                if error is not None:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise RuntimeError(f"experiment: {name}, seed {seed} failed: {error}") from error
                result = _read(run_dir)
                announce(
                    f"{done} of {len(waiting)}: {name}, seed {seed}: {result.test:.2f} % weighted F1 on test, "
                    f"{result.seconds:.0f} s"
                )
    results: dict[str, list[CellResult]] = {cell.name: [] for cell in cells}
    for cell, _, _, run_dir in jobs:
        results[cell.name].append(_read(run_dir))
    return results


def _keep_data(corpus: Corpus, folder: Path) -> None:
    """Store the corpus for the processes, or make sure that the one that is there is the same."""
    if not folder.exists():
        save_corpus(corpus, folder)
        return
    found = load_corpus(folder)
    same = found.about == corpus.about and all(
        len(found.splits[split]) == len(corpus.splits[split])
        and all(
            a.id == b.id
            and torch.equal(a.labels, b.labels)
            and all(torch.equal(a.features[name], b.features[name]) for name in corpus.about)
            for a, b in zip(found.splits[split], corpus.splits[split], strict=True)
        )
        for split in SPLITS
    )
    if not same:
        raise DataError(
            f"experiment: {folder.parent} holds an experiment on other data ({found.name}: {found.about}). Choose "
            "another folder."
        )


def _slug(name: str) -> str:
    """A cell's name as that of a folder."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _devices(accelerator: str) -> list[str]:
    """The GPUs to use, as CUDA names them."""
    if accelerator == "cpu" or not torch.cuda.is_available():
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]


def _start(places: Any, parent: int) -> None:
    """Make this process one of several, which ends with its ``parent``: one thread, or one GPU."""
    leave_with(parent)
    device = places.get()
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    torch.set_num_threads(1)
    quiet_lightning()


def _run(data: Path, preset: Preset, run_dir: Path, accelerator: str) -> None:
    """Train one cell with one seed and note what the tables need; called in a process of its own."""
    corpus = load_corpus(data).select(list(preset.model.modalities))
    result = train(corpus, preset, run_dir, accelerator=accelerator, progress=False)
    if result is None:
        raise RuntimeError("experiment: not for torchrun; it starts its own processes.")
    gate = measure_gate(SpikEmo.from_pretrained(run_dir), corpus, preset.training.batch_size)
    valid, test = result.valid.weighted_f1, result.test.weighted_f1
    cell = CellResult(result.seed, valid, test, result.rates_after, gate, result.seconds)
    write_json(run_dir / "cell.json", asdict(cell))


def _read(run_dir: Path) -> CellResult:
    values = json.loads((run_dir / "cell.json").read_text(encoding="utf-8"))
    gate = None if values["gate"] is None else Gate(**values["gate"])
    return CellResult(**{**values, "gate": gate})
