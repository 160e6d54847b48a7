"""Train SpikEmo on CMU-MOSI: all three modalities, on real sequences of one speaker each.

What one learns: how to train on data of your own, with any modalities, widths and classes: read it into a `Corpus`,
choose a preset, run. The labels are binary sentiment, not emotions. Needs $SPIKEMO_DATA, a folder that holds
``mosi/``. Prints the scores and the path of the report.
"""

import argparse
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

from spikemo_model.config import Preset, compact
from spikemo_model.data import Located, read_mosi, standardise
from spikemo_model.experiment import run_experiment


def main(argv: list[str] | None = None) -> None:
    """Options, data, training, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=18)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--run-dir", default=f"runs/mosi-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
    options = parser.parse_args(argv)
    if "SPIKEMO_DATA" not in os.environ:
        sys.exit("error: set SPIKEMO_DATA to the folder that holds mosi/.")
    try:
        root = Path(os.environ["SPIKEMO_DATA"]) / "mosi"
        corpus = standardise(read_mosi(root), ["text", "audio", "visual"])
        model, training = compact(corpus.widths, corpus.classes)
        training = replace(training, epochs=options.epochs, batch_size=8)
        located = Located(corpus, f"CMU-MOSI in {root}")
        run_experiment(located, Preset(model, training), Path(options.run_dir), options.seeds)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
