"""Pictures of results: speed beside the peers, throughput against T, memory."""

import math
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Row = dict[str, Any]
matplotlib.rcParams["svg.hashsalt"] = "benchmarks"  # the same results give the same file
KINDS = {"forward": "forward (inference)", "training": "forward + backward"}


def ratio(row: Row, kind: str, peer: str) -> float | None:
    """Median time of the peer over ours beside it; None where it did not run."""
    return row[kind][peer]["median_s"] / row[kind][peer]["ours_s"] if peer in row[kind] else None


def speed_ups(rows: Sequence[Row]) -> Figure:
    """Speed-up over each peer, case by case; 1 is as fast as ours."""
    kinds = {kind: title for kind, title in KINDS.items() if all(kind in row for row in rows)}
    figure, panels = _panels(rows, len(kinds))
    for axes, (kind, title) in zip(panels, kinds.items(), strict=True):
        peers = _names(rows, lambda row, kind=kind: [name for name in row[kind] if name != row["ours"]])
        _bars(axes, rows, {peer: [ratio(row, kind, peer) or math.nan for row in rows] for peer in peers}, start=1)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set(title=title, xlabel="time of the peer / time of ours", xscale="log")
        axes.xaxis.set_major_formatter("{x:g}")
    _legend(figure)
    return figure


def memory(rows: Sequence[Row]) -> Figure | None:
    """What each contender keeps for the backward and takes at most, case by case; None where there is no backward."""
    if not all(row["kept_bytes"] for row in rows):
        return None
    figure, panels = _panels(rows, 2)
    for axes, title, bytes_of in (
        (panels[0], "kept for the backward", lambda row: row["kept_bytes"]),
        (panels[1], "peak of forward + backward", lambda row: row["peak_bytes"].get("training", {})),
    ):
        names = _names(rows, bytes_of)
        _bars(axes, rows, {name: [(bytes_of(row).get(name) or math.nan) / 1e6 for row in rows] for name in names})
        axes.set(title=title, xlabel="MB", xscale="log")
    _legend(figure)
    return figure


def throughput(rows: Sequence[Row], bandwidth: float) -> Figure | None:
    """Neuron-steps a second against T, a panel for each direction and dtype, with what copies allow; None without T."""
    if not all({"T", "N"} <= set(row["sizes"]) and all(row["bytes"].values()) for row in rows):
        return None
    dtypes = list(dict.fromkeys(row["sizes"]["dtype"] for row in rows))
    figure = Figure(figsize=(9, 3.6 * len(dtypes)), layout="constrained")
    for line, dtype in zip(figure.subplots(len(dtypes), len(KINDS), squeeze=False), dtypes, strict=True):
        own = [row for row in rows if row["sizes"]["dtype"] == dtype]
        for axes, (kind, title) in zip(line, KINDS.items(), strict=True):
            for name in _names(own, lambda row, kind=kind: list(row[kind])):
                points = [
                    (row["sizes"]["T"], _steps(row) / row[kind][name]["median_s"]) for row in own if name in row[kind]
                ]
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
            roof = [bandwidth * _steps(row) / row["bytes"][kind] for row in own]
            axes.plot([row["sizes"]["T"] for row in own], roof, color="black", linestyle="--", label="roof: copies")
            axes.set(title=f"{title}, {dtype}", xlabel="T, time steps", ylabel="neuron-steps a second")
            axes.set(xscale="log", yscale="log")
            axes.set_xticks([row["sizes"]["T"] for row in own], [str(row["sizes"]["T"]) for row in own], minor=False)
            axes.minorticks_off()
            axes.legend(fontsize="x-small")
    return figure


def _legend(figure: Figure) -> None:
    """One legend below the panels, where it hides no bar."""
    named = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if named:
        figure.legend(list(named.values()), list(named), loc="outside lower center", ncols=2, fontsize="small")


def _steps(row: Row) -> int:
    return row["sizes"]["T"] * row["sizes"]["N"]


def _names(rows: Sequence[Row], of_row) -> list[str]:
    """Names that occur in any row, in order."""
    return list(dict.fromkeys(name for row in rows for name in of_row(row)))


def _panels(rows: Sequence[Row], count: int) -> tuple[Figure, Sequence[Axes]]:
    """Panels side by side that share the cases."""
    figure = Figure(figsize=(9, 1.5 + 0.42 * len(rows)), layout="constrained")
    return figure, figure.subplots(1, count, sharey=True, squeeze=False)[0]


def _bars(axes: Axes, rows: Sequence[Row], values: dict[str, list[float]], start: float = 0.0) -> None:
    """Horizontal bars from ``start``, a group a case, the first case on top; none for NaN."""
    height = 0.8 / max(1, len(values))
    for i, (name, ends) in enumerate(values.items()):
        places = [y + i * height - 0.4 for y in range(len(rows))]
        axes.barh(places, [end - start for end in ends], height, left=start, align="edge", label=name)
    axes.set_yticks(range(len(rows)), [row["case"] for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
