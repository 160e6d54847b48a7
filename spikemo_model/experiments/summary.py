"""What an experiment shows: one Markdown table and one plot, beside the paper's numbers."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure
from scipy.stats import ttest_rel

from spikemo_model.checkpoints import replace_atomically
from spikemo_model.data.corpus import Corpus
from spikemo_model.experiments.cells import Cell, Experiment
from spikemo_model.experiments.run import CellResult
from spikemo_model.report import comparison

Results = dict[str, list[CellResult]]


def write_summary(experiment: Experiment, results: Results, corpus: Corpus, command: str, out: Path) -> Path:
    """Write ``results.md`` and ``results.svg``.

    Args:
        experiment: The cells.
        results: What `run_cells` returned for them.
        corpus: The data.
        command: What makes the same again.
        out: Folder.

    Returns:
        Path of the table.
    """
    first, *_ = experiment.cells
    seeds = [result.seed for result in results[first.name]]
    epochs, batch_size = first.preset.training.epochs, first.preset.training.batch_size
    lines = [
        f"## {experiment.title}, {corpus.name}",
        "",
        f"    {command}",
        "",
        f"Weighted F1 in percent, seeds {', '.join(map(str, seeds))}, {epochs} epochs of batches of {batch_size}; the "
        "epoch is selected on validation and the test split scored once. p is of a two-sided paired t-test over the "
        f"{len(seeds)} seeds against {first.name!r}, not corrected for the number of lines; few seeds find only large "
        "differences.",
        "",
        *markdown(_rows(experiment.cells, results, corpus.name)),
        "",
        f"{experiment.note} {comparison(corpus)[0]}",
        "",
        "![test scores by configuration](results.svg)",
    ]
    alive = _dswa_rows(experiment.cells, results)
    if len(alive) > 1:
        lines += [
            "",
            "DSWA after training, means over the seeds: the firing rates of its quietest and busiest layer; the gate's "
            "mean relative distance from level; and what the test score gains by the gate over a level one.",
            "",
            *markdown(alive),
        ]
    path = out / "results.md"
    replace_atomically(path, lambda file: file.write("\n".join([*lines, ""]).encode("utf-8")))
    _plot(experiment, results, corpus.name, out / "results.svg")
    return path


def markdown(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Lines of a Markdown table, the first row its header."""
    header, *body = rows
    rule = ("---", *["---:"] * (len(header) - 1))
    return [f"| {' | '.join(row)} |" for row in (header, rule, *body)]


def paired_p(scores: Sequence[float], others: Sequence[float]) -> float | None:
    """Two-sided p of a paired t-test; None for fewer than two pairs, or if all of them differ by the same."""
    differences = [a - b for a, b in zip(scores, others, strict=True)]
    if len(set(differences)) < 2:
        return None
    return float(ttest_rel(scores, others).pvalue)


def _rows(cells: Sequence[Cell], results: Results, data: str) -> list[tuple[str, ...]]:
    """The table: each cell, its seeds, its difference from the first, and the same of the paper."""
    reference = [r.test for r in results[cells[0].name]]
    paper_reference = cells[0].paper.get(data)
    rows: list[tuple[str, ...]] = [
        ("configuration", "valid", "test, by seed", "test", "difference", "p", "paper", "paper's difference")
    ]
    for cell in cells:
        test = [r.test for r in results[cell.name]]
        paper = cell.paper.get(data)
        valid = statistics.mean(r.valid for r in results[cell.name])
        own, p, published = "", "", ""
        if cell is not cells[0]:
            own = f"{statistics.mean(test) - statistics.mean(reference):+.2f}"
            value = paired_p(test, reference)
            p = "" if value is None else f"{value:.2f}"
            published = f"{paper - paper_reference:+.2f}" if paper and paper_reference else ""
        seeds = ", ".join(f"{f1:.2f}" for f1 in test)
        paper_cell = f"{paper:.2f}" if paper else ""
        rows.append((cell.name, f"{valid:.2f}", seeds, _mean_and_std(test), own, p, paper_cell, published))
    return rows


def _mean_and_std(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def _dswa_rows(cells: Sequence[Cell], results: Results) -> list[tuple[str, ...]]:
    """Of each cell that has DSWA: is it alive, does the gate move, does the score need it?"""
    rows: list[tuple[str, ...]] = [
        ("configuration", "quietest layer, %", "busiest layer, %", "gate from level", "worth of the gate")
    ]
    for cell in cells:
        gates = [(r, r.gate) for r in results[cell.name] if r.gate is not None]
        if not gates:
            continue
        rates = [list(r.rates.values()) for r, _ in gates]
        worth = [r.test - gate.level_f1 for r, gate in gates]
        rows.append(
            (
                cell.name,
                f"{100 * statistics.mean(map(min, rates)):.1f}",
                f"{100 * statistics.mean(map(max, rates)):.1f}",
                f"{statistics.mean(gate.spread for _, gate in gates):.2f}",
                f"{statistics.mean(worth):+.2f}",
            )
        )
    return rows


def _plot(experiment: Experiment, results: Results, data: str, path: Path) -> None:
    """Each seed's test score by configuration, the mean and standard deviation, and the paper's score."""
    cells = experiment.cells
    figure = Figure(figsize=(7.5, 1.4 + 0.45 * len(cells)), layout="constrained")
    axes = figure.subplots()
    for place, cell in enumerate(cells):
        test = [r.test for r in results[cell.name]]
        axes.plot(test, [place] * len(test), "o", color="tab:blue", alpha=0.5, label="a seed")
        std = statistics.stdev(test) if len(test) > 1 else math.nan
        axes.errorbar(
            statistics.mean(test), place, xerr=std, fmt="|", color="black", capsize=4, label="mean, standard deviation"
        )
        if data in cell.paper:
            axes.plot(cell.paper[data], place, "D", color="tab:orange", fillstyle="none", label="paper, other features")
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize="small")
    axes.set_yticks(range(len(cells)), [cell.name for cell in cells])
    axes.invert_yaxis()
    axes.set(title=f"{experiment.title}, {data}", xlabel="weighted F1 on test, %")
    with rc_context({"svg.hashsalt": "spikemo"}):
        replace_atomically(path, lambda file: figure.savefig(file, format="svg", metadata={"Date": None}))
