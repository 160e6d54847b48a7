"""What a run shows: tables beside the paper's, plots, and one self-contained HTML page."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import torch

import spikeattn
from spikemo_model import plots
from spikemo_model.checkpoints import replace_atomically
from spikemo_model.config import IEMOCAP_EMOTIONS, MELD_EMOTIONS, Preset, to_dict
from spikemo_model.data.corpus import SPLITS, Corpus
from spikemo_model.evaluation import Scores
from spikemo_model.insight import Insight
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


def class_table(test: Scores, baseline: Scores | None, corpus: Corpus) -> list[tuple[str, ...]]:
    """`score_table` with the number of utterances, and with precision and recall of this run."""
    counts = torch.tensor(test.confusion, dtype=torch.float64)
    right, true, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    share = true / true.sum()
    columns = [[f"({n:.0f})" for n in (*true.tolist(), float(true.sum()))]]
    for total in (predicted, true):
        values = 100 * right / total.clamp_min(1)
        columns.append([f"{value:.2f}" for value in (*values.tolist(), float(values @ share))])
    header, *rows = score_table(test, baseline, corpus)
    return [
        ("F1 on test, % (utterances)", "precision", "recall", *header[1:]),
        *((f"{row[0]} {n}", *own, *row[1:]) for row, n, *own in zip(rows, *columns, strict=True)),
    ]


def confused_pairs(scores: Scores, count: int = 10) -> list[tuple[str, str, int, float]]:
    """The most frequent errors: true emotion, predicted emotion, utterances, and their share of the true one in %."""
    names = list(scores.class_f1)
    pairs = [
        (names[i], names[j], n, 100 * n / sum(row))
        for i, row in enumerate(scores.confusion)
        for j, n in enumerate(row)
        if i != j and n
    ]
    return sorted(pairs, key=lambda pair: -pair[2])[:count]


def write_report(
    run_dir: Path,
    result: RunResult,
    preset: Preset,
    corpus: Corpus,
    source: str,
    insight: Insight,
    baseline: Scores | None = None,
) -> Path:
    """Write the plots (``plots/*.png``) and ``report.html`` of a run.

    Args:
        run_dir: Of the run.
        result: What it returned.
        preset: Its configuration.
        corpus: Its data.
        source: One line on where the data was found.
        insight: What was measured on its model.
        baseline: Test scores of logistic regression on the same features.

    Returns:
        Path of the page, which needs no other file.
    """
    figures = plots.all_figures(result, insight, corpus.classes)
    images = {}
    for name, figure in figures.items():
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=160)
        replace_atomically(run_dir / "plots" / f"{name}.png", lambda file, data=image.getvalue(): file.write(data))
        images[name] = base64.b64encode(image.getvalue()).decode("ascii")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("spikemo_model", "templates"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("report.html").render(
        corpus=corpus,
        source=source,
        counts={split: (len(corpus.splits[split]), sum(map(len, corpus.splits[split]))) for split in SPLITS},
        comparison=comparison(corpus)[0],
        table=class_table(result.test, baseline, corpus),
        pairs=confused_pairs(result.test),
        result=result,
        insight=insight,
        time_steps=preset.model.dswa.time_steps if preset.model.dswa else 0,
        images=images,
        settings=_flatten({"model": to_dict(preset.model), "training": to_dict(preset.training)}),
        versions={"spikeattn": spikeattn.__version__, "torch": torch.__version__},
    )
    path = run_dir / "report.html"
    replace_atomically(path, lambda file: file.write(page.encode("utf-8")))
    return path


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
