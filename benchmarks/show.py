"""Tables and plots of committed results: ``python -m benchmarks.show`` writes docs/benchmarks.md and its pictures."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import pictures
from benchmarks.pictures import KINDS, Row, ratio

ROOT = Path(__file__).parent.parent
PAGE, PLOTS = ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "benchmarks"

_INTRODUCTION = """# Benchmarks

Written by `python -m benchmarks.show` from `benchmarks/results/`; numbers are measured by `python -m benchmarks.run`.
Ours and one peer are timed alternately on the same inputs, one peer after another; a ratio is that of the medians of
such a pair; above 1 ours is faster. A time is the median, with the 20th and 80th percentile in brackets;
compilation and warm-up are left out, the first call that holds them stands below the tables. *kept* is what autograd
holds for the backward, *peak* the most memory in use beyond what was in use before; after a peer's ratio the same two,
in MB. A GPU is timed with the host up to a millisecond ahead, as it is in the middle of a training step; how long the
host itself takes for a call stands below the tables; what takes it longer, such as a Python loop over T,
is timed by it. SpikingJelly's module runs such a loop for 16-bit inputs; its fused kernels for them have columns of
their own. SpikingJelly 0.0.0.0.14, where a table has it, is timed by the same clocks in a process of its own, whose
memory is not counted; on a GPU its CuPy backend takes float32, its loop bfloat16."""


def row_summary(row: Row) -> str:
    """One line: our time, and each peer's as a multiple of it."""
    parts = []
    for kind in KINDS:
        if kind not in row:
            continue
        ours = row[kind][row["ours"]]["median_s"]
        peers = [f"{name} {ratio(row, kind, name):.2f}x" for name in row[kind] if name != row["ours"]]
        parts.append(f"{kind} {1e3 * ours:.2f} ms ({', '.join(peers)})")
    return f"{row['case']}: {'; '.join(parts)}"


def main() -> None:
    """Write the page and its plots from every file of results."""
    sections = [_INTRODUCTION]
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        results = json.loads(path.read_text(encoding="utf-8"))
        for suite, measured in results["suites"].items():
            sections.append(_section(path.stem, suite, measured))
    PAGE.write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def _section(machine: str, suite: str, measured: dict[str, Any]) -> str:
    """Heading, machine, one table for each kind, and the plot of a suite."""
    facts, rows = measured["machine"], measured["rows"]
    versions = ", ".join(f"{name} {found}" for name, found in facts["versions"].items())
    device = " --device cuda" if facts.get("driver") else ""
    lines = [
        f"## {suite}, {facts['device']}",
        f"{facts['date']}, commit {facts['commit']}; {versions}; copies {facts['copy_bytes_per_s'] / 1e9:.1f} GB/s. "
        f"`python -m benchmarks.run --suite {suite}{device}`",
    ]
    for kind, title in KINDS.items():
        if all(kind in row for row in rows):
            lines.append(f"**{title}**\n\n" + _table(rows, kind, facts["copy_bytes_per_s"]))
    lines.append(f"First calls, the longest of each: {_first_calls(rows)}.")
    for kind, title in KINDS.items():
        if all(row.get("host_s", {}).get(kind) for row in rows):
            lines.append(f"Time of the host for a call, {title}, the shortest of each: {_host_times(rows, kind)}.")
    absent = dict.fromkeys(pair for row in rows for pair in row["absent"].items())
    lines += [f"{name}: not everywhere; {reason}." for name, reason in absent]
    against_t = pictures.throughput(rows, facts["copy_bytes_per_s"])
    for name, what, figure in (
        ("", f"Speed of {suite} beside its peers", pictures.speed_ups(rows)),
        ("-throughput", f"Throughput of {suite} against T, and the roof of memory", against_t),
        ("-growth", f"Time of {suite} a token against L", pictures.growth(rows)),
        ("-memory", f"Memory of {suite} beside its peers", pictures.memory(rows)),
    ):
        if figure is not None:
            file = f"{machine}-{suite}{name}.svg"
            PLOTS.mkdir(parents=True, exist_ok=True)
            figure.savefig(PLOTS / file, metadata={"Date": None})
            lines.append(f"![{what}](benchmarks/{file})")
    return "\n\n".join(lines)


def _first_calls(rows: Sequence[Row]) -> str:
    """The longest first call of each contender, which compiles."""
    longest: dict[str, float] = {}
    for row in rows:
        for kind in KINDS:
            for name, times in row.get(kind, {}).items():
                longest[name] = max(longest.get(name, 0.0), times["first_s"])
    return ", ".join(f"{name} {seconds:.1f} s" for name, seconds in longest.items())


def _host_times(rows: Sequence[Row], kind: str) -> str:
    """The shortest call of each contender as the host sees it, which launches and does not wait."""
    shortest: dict[str, float] = {}
    for row in rows:
        for name, seconds in row["host_s"][kind].items():
            shortest[name] = min(shortest.get(name, math.inf), seconds)
    return ", ".join(f"{name} {1e3 * seconds:.2f} ms" for name, seconds in shortest.items())


def _table(rows: Sequence[Row], kind: str, bandwidth: float) -> str:
    """Ours in ms, items a second, share of the copy bandwidth, memory; each peer as a ratio; geometric means last."""
    peers = list(dict.fromkeys(name for row in rows for name in row[kind] if name != row["ours"]))
    items = rows[0]["items"]
    head = ["case", "ours, ms", f"{items[1]}/s" if items else "of the roof", "kept, MB", "peak, MB"]
    head += [f"{peer}, ratio" for peer in peers]
    body = []
    for row in rows:
        ours = row[kind][row["ours"]]
        roof = row["bytes"][kind] / ours["median_s"] / bandwidth
        cells = [
            row["case"],
            f"{1e3 * ours['median_s']:.2f} ({1e3 * ours['p20_s']:.2f}-{1e3 * ours['p80_s']:.2f})",
            f"{row['items'][0] / ours['median_s']:.1f}" if items else f"{100 * roof:.0f} %" if roof else "-",
            *_memory(row, kind, row["ours"]),
        ]
        for peer in peers:
            times = ratio(row, kind, peer)
            cells.append(f"{times:.2f} ({'; '.join(_memory(row, kind, peer))})" if times else "-")
        body.append(cells)
    for dtype in dict.fromkeys(row["sizes"]["dtype"] for row in rows):
        own = [row for row in rows if row["sizes"]["dtype"] == dtype]
        means = [geometric_mean([r for row in own if (r := ratio(row, kind, peer))]) for peer in peers]
        body.append([f"geometric mean, {dtype}", "", "", "", "", *(f"{m:.2f}" if m else "-" for m in means)])
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _memory(row: Row, kind: str, name: str) -> tuple[str, str]:
    """What a contender keeps, and its peak, in MB."""
    kept, peak = row["kept_bytes"].get(name), row["peak_bytes"].get(kind, {}).get(name)
    return "-" if kept is None else f"{kept / 1e6:.1f}", "-" if peak is None else f"{peak / 1e6:.1f}"


def geometric_mean(values: Sequence[float]) -> float | None:
    """None of nothing."""
    return math.exp(sum(map(math.log, values)) / len(values)) if values else None


if __name__ == "__main__":
    main()
