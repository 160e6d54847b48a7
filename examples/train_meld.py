"""Train SpikEmo on MELD: the main job.

Finds the data (--data-dir, else $SPIKEMO_DATA, the user cache, a download, or made-up conversations, and says
which), trains, selects the epoch on validation, scores the test split once, and prints the scores beside logistic
regression on the same features, and the path of a report.

    python examples/train_meld.py                                    frozen text features and prosody, one seed
    python examples/train_meld.py --seeds 3 --text finetuned         another text encoder, three seeds
    python examples/train_meld.py --preset published --precision bf16-mixed      the paper's sizes, for a GPU
    python examples/train_meld.py --resume runs/meld-20260101-120000             go on where a run was stopped
    torchrun --nproc_per_node=2 examples/train_meld.py --run-dir runs/two        several processes
"""

import argparse
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from spikemo_model.config import ModalityConfig, Preset, compact, meld
from spikemo_model.data import Corpus, Located, locate_meld
from spikemo_model.experiment import run_experiment
from spikemo_model.training import TrainingDivergedError, write_json


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Options; those of the run to resume, if any."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="folder of MELD's files, or a feature store")
    parser.add_argument("--text", default="auto", help='"frozen", "finetuned", "ngrams", or a Hugging Face encoder')
    parser.add_argument("--modalities", nargs="+", help="a subset of those found, e.g. --modalities text")
    parser.add_argument("--preset", choices=("compact", "published"), default="compact")
    parser.add_argument("--epochs", type=int, help="instead of the preset's")
    parser.add_argument("--time-steps", type=int, help="instead of the preset's")
    parser.add_argument("--patience", type=int, default=0, help="stop after so many epochs without improvement")
    parser.add_argument("--precision", choices=("32-true", "bf16-mixed"), default="32-true")
    parser.add_argument("--seeds", type=int, default=1, help="how many")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--accelerator", choices=("auto", "cpu", "gpu"), default="auto")
    parser.add_argument("--save-every", type=int, default=0, help="steps between checkpoints inside an epoch")
    parser.add_argument("--run-dir", help="default: runs/meld-<time>")
    parser.add_argument("--resume", metavar="RUN_DIR", help="go on with a run, with its own options")
    options = parser.parse_args(argv)
    if options.resume:
        saved = Path(options.resume) / "options.json"
        if not saved.is_file():
            parser.error(f"--resume: there is no {saved}; {options.resume} holds no run")
        return argparse.Namespace(**json.loads(saved.read_text(encoding="utf-8")), run_dir=options.resume)
    if not options.run_dir:
        if "WORLD_SIZE" in os.environ:
            parser.error("several processes need one --run-dir")
        options.run_dir = f"runs/meld-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    if (Path(options.run_dir) / "options.json").exists() and int(os.environ.get("RANK", "0")) == 0:
        parser.error(f"{options.run_dir} holds a run already; go on with it by --resume {options.run_dir}")
    return options


def configure(options: argparse.Namespace, corpus: Corpus) -> Preset:
    """The preset, with the options over it."""
    if options.preset == "compact":
        model, training = compact(corpus.widths, corpus.classes)
    else:
        model, training = meld()
        modalities = {
            name: ModalityConfig(width, model.modalities[name].context) for name, width in corpus.widths.items()
        }
        model = replace(model, modalities=modalities, classes=corpus.classes)
    if options.time_steps:
        model = replace(model, dswa=replace(model.dswa, time_steps=options.time_steps))
    training = replace(
        training,
        epochs=options.epochs or training.epochs,
        patience=options.patience,
        precision=options.precision,
        seed=options.first_seed,
    )
    return Preset(model, training)


def main(argv: list[str] | None = None) -> None:
    """Options, configuration, data, training, report."""
    options = parse(argv)
    if options.preset == "compact":  # as fast at this size, and the result does not depend on the number of cores
        torch.set_num_threads(1)
    try:
        data_dir = Path(options.data_dir) if options.data_dir else None
        corpus, source = locate_meld(data_dir, options.text)
        corpus = corpus.select(options.modalities) if options.modalities else corpus
        preset = configure(options, corpus)
        if int(os.environ.get("RANK", "0")) == 0:
            kept = {name: value for name, value in vars(options).items() if name not in ("run_dir", "resume")}
            write_json(Path(options.run_dir) / "options.json", kept)
        located, run_dir = Located(corpus, source), Path(options.run_dir)
        run_experiment(located, preset, run_dir, options.seeds, options.accelerator, options.save_every)
    except (OSError, ValueError, TrainingDivergedError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
