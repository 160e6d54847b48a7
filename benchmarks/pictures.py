"""Pictures of results: speed beside the peers, throughput against T, time a token against L, memory."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

Row = dict[str, Any]
matplotlib.rcParams["svg.hashsalt"] = "benchmarks"  # the same results give the same file
KINDS = {"forward": "forward (inference)", "training": "forward + backward"}


def ratio(row: Row, kind: str, peer: str) -> float | None:
    """Median time of the peer over ours beside it; None where it did not run."""
    return row[kind][peer]["median_s"] / row[kind][peer]["ours_s"] if peer in row[kind] else None


def speed_ups(rows: Sequence[Row]) -> Figure | None:
    """Speed-up over each peer, case by case; 1 is as fast as ours. Without the cases that have no peer, None if all."""
    rows = [row for row in rows if any(len(row.get(kind, {})) > 1 for kind in KINDS)]
    if not rows:
        return None
    kinds = {kind: title for kind, title in KINDS.items() if all(kind in row for row in rows)}
    figure, panels = _panels(rows, len(kinds))
    for axes, (kind, title) in zip(panels, kinds.items(), strict=True):
        peers = _names(rows, lambda row, kind=kind: [name for name in row[kind] if name != row["ours"]])
        _bars(axes, rows, {peer: [ratio(row, kind, peer) or math.nan for row in rows] for peer in peers}, start=1)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set(title=title, xlabel="time of the peer / time of ours", xscale="log")
        _ticks(axes.xaxis)
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
    dtypes = dict.fromkeys(row["sizes"]["dtype"] for row in rows)
    by_dtype = {dtype: [row for row in rows if row["sizes"]["dtype"] == dtype] for dtype in dtypes}
    figure = Figure(figsize=(9, 3.6 * len(by_dtype)), layout="constrained")
    for axes, kind, own in _directions(figure, by_dtype):
        _lines(axes, own, kind, "T", lambda row, seconds: _steps(row) / seconds)
        roof = [bandwidth * _steps(row) / row["bytes"][kind] for row in own]
        axes.plot([row["sizes"]["T"] for row in own], roof, color="black", linestyle="--", label="roof: copies")
        axes.set(xlabel="T, time steps", ylabel="neuron-steps a second")
        axes.legend(fontsize="x-small")
    return figure


def growth(rows: Sequence[Row]) -> Figure | None:
    """Time a token against L: level is linear in L. A line of panels for each set of rows that differ in L alone.

    None where no set has three L.
    """
    alike: dict[str, list[Row]] = {}
    for row in rows:
        if {"T", "B", "H", "L", "E", "is_causal"} <= set(row["sizes"]):
            shared = " ".join(f"{name}={row['sizes'][name]}" for name in "TBHE")
            causal = "causal " if row["sizes"]["is_causal"] else ""
            alike.setdefault(f"{shared} {causal}{row['sizes']['dtype']}", []).append(row)
    by_width = sorted(alike.items(), key=lambda item: item[1][0]["sizes"]["E"])
    alike = {title: own for title, own in by_width if len(own) >= 3}
    if not alike:
        return None
    figure = Figure(figsize=(9, 2.7 * len(alike)), layout="constrained")
    for axes, kind, own in _directions(figure, alike):
        _lines(axes, own, kind, "L", lambda row, seconds: 1e6 * seconds / (row["sizes"]["B"] * row["sizes"]["L"]))
        axes.set(xlabel="L, tokens", ylabel="µs a token")
        axes.title.set_fontsize("medium")
        _ticks(axes.yaxis)
        axes.legend(fontsize="x-small")
    return figure


def _directions(figure: Figure, series: dict[str, list[Row]]) -> Iterator[tuple[Axes, str, list[Row]]]:
    """A line of panels for each of ``series``, one a direction."""
    panels = figure.subplots(len(series), len(KINDS), squeeze=False)
    for line, (name, own) in zip(panels, series.items(), strict=True):
        for axes, (kind, title) in zip(line, KINDS.items(), strict=True):
            axes.set_title(f"{title}, {name}")
            yield axes, kind, own


def _lines(axes: Axes, rows: Sequence[Row], kind: str, along: str, value: Callable[[Row, float], float]) -> None:
    """What ``value`` makes of a row and the seconds of each contender, against a size, both axes logarithmic."""
    rows = sorted(rows, key=lambda row: row["sizes"][along])
    for name in _names(rows, lambda row: list(row[kind])):
        own = [row for row in rows if name in row[kind]]
        values = [value(row, row[kind][name]["median_s"]) for row in own]
        axes.plot([row["sizes"][along] for row in own], values, marker="o", markersize=3, label=name)
    sizes = [row["sizes"][along] for row in rows]
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(sizes, [str(size) for size in sizes], minor=False)
    axes.minorticks_off()


def _ticks(axis: Axis) -> None:
    """0.3, 1, 3, 10 ...: powers of ten alone may be one or none."""
    axis.set_major_locator(LogLocator(subs=(1, 3)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


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
