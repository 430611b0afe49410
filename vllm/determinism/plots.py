"""The report's two pictures, as SVG to stand inside an HTML page: text in the page's own colour, no file beside."""

import io
import re
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

matplotlib.use("svg")

INK = "#010203"  # stands for the page's text colour, and is replaced by it
COLOURS = ("#d9772b", "#3d8bd4")  # the control, ours: both readable on white and on black
SIZE_INCHES = (4.4, 2.5)  # on a phone the picture is as wide as the screen, and 10 pt stays readable
GOLDEN = 0.618034


def spread(count: int) -> list[float]:
    """Heights between -0.3 and 0.3 that keep the points of one row apart, the same at each run."""
    return [(index * GOLDEN % 1 - 0.5) * 0.6 for index in range(count)]


def picture(name: str, label: str, draw) -> str:
    """One figure as an SVG element. `name` keeps its ids apart from another figure's on the page."""
    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    }
    with plt.rc_context(style):
        figure, axes = plt.subplots(figsize=SIZE_INCHES, layout="constrained")
        draw(axes)
        axes.tick_params(axis="y", length=0)
        output = io.StringIO()
        figure.savefig(output, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        plt.close(figure)
    svg = output.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"| (width|height)="[\d.]+pt"', "", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def logprob_differences(results: Mapping[str, Mapping]) -> str:
    """Each request's largest logprob difference to its answer alone, on a log axis with a place for exactly 0."""
    positive = [value for result in results.values() for value in result["logprob_differences"] if value > 0]
    floor = min(positive, default=1e-6) / 10

    def draw(axes: Axes) -> None:
        for row, (result, colour) in enumerate(zip(results.values(), COLOURS, strict=False)):
            values = [value or floor for value in result["logprob_differences"]]
            heights = [row + offset for offset in spread(len(values))]
            axes.scatter(values, heights, s=10, color=colour, alpha=0.6, linewidths=0)
        axes.set_xscale("log")
        top = max(positive, default=1e-3)
        axes.set_xlim(floor / 2.5, top * 2.5)
        axes.axvline(floor * 3, color=INK, linewidth=0.6, linestyle=(0, (2, 3)))
        exponents = [power for power in range(-9, 3) if floor * 3 < 10.0**power < top * 2.5]
        axes.set_xticks([floor, *(10.0**power for power in exponents)])
        axes.set_xticklabels(["0", *(f"1e{power}" for power in exponents)])
        axes.minorticks_off()
        name_rows(axes, list(results))
        axes.set_xlabel("largest logprob difference to solo")

    return picture("differences", "Logprob differences to the answer alone, one point a request", draw)


def latencies(results: Mapping[str, Mapping]) -> str:
    """Each request's seconds, alone and under load; the bar is the median."""
    rows = [
        (f"{name},\n{state}", result["latencies"][key], colour)
        for key, state in (("solo", "alone"), ("loaded", "loaded"))
        for (name, result), colour in zip(results.items(), COLOURS, strict=False)
    ]

    def draw(axes: Axes) -> None:
        for row, (_, values, colour) in enumerate(rows):
            heights = [row + offset for offset in spread(len(values))]
            axes.scatter(values, heights, s=10, color=colour, alpha=0.6, linewidths=0)
            if values:
                axes.vlines(median(values), row - 0.4, row + 0.4, color=INK, linewidth=1.5)
        axes.set_xlim(left=0)
        name_rows(axes, [name for name, _, _ in rows])
        axes.set_xlabel("seconds a request; the bar is the median")

    return picture("latencies", "Latency of each request, alone and under load", draw)


def name_rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)))
    axes.set_yticklabels(names)
    axes.set_ylim(len(names) - 0.5, -0.5)
