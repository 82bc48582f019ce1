"""The figures as pictures for a README: on white, and to be read at 800 pixels' width."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib as mpl

mpl.use("agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from tests.bench import acks, probes
from tests.bench.together import DRAINING

# Twice the pixels that are shown, for screens with fine ones.
WIDTH, DPI = 8.0, 200
BLUE, GREY, LIGHT, AMBER, TEAL, RED, VIOLET = (
    "#1f6feb", "#57606a", "#afb8c1", "#d4a72c", "#1b7c83", "#cf222e", "#8250df",
)  # fmt: skip
COLORS = {
    acks.OURS: BLUE,
    acks.LIMIT: GREY,
    "bare aiohttp, no routes": LIGHT,
    acks.FASTAPI: AMBER,
    "webhook, no command": VIOLET,
    probes.LIMIT: GREY,
    probes.TWO_PROBERS: "#79b0ff",
    "aiohttp client": TEAL,
    "curl --parallel": AMBER,
    "lychee": RED,
}
STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": LIGHT,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#eaeef2",
    "xtick.color": GREY,
    "ytick.color": GREY,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}
# The facts about a run that are printed below each picture.
BELOW = ("Python", "SQLite", "libcurl", "aiohttp", "commit")
Part = Mapping[str, Any]

_thousands = FuncFormatter(lambda value, _: f"{value:,.0f}")
_plain = FuncFormatter(lambda value, _: f"{value:,g}")


def _rate(run: Part) -> float:
    return float(run.get("requests", run.get("found", 0)) / run["seconds"])


def _axes(rows: int, columns: int, height: float) -> tuple[Figure, list[Axes]]:
    figure, grid = plt.subplots(rows, columns, figsize=(WIDTH, height), squeeze=False, layout="constrained")
    return figure, list(grid.flat)


def draw_acks(part: Part) -> Figure:
    """Rates by the number of connections."""
    figure, (small, large) = _axes(1, 2, 3.6)
    small.set_title("Acks a second, 7 files each")
    for name, runs in part["runs"].items():
        if runs:
            rates = [median(_rate(run[place]) for run in runs) for place in range(len(acks.CONNECTIONS))]
            small.plot(
                acks.CONNECTIONS,
                rates,
                "o-",
                color=COLORS[name],
                label=name,
                linewidth=2.4 if name == acks.OURS else 1.6,
            )
    small.set_xscale("log", base=4)
    small.set_xticks(acks.CONNECTIONS, [str(number) for number in acks.CONNECTIONS])
    small.xaxis.set_minor_locator(NullLocator())
    small.set_xlabel("connections")
    small.set_ylim(bottom=0)
    small.yaxis.set_major_formatter(_thousands)
    # The bars beside them tell whose color is whose.
    there = [name for name, runs in part["runs"].items() if runs]
    large.set_title("1,000 files each, 16 connections")
    _bars(large, there, [median(_rate(run[-1]) for run in part["runs"][name]) for name in there], "{:,.0f}")
    return figure


def _bars(axes: Axes, names: Sequence[str], values: Sequence[float], form: str) -> None:
    bars = axes.barh(names, values, color=[COLORS.get(name, BLUE) for name in names], height=0.62)
    axes.bar_label(bars, [form.format(value) for value in values], padding=3, fontsize=8.5, color=GREY)
    axes.invert_yaxis()
    axes.margins(x=0.18)
    # The figures stand at the bars.
    axes.grid(visible=False)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=len(labels), fontsize=8.5, handlelength=1.4)


def _curves(axes: Axes, loads: Mapping[str, Sequence[Part]], colors: Mapping[str, str]) -> None:
    """Latency by how many stay below it: 90 %, 99 %, 99.9 %, each nine as wide as the other."""
    for name, runs in loads.items():
        if not runs:
            continue
        points = list(zip(*(run["curve"] for run in runs), strict=True))
        # From the median to what the fewest requests of a run can tell.
        shown = [group for group in points if 0.49 < group[0][0] <= 0.9991]
        axes.plot(
            [1 / (1 - group[0][0]) for group in shown],
            [median(point[1] for point in group) for group in shown],
            color=colors[name], label=name, linewidth=2.4 if colors[name] == BLUE else 1.6,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks([2, 10, 100, 1000], ["50 %", "90 %", "99 %", "99.9 %"])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(_plain)
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("of the acks")
    axes.set_ylabel("took at most ms")


def draw_latency(part: Part) -> Figure:
    """Curves for each rate."""
    figure, panels = _axes(1, len(part), 3.6)
    for axes, (rate, measured) in zip(panels, part.items(), strict=True):
        axes.set_title(f"{int(rate):,} notifications a second")
        _curves(axes, measured["runs"], COLORS)
    _legend(figure, panels[0])
    return figure


def draw_probes(part: Part) -> Figure:
    """Files a second of each client, case by case."""
    columns = 2
    figure, panels = _axes(-(-len(part) // columns), columns, 1.75 * -(-len(part) // columns))
    for axes in panels[len(part) :]:
        axes.set_visible(False)
    for axes, (case, measured) in zip(panels, part.items(), strict=False):
        there = [name for name, runs in measured["runs"].items() if runs]
        axes.set_title(f"Files/s, {case}")
        _bars(axes, there, [median(_rate(run) for run in measured["runs"][name]) for name in there], "{:,.0f}")
    return figure


def draw_together(part: Part) -> Figure:
    """The acks' curves, and what went on meanwhile."""
    figure, (axes,) = _axes(1, 1, 3.4)
    axes.set_title(f"Acks at {part['rate']:,} a second")
    labels: dict[str, list[Part]] = {}
    colors: dict[str, str] = {}
    for name, runs in part["runs"].items():
        files = median(run["files_a_second"] for run in runs)
        label = f"{name}, {files:,.0f} files/s" if name == DRAINING else name
        labels[label] = [run["load"] for run in runs]
        colors[label] = BLUE if name == DRAINING else GREY
    _curves(axes, labels, colors)
    _legend(figure, axes)
    return figure


def draw_growth(part: Part) -> Figure:
    """Acks and probes a second by the size of the record."""
    figure, (axes, start) = _axes(1, 2, 3.3)
    names = list(part["runs"])
    sizes = [int(name.replace(",", "")) for name in names]
    for key, label, color in (("acks_a_second", "acks", BLUE), ("probes_a_second", "files asked for", TEAL)):
        values = [median(run[key] for run in part["runs"][name]) for name in names]
        axes.plot(sizes, values, "o-", color=color, label=label, linewidth=2.2)
    axes.set_title("A second, by files in the record")
    axes.yaxis.set_major_formatter(_thousands)
    _legend(figure, axes)
    values = [median(run["first_probe_seconds"] for run in part["runs"][name]) for name in names]
    start.plot(sizes, values, "o-", color=BLUE, linewidth=2.2)
    start.set_title("Start to first request, seconds")
    for panel in (axes, start):
        panel.margins(x=0.1)
        panel.set_ylim(bottom=0, top=panel.get_ylim()[1] * 1.08)
        panel.set_xscale("log")
        panel.set_xticks(sizes, names)
        panel.xaxis.set_minor_locator(NullLocator())
    return figure


def draw_backlog(part: Part) -> Figure:
    """What each process spends on a file."""
    figure, (axes,) = _axes(1, 1, 1.9)
    axes.set_title(f"CPU µs a file, at {part['files_a_second']:,.0f} files a second")
    pieces = [
        ("event loop", part["loop_us"], BLUE),
        ("its other threads", part["others_us"], LIGHT),
        ("keeper", part["keeper_us"], TEAL),
        ("prober", part["prober_us"], GREY),
    ]
    left = 0.0
    for name, value, color in pieces:
        bar = axes.barh([""], [value], left=left, color=color, label=name, height=0.6)
        if value > 3:
            axes.bar_label(bar, [f"{value:.0f}"], label_type="center", color="white", fontweight="bold")
        left += value
    axes.grid(visible=False)
    axes.tick_params(axis="y", length=0)
    _legend(figure, axes)
    return figure


def draw_dashboard(part: Part) -> Figure:
    """Pages, and the acks' curves with and without somebody who looks on."""
    figure, (pages, axes) = _axes(1, 2, 3.2)
    pages.set_title("p95 of a page, ms")
    _bars(pages, list(part["pages"]), [page["p95_ms"] for page in part["pages"].values()], "{:,.1f}")
    pages.tick_params(axis="y", labelsize=8)
    axes.set_title(f"Acks at {part['rate']:,} a second")
    _curves(axes, part["runs"], dict(zip(part["runs"], (GREY, BLUE), strict=True)))
    _legend(figure, axes)
    return figure


DRAWINGS: dict[str, Callable[[Part], Figure]] = {
    "acks": draw_acks,
    "latency": draw_latency,
    "probes": draw_probes,
    "together": draw_together,
    "growth": draw_growth,
    "backlog": draw_backlog,
    "dashboard": draw_dashboard,
}


def draw(results: Mapping[str, Any], directory: Path) -> list[Path]:
    """A picture of each part, with the machine and the commit below; their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    facts = results["about"]
    below = ", ".join(
        (f"{facts['cores']} cores of {facts['model']}", *(f"{name} {facts[name]}" for name in BELOW), facts["at"][:10])
    )
    paths = []
    for name, part in results["parts"].items():
        # Parts whose tables say as much have no drawing.
        if name not in DRAWINGS:
            continue
        with mpl.rc_context(STYLE):
            figure = DRAWINGS[name](part)
            figure.supxlabel(below, fontsize=6.5, color=GREY, x=0.99, ha="right")
            paths.append(directory / f"{name}.png")
            figure.savefig(paths[-1], dpi=DPI)
            plt.close(figure)
    return paths
