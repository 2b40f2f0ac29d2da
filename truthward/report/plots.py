"""Plots as inline SVG whose colours are CSS variables of the page, so that they read in light, dark and print."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

INK, MUTED, GRID, ACCENT = "#010101", "#020202", "#030303", "#040404"  # stand-ins, replaced by CSS variables
VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--line)", ACCENT: "var(--accent)"}
DASHES: list[Any] = [(0, (6, 2)), (0, (1, 1.5)), (0, (4, 1.5, 1, 1.5)), "-"]
STYLE: Any = {
    "text.parse_math": False,  # a name with dollar signs is a name
    "svg.fonttype": "none",
    "svg.hashsalt": "truthward",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
}
BINS = 10  # of confidence
COLUMNS = 3  # panels beside each other
SMOOTH_FROM = 24  # steps from which a moving average is drawn over the raw values


def truth_plot(
    stages: Sequence[str],
    panels: Mapping[str, Sequence[dict[str, Any]]],
    baselines: Mapping[str, Sequence[float]],
    name: str,
) -> str:
    """A panel a metric: stages along x, means with 95 % intervals, and the style baselines as lines.

    Args:
        stages: names along x.
        panels: title -> one interval a stage.
        baselines: name -> its score in each panel.
        name: makes the ids inside the SVG unique on the page.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 3.3), layout="constrained")
        axes = np.atleast_1d(figure.subplots(1, len(panels)))
        for index, (axis, (title, intervals)) in enumerate(zip(axes, panels.items(), strict=True)):
            for (label, scores), dashes in zip(baselines.items(), DASHES * len(baselines), strict=False):
                axis.axhline(scores[index], color=MUTED, linewidth=1, linestyle=dashes, label=label, zorder=1)
            _points(axis, stages, intervals)
            axis.set_title(title, loc="left", fontweight="bold")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels) or 1, fontsize=8, handlelength=3.2)
        return _svg(figure, name, f"truthfulness by stage: {', '.join(panels)}")


def _points(axis: Axes, stages: Sequence[str], intervals: Sequence[dict[str, Any]]) -> None:
    means = [i["mean"] for i in intervals]
    axis.errorbar(
        range(len(stages)),
        means,
        yerr=_reach(intervals),
        color=ACCENT,
        fmt="o",
        markersize=5,
        linewidth=1.6,
        capsize=3,
        label="model, 95 % interval",
    )
    axis.set_xticks(range(len(stages)), stages)
    axis.set_xlim(-0.5, len(stages) - 0.5)
    axis.grid(False, axis="x")


def principles_plot(names: Sequence[str], series: Mapping[str, Sequence[dict[str, Any] | None]], name: str) -> str:
    """A line a principle, with a mean and its 95 % interval for each of the series that has one; chance is marked."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 0.26 * len(names) + 0.9), layout="constrained")
        axis = figure.subplots()
        axis.axvline(0.5, color=MUTED, linewidth=1, linestyle=DASHES[0])
        for number, (label, intervals) in enumerate(series.items()):
            places = [k for k, interval in enumerate(intervals) if interval]
            found = [interval for interval in intervals if interval]
            means = [i["mean"] for i in found]
            height = [len(names) - 1 - k + 0.2 - 0.4 * number for k in places]
            colour, marker = ((ACCENT, "o"), (INK, "s"))[number % 2]
            axis.errorbar(
                means,
                height,
                xerr=_reach(found),
                color=colour,
                fmt=marker,
                markersize=4,
                linewidth=1.2,
                label=label,
            )
        axis.set_yticks(range(len(names)), list(names)[::-1])
        axis.set_xlim(0, 1)
        axis.grid(False, axis="y")
        figure.legend(loc="outside lower center", ncols=len(series), fontsize=8)
        return _svg(figure, name, f"accuracy by principle: {', '.join(series)}")


def confidence_plot(points: Mapping[str, tuple[Sequence[float], Sequence[float]]], name: str) -> str:
    """Share of right answers by confidence, for each model; a bin with fewer than ten answers is left out.

    Args:
        points: model -> its confidences in [0, 1], and 1 or 0 for each answer, right or wrong.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5, 3.6), layout="constrained")
        axis = figure.subplots()
        axis.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=DASHES[0])
        for number, (label, (confidence, right)) in enumerate(points.items()):
            place = np.minimum((np.asarray(confidence) * BINS).astype(int), BINS - 1)
            bins = [place == k for k in range(BINS) if (place == k).sum() >= 10]
            means = [[float(np.asarray(values)[inside].mean()) for inside in bins] for values in (confidence, right)]
            colour, marker = ((INK, "s"), (ACCENT, "o"))[number % 2]
            axis.plot(*means, color=colour, marker=marker, markersize=4, linewidth=1.4, label=label)
        axis.set_xlim(0, 1)
        axis.set_ylim(0, 1)
        axis.set_xlabel("confidence")
        axis.set_ylabel("share right")
        axis.legend(fontsize=8)
        return _svg(figure, name, f"share of right answers by confidence: {', '.join(points)}")


class Place(NamedTuple):
    """A point with intervals both ways, and what is written beside it."""

    label: str
    x: dict[str, Any]
    y: dict[str, Any]


def frontier_plot(panels: Mapping[str, Sequence[Place]], across: str, name: str) -> str:
    """A panel a metric: it against what may be lost for it, from point to point in the order given.

    Args:
        panels: title -> its points.
        across: what the horizontal axis shows.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5 * len(panels), 3.6), layout="constrained")
        axes = np.atleast_1d(figure.subplots(1, len(panels)))
        for axis, (title, places) in zip(axes, panels.items(), strict=True):
            x, y = ([place.x for place in places], [place.y for place in places])
            means = [[i["mean"] for i in values] for values in (x, y)]
            axis.plot(*means, color=ACCENT, linewidth=1.4, marker="o", markersize=5, zorder=3)
            axis.errorbar(*means, xerr=_reach(x), yerr=_reach(y), fmt="none", ecolor=MUTED, elinewidth=0.7)
            for place, *where in zip(places, *means, strict=True):
                axis.annotate(place.label, where, xytext=(5, 4), textcoords="offset points", fontsize=8)
            axis.set_title(title, loc="left", fontweight="bold")
            axis.set_xlabel(across)
        return _svg(figure, name, f"{', '.join(panels)} against {across}")


def _reach(intervals: Sequence[dict[str, Any]]) -> Any:
    """How far intervals go below and above their means."""
    errors = [[i["mean"] - i["low"] for i in intervals], [i["high"] - i["mean"] for i in intervals]]
    return np.clip(errors, 0, None)


class Mark(NamedTuple):
    """Something that happened at a step: its label, and in the panel of which metric it was seen with what value."""

    step: int
    label: str
    metric: str
    value: float | None


def curve_plot(rows: Sequence[dict[str, Any]], keys: Sequence[str], name: str, marks: Sequence[Mark] = ()) -> str:
    """A small panel for each key that the rows hold, against the step; empty when they hold none of them.

    Args:
        marks: drawn as lines across every panel, and as a cross where the value lies within its metric's.
    """
    panels = {key: points for key in keys if (points := _series(rows, key))[0]}
    if not panels:
        return ""
    lines = -(-len(panels) // COLUMNS)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 2.2 * lines), layout="constrained")
        axes = np.atleast_1d(figure.subplots(lines, COLUMNS)).ravel()
        for axis, (key, (steps, values)) in zip(axes, panels.items(), strict=False):
            _curve(axis, steps, values)
            _mark(axis, key, marks)
            axis.set_title(key, loc="left", pad=14 if marks else None)
        for axis in axes[len(panels) :]:
            axis.set_visible(False)
        return _svg(figure, name, f"{', '.join(panels)} by step")


def _series(rows: Sequence[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    kept = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float)]
    return [float(step) for step, _ in kept], [float(value) for _, value in kept]


def _curve(axis: Axes, steps: list[float], values: list[float]) -> None:
    smooth = len(values) >= SMOOTH_FROM
    marker = "o" if len(values) < SMOOTH_FROM else ""
    axis.plot(steps, values, color=ACCENT, linewidth=1.0, alpha=0.35 if smooth else 1, marker=marker, markersize=3)
    if smooth:
        width = max(5, len(values) // 12)
        kernel = np.ones(width) / width
        axis.plot(np.convolve(steps, kernel, "valid"), np.convolve(values, kernel, "valid"), color=ACCENT, linewidth=1.8)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axis.yaxis.set_major_locator(MaxNLocator(nbins=5))


def _mark(axis: Axes, key: str, marks: Sequence[Mark]) -> None:
    labels: dict[int, list[str]] = {}
    low, high = axis.get_ylim()
    for mark in marks:
        labels.setdefault(mark.step, []).append(mark.label)
        if mark.metric == key and mark.value is not None:  # one far above the curve must not flatten it
            axis.plot([mark.step], [min(mark.value, 2 * high - low)], color=INK, marker="x", markersize=6, linestyle="")
    for step, found in labels.items():
        axis.axvline(step, color=INK, linewidth=0.9, linestyle=DASHES[1])
        text = found[0] if len(found) == 1 else f"{found[0]}-{found[-1]}"
        axis.annotate(text, (step, 1), xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=7)


def _svg(figure: Figure, name: str, label: str) -> str:
    """The figure as an SVG element: no metadata, ids of its own, colours by variable, the page's font."""
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = text.replace('href="#', f'href="#{name}-').replace("url(#", f"url(#{name}-")
    text = re.sub(r"(font: [^;\"]*?[\d.]+px) [^;\"]*", r"\1 system-ui, sans-serif", text)
    for stand_in, variable in VARIABLES.items():
        text = text.replace(stand_in, variable)
    return text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(label)}" ', 1)
