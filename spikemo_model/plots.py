"""The plots of a report, each narrow enough to be read on a phone."""

from collections.abc import Sequence

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor

from spikemo_model.evaluation import Scores
from spikemo_model.insight import Insight
from spikemo_model.training import RunResult

_WIDTH = 4.4  # inches
_RASTER_UTTERANCES, _RASTER_NEURONS = 8, 24  # of each layer, the first


def all_figures(result: RunResult, insight: Insight, classes: Sequence[str]) -> dict[str, Figure]:
    """Every plot of a run by its name; those of spikes only where there are some."""
    with rc_context({"font.size": 9}):
        figures = {"history": plot_history(result), "confusion": plot_confusion(result.test, classes)}
        if insight.gates:
            figures["gates"] = plot_gates(insight.gates)
        if result.rates_after:
            figures["rates"] = plot_rates(result)
        for modality in insight.gates:
            layers = {layer: spikes[modality] for layer, spikes in insight.rasters.items() if modality in spikes}
            figures[f"spikes_{modality}"] = plot_spikes(layers)
    return figures


def plot_history(result: RunResult) -> Figure:
    """Training loss and validation F1 by epoch, the selected epoch marked."""
    epochs = [row["epoch"] + 1 for row in result.history]
    style = {"marker": "."} if len(epochs) == 1 else {}  # a line of one point shows nothing
    figure = Figure(figsize=(_WIDTH, 4.2), layout="constrained")
    loss, f1 = figure.subplots(2, 1, sharex=True)
    loss.plot(epochs, [row["train_total"] for row in result.history], **style)
    loss.set(ylabel="training loss")
    f1.plot(epochs, [row["valid_weighted_f1"] for row in result.history], color="tab:green", **style)
    f1.axvline(result.best_epoch + 1, color="grey", linestyle=":", label="selected")
    f1.set(xlabel="epoch", ylabel="weighted F1 on validation, %")
    f1.xaxis.get_major_locator().set_params(integer=True)
    f1.legend()
    return figure


def plot_confusion(scores: Scores, classes: Sequence[str]) -> Figure:
    """Share of each true class by predicted class, with the counts."""
    counts = torch.tensor(scores.confusion)
    shares = counts / counts.sum(1, keepdim=True).clamp_min(1)
    figure = Figure(figsize=(_WIDTH, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
    axes.set_yticks(range(len(classes)), classes)
    axes.set(xlabel="predicted", ylabel="true")
    for i, row in enumerate(counts.tolist()):
        for j, count in enumerate(row):
            axes.text(j, i, count, ha="center", va="center", color="white" if shares[i, j] > 0.5 else "black")
    return figure


def plot_rates(result: RunResult) -> Figure:
    """Firing rate of each spiking layer before and after training."""
    names = list(result.rates_after)
    figure = Figure(figsize=(_WIDTH, 1.2 + 0.3 * len(names)), layout="constrained")
    axes = figure.subplots()
    places = range(len(names))
    for offset, label, rates in ((0.2, "before", result.rates_before), (-0.2, "after", result.rates_after)):
        axes.barh([p - offset for p in places], [100 * rates[n] for n in names], height=0.4, label=label)
    axes.set_yticks(places, [_short(name.removeprefix("dswa.")) for name in names])
    axes.invert_yaxis()
    axes.set_xlabel("firing rate, % of neurons a time step")
    figure.legend(loc="outside upper right", ncols=2)
    return figure


def plot_gates(gates: dict[str, Tensor]) -> Figure:
    """The gate of each utterance by modality, as a strip around its neutral 1."""
    values = torch.stack(list(gates.values()))
    M, L = values.shape
    reach = max(0.05, float((values - 1).abs().nan_to_num(0.0).max()))
    figure = Figure(figsize=(_WIDTH, 0.9 + 0.4 * M), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values.numpy(), cmap="RdBu_r", vmin=1 - reach, vmax=1 + reach, aspect="auto")
    axes.set_yticks(range(M), list(gates))
    axes.set_xticks(range(0, L, 1 + L // 16), [str(i) for i in range(1, L + 1, 1 + L // 16)])
    axes.set_xlabel("utterance")
    figure.colorbar(image, ax=axes, label="gate")
    return figure


def plot_spikes(layers: dict[str, Tensor]) -> Figure:
    """A raster of the spikes [T, L, N] of layers: neurons over the time steps of one utterance after another."""
    shown = [spikes[:, :_RASTER_UTTERANCES, :_RASTER_NEURONS] for spikes in layers.values()]
    rows = torch.cat([spikes.permute(2, 1, 0).flatten(1) for spikes in shown])  # [neurons, utterances and time steps]
    (T, L, _), ends = shown[0].shape, torch.tensor([spikes.shape[2] for spikes in shown]).cumsum(0)
    figure = Figure(figsize=(_WIDTH, 0.6 + 0.4 * len(layers)), layout="constrained")
    axes = figure.subplots()
    axes.imshow(rows.numpy(), cmap="Greys", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    axes.vlines([i * T - 0.5 for i in range(1, L)], -0.5, len(rows) - 0.5, color="tab:orange", linewidth=0.8)
    axes.hlines((ends[:-1] - 0.5).numpy(), -0.5, L * T - 0.5, color="tab:blue", linewidth=0.8)
    centres = [float(end) - 0.5 - spikes.shape[2] / 2 for end, spikes in zip(ends, shown, strict=True)]
    axes.set_yticks(centres, [_short(name) for name in layers])
    axes.set_xticks([(i + 0.5) * T - 0.5 for i in range(L)], [str(i) for i in range(1, L + 1)])
    axes.tick_params(length=0)
    axes.set_xlabel(f"utterance, {T} time steps each")
    return figure


def _short(layer: str) -> str:
    """A layer's name without what all of them have."""
    return layer.replace("blocks.blocks.", "").removesuffix(".lif")
