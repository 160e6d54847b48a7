"""One experiment: the same configuration with several seeds, its scores, and a report of each."""

import logging
import os
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from spikemo_model.config import Preset
from spikemo_model.data.locate import Located
from spikemo_model.evaluation import logistic_regression
from spikemo_model.insight import measure
from spikemo_model.model import SpikEmo
from spikemo_model.report import comparison, format_table, score_table, write_report
from spikemo_model.training import RunResult, train


def run_experiment(
    located: Located,
    preset: Preset,
    run_dir: Path,
    seeds: int = 1,
    accelerator: str = "auto",
    save_every: int = 0,
) -> list[RunResult]:
    """Train with the seeds ``preset.training.seed`` and up, print the scores, and write a report of each.

    A seed that is finished or under way in ``run_dir`` is resumed.

    Args:
        located: The data, and where it was found.
        preset: The model and how to train it.
        run_dir: Gets a folder ``seed<k>`` for each.
        seeds: How many.
        accelerator: As in `train`.
        save_every: As in `train`.

    Returns:
        The results, in the order of the seeds; empty in all processes but the first.
    """
    quiet_lightning()
    corpus = located.corpus
    first = int(os.environ.get("RANK", "0")) == 0
    baseline = None
    if first:
        print(f"data: {located.source}")
        for name, what in corpus.about.items():
            print(f"  {name}: {what}, {corpus.widths[name]}-d")
        for note in corpus.notes:
            print(f"  note: {note}")
        baseline = logistic_regression(corpus)
        print(f"logistic regression on the same features: {baseline.weighted_f1:.2f} % weighted F1 on test")
    results = []
    for seed in range(preset.training.seed, preset.training.seed + seeds):
        own = replace(preset.training, seed=seed)
        seed_dir = run_dir / f"seed{seed}"
        result = train(corpus, Preset(preset.model, own), seed_dir, accelerator=accelerator, save_every=save_every)
        if result is None:
            continue
        results.append(result)
        insight = measure(SpikEmo.from_pretrained(seed_dir), corpus)
        report = write_report(seed_dir, result, Preset(preset.model, own), corpus, located.source, insight, baseline)
        print(
            f"\nseed {seed}: epoch {result.best_epoch + 1} of {len(result.history)} selected on validation "
            f"({result.valid.weighted_f1:.2f} % weighted F1); {result.parameters:,} parameters; "
            f"{result.seconds:.0f} s\n"
        )
        print(format_table(score_table(result.test, baseline, corpus)))
        print(f"\nreport: {report}")
    if results:
        print(f"\n{comparison(corpus)[0]}")
    if len(results) > 1:
        print(summary([result.test.weighted_f1 for result in results]))
    return results


def quiet_lightning() -> None:
    """Leave out Lightning's advertisements, a deprecation inside it, and that there is no Triton; warnings stay."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # spikingjelly's nodes ask for it
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")


def summary(scores: Sequence[float]) -> str:
    """Scores of several seeds, their mean and standard deviation, in a line."""
    each = ", ".join(f"{f1:.2f}" for f1 in scores)
    return (
        f"weighted F1 on test, {len(scores)} seeds: {each}; mean {statistics.mean(scores):.2f}, "
        f"standard deviation {statistics.stdev(scores):.2f}"
    )
