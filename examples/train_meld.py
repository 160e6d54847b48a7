"""Train SpikEmo on MELD: the main job.

Finds the data (--data-dir, else $SPIKEMO_DATA, the user cache, a download, or made-up conversations, and says
which), trains, selects the epoch on validation, scores the test split once, and prints the scores beside logistic
regression on the same features, and the path of a report.

    python examples/train_meld.py                                    frozen text features and prosody, one seed
    python examples/train_meld.py --seeds 3 --text finetuned         another text encoder, three seeds
    python examples/train_meld.py --preset published --precision bf16-mixed      the paper's sizes, for a GPU
    python examples/train_meld.py --resume runs/meld-20260101-120000             go on where a run was stopped
    torchrun --nproc_per_node=2 examples/train_meld.py --run-dir runs/two        several processes

The same and more from the command line: python -m spikemo_model train --help
"""

import argparse
import sys
from pathlib import Path

from spikemo_model.job import Job, new_run_dir, read_job, run_job
from spikemo_model.training import TrainingDivergedError


def main(argv: list[str] | None = None) -> None:
    """Options, then the job."""
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
    parser.add_argument("--causal", action="store_true", help="a model for live conversations: it sees the past only")
    parser.add_argument("--modality-dropout", type=float, default=0.0, help="probability that a step lacks a modality")
    parser.add_argument("--run-dir", help="default: runs/meld-<time>")
    parser.add_argument("--resume", metavar="RUN_DIR", help="go on with a run, with its own options")
    options = vars(parser.parse_args(argv))
    run_dir, resume = options.pop("run_dir"), options.pop("resume")
    try:
        if resume:
            run_job(read_job(Path(resume)), Path(resume), resume=True)
        else:
            run_job(Job(**options), Path(run_dir) if run_dir else new_run_dir("meld"))
    except (OSError, ValueError, TrainingDivergedError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
