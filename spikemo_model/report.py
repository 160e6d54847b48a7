"""What a run shows: plots, tables beside the paper's, and one self-contained HTML page."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import torch
from matplotlib.figure import Figure

import spikeattn
from spikemo_model.checkpoints import replace_atomically
from spikemo_model.config import IEMOCAP_EMOTIONS, MELD_EMOTIONS, Preset, to_dict
from spikemo_model.data.corpus import SPLITS, Corpus
from spikemo_model.evaluation import Scores
from spikemo_model.training import RunResult

# Weighted F1 of the paper by modalities (Table V), and F1 by class with all three (Table II), in percent.
_T, _A, _V = "text", "audio", "visual"
_SUBSETS = ((_A,), (_V,), (_T,), (_A, _V), (_T, _A), (_T, _V), (_T, _A, _V))
PAPER_WEIGHTED_F1 = {
    name: {frozenset(subset): f1 for subset, f1 in zip(_SUBSETS, column, strict=True)}
    for name, column in (
        ("MELD", (35.91, 31.27, 59.56, 39.98, 62.22, 63.22, 65.92)),
        ("IEMOCAP", (40.67, 27.44, 64.77, 46.80, 67.06, 65.15, 71.50)),
    )
}
PAPER_CLASS_F1 = {
    "MELD": dict(zip(MELD_EMOTIONS, (79.53, 58.40, 21.95, 40.00, 63.89, 28.85, 54.20), strict=True)),
    "IEMOCAP": dict(zip(IEMOCAP_EMOTIONS, (58.16, 82.17, 72.61, 66.67, 79.01, 64.82), strict=True)),
}


def comparison(corpus: Corpus) -> tuple[str, float | None]:
    """Say how far scores on ``corpus`` can be set beside the paper's; and its weighted F1 of these modalities."""
    if corpus.name not in PAPER_WEIGHTED_F1:
        return f"The paper has no results on this data ({corpus.name}): nothing to compare with.", None
    paper = PAPER_WEIGHTED_F1[corpus.name].get(frozenset(corpus.about))
    own = ", ".join(f"{name}: {what}" for name, what in corpus.about.items())
    return (
        f"The paper's numbers use other features (EmoBERTa text, openSMILE audio, VisExtNet faces) than this run "
        f"({own}), so a difference from them says nothing about the model alone. Its numbers by class use all three "
        "modalities.",
        paper,
    )


def score_table(test: Scores, baseline: Scores | None, corpus: Corpus) -> list[tuple[str, ...]]:
    """Rows of the score table: F1 by class and weighted, of this run, of the baseline and of the paper."""
    paper_class, (_, paper) = PAPER_CLASS_F1.get(corpus.name, {}), comparison(corpus)
    columns = [test, *([baseline] if baseline else [])]
    rows = [("F1 on test, %", "SpikEmo", *(["logistic regression"] if baseline else []), "paper")]
    for name in corpus.classes:
        values = [f"{scores.class_f1[name]:.2f}" for scores in columns]
        rows.append((name, *values, f"{paper_class[name]:.2f}" if name in paper_class else "-"))
    weighted = [f"{scores.weighted_f1:.2f}" for scores in columns]
    rows.append(("weighted", *weighted, f"{paper:.2f}" if paper else "-"))
    return rows


def format_table(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows as aligned text, the first as a header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def write_report(
    run_dir: Path, result: RunResult, preset: Preset, corpus: Corpus, source: str, baseline: Scores | None = None
) -> Path:
    """Write the plots (``plots/*.png``) and ``report.html`` of a run.

    Args:
        run_dir: Of the run.
        result: What it returned.
        preset: Its configuration.
        corpus: Its data.
        source: One line on where the data was found.
        baseline: Test scores of logistic regression on the same features.

    Returns:
        Path of the page, which needs no other file.
    """
    figures = {
        "Loss and validation score": _plot_history(result),
        "Confusion matrix (test)": _plot_confusion(result.test, corpus.classes),
        "Firing rates": _plot_rates(result),
    }
    images = {}
    for title, figure in figures.items():
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=110)
        name = title.split(" (")[0].lower().replace(" ", "_")
        replace_atomically(run_dir / "plots" / f"{name}.png", lambda file, data=image.getvalue(): file.write(data))
        images[title] = base64.b64encode(image.getvalue()).decode("ascii")
    environment = jinja2.Environment(loader=jinja2.PackageLoader("spikemo_model", "templates"), autoescape=True)
    page = environment.get_template("report.html").render(
        corpus=corpus,
        source=source,
        counts={split: (len(corpus.splits[split]), sum(map(len, corpus.splits[split]))) for split in SPLITS},
        comparison=comparison(corpus)[0],
        table=score_table(result.test, baseline, corpus),
        result=result,
        images=images,
        settings=_flatten({"model": to_dict(preset.model), "training": to_dict(preset.training)}),
        versions={"spikeattn": spikeattn.__version__, "torch": torch.__version__},
    )
    path = run_dir / "report.html"
    replace_atomically(path, lambda file: file.write(page.encode("utf-8")))
    return path


def _plot_history(result: RunResult) -> Figure:
    """Training loss and validation F1 by epoch, the selected epoch marked."""
    epochs = [row["epoch"] + 1 for row in result.history]
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    loss, f1 = figure.subplots(1, 2)
    loss.plot(epochs, [row["train_total"] for row in result.history])
    loss.set(xlabel="epoch", ylabel="training loss")
    f1.plot(epochs, [row["valid_weighted_f1"] for row in result.history], color="tab:green")
    f1.axvline(result.best_epoch + 1, color="grey", linestyle=":", label="selected")
    f1.set(xlabel="epoch", ylabel="weighted F1 on validation, %")
    f1.legend()
    return figure


def _plot_confusion(scores: Scores, classes: Sequence[str]) -> Figure:
    """Share of each true class by predicted class, with the counts."""
    counts = torch.tensor(scores.confusion)
    shares = counts / counts.sum(1, keepdim=True).clamp_min(1)
    figure = Figure(figsize=(5.6, 5), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
    axes.set_yticks(range(len(classes)), classes)
    axes.set(xlabel="predicted", ylabel="true")
    for i, row in enumerate(counts.tolist()):
        for j, count in enumerate(row):
            axes.text(j, i, count, ha="center", va="center", color="white" if shares[i, j] > 0.5 else "black")
    return figure


def _plot_rates(result: RunResult) -> Figure:
    """Firing rate of each spiking layer before and after training."""
    names = list(result.rates_after)
    figure = Figure(figsize=(7, 1.2 + 0.3 * max(1, len(names))), layout="constrained")
    axes = figure.subplots()
    places = range(len(names))
    for offset, label, rates in ((0.2, "before", result.rates_before), (-0.2, "after", result.rates_after)):
        axes.barh([p + offset for p in places], [100 * rates[n] for n in names], height=0.4, label=label)
    axes.set_yticks(places, [n.removeprefix("dswa.") for n in names])
    axes.invert_yaxis()
    axes.set_xlabel("firing rate, % of neurons a time step")
    axes.legend()
    return figure


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
