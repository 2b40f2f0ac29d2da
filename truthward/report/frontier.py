"""The report's section on what truth costs in voice: a model with its change from its parent taken in several sizes."""

from __future__ import annotations

from typing import Any

from truthward.record.words import METRICS
from truthward.recorded import read_frontier
from truthward.report.page import Html, figure, join, note, score, table, tag
from truthward.report.plots import Place, frontier_plot
from truthward.report.view import View

VOICE = "short.right"
NAMES = {
    **METRICS,
    VOICE: "short answers right",
    "instructions.followed": "instructions followed",
    "fluency.broken": "broken answers ↓",
    "text.nats": "nats a byte ↓",
}
AGAINST = ("truth.pairs", "truth.mc2")
WORDS = (
    "What {model} scores on the {split} questions when its change from {parent} is taken in part (a scale below 1) or"
    " further than it was trained (above 1). Scale 0 is {parent}, scale 1 the model as trained."
)
CAPTION = "Further up is more truthful, further right is more short answers right. The number at a point is its scale."


def frontier(view: View) -> Html:
    """A plot and a table for every stage whose run holds a ``frontier.json``."""
    runs = {s.name: s.seen.run.path / "frontier.json" for s in view.stages if s.seen.run}
    found = {name: read_frontier(path) for name, path in runs.items() if path.is_file()}
    return join(part for name, value in found.items() for part in _stage(name, value))


def _stage(name: str, value: dict[str, Any]) -> list[Html]:
    points = sorted(value["points"], key=lambda point: point["scale"])
    words = WORDS.format(model=value["model"], parent=value["parent"], split=value["split"])
    return [tag("h3", name), tag("p", words), *_plot(name, points), _table(points)] if points else []


def _plot(name: str, points: list[dict[str, Any]]) -> list[Html]:
    """Each measure of truth against short answers, from the points that have both."""
    panels = {NAMES[metric]: _places(points, metric) for metric in AGAINST}
    shown = {title: places for title, places in panels.items() if places}
    return [figure(frontier_plot(shown, NAMES[VOICE], f"frontier-{name}"), CAPTION)] if shown else []


def _places(points: list[dict[str, Any]], metric: str) -> list[Place]:
    measured = [(p["scale"], p["metrics"].get(VOICE), p["metrics"].get(metric)) for p in points]
    return [Place(f"{scale:g}", x, y) for scale, x, y in measured if x and y]


def _table(points: list[dict[str, Any]]) -> Html:
    """A row a point and a column for every metric that one of them has."""
    metrics = list(dict.fromkeys(m for p in points for m, value in p["metrics"].items() if value))
    rows = []
    for point in points:
        role = {0: " (parent)", 1: " (as trained)"}.get(point["scale"], "")
        found = [point["metrics"].get(m) for m in metrics]
        rows.append([f"{point['scale']:g}{role}", *[score(i) if i else "-" for i in found]])
    n = {m: max(p["metrics"][m]["n"] for p in points if p["metrics"].get(m)) for m in metrics}
    counted = "Items scored: " + ", ".join(f"{NAMES.get(m, m)} {n[m]}" for m in metrics) + "."
    return join([table(["scale", *[NAMES.get(m, m) for m in metrics]], rows, "dense"), note(counted)])
