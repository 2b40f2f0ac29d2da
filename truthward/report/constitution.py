"""The report's section on the constitution: the judge, what was made by each principle, and some of the rows."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from truthward.effects import effects
from truthward.errors import UserError
from truthward.ledger import Run
from truthward.record.words import interval
from truthward.records import Preference, Revision, Row, read_rows
from truthward.redaction import tidy
from truthward.report.page import Html, figure, join, note, pairs, score, spoken, table, tag
from truthward.report.plots import principles_plot
from truthward.report.view import View, headline

ROWS = 3  # shown of each kind

R = TypeVar("R", bound=Row)


def constitution(view: View) -> Html:
    """A few rows that the constitution stage made."""
    stage = view.stage("constitution")
    if stage is None:
        return Html("")
    if stage.seen.run is None:
        return note(f"No rows: {stage.state}.")
    folder = stage.seen.run.path
    revisions, preferences = _rows(folder / "revisions.jsonl", Revision), _rows(folder / "preferences.jsonl", Preference)
    parts = [tag("p", headline(stage))] if headline(stage) else []
    parts += _judge(stage.seen.run.manifest.get("judge") or {})
    parts += _by_principle(view, stage.seen.run, revisions, preferences)
    for helped, words in ((True, "Revisions that helped"), (False, "Revisions that did not, and why")):
        shown = spread([r for r in revisions if r.helped is helped], ROWS)
        parts += [tag("h3", words), *map(_revision, shown)] if shown else []
    if preferences:
        parts += [tag("h3", "Preferences"), *map(_preference, spread(preferences, ROWS))]
    return join(parts) if revisions or preferences else join([*parts, note("No rows were made.")])


def _judge(record: dict[str, Any]) -> list[Html]:
    """How well the judge told better answers from worse ones before its verdicts were used, and by which principles."""
    methods = record.get("methods", {})
    if not methods:
        return []
    rows = []
    for method, found in methods.items():
        verdict = "at chance: refused" if found["refused"] else "qualified"
        longer = score(found["longer"]) if found.get("longer") else "-"
        first = f"{found['first']:.0%}" if "first" in found else "-"
        errors = (f"{found[key]:.3f}" for key in ("brier", "ece"))
        rows.append([method, score(found["accuracy"]), found["accuracy"]["n"], *errors, longer, first, verdict])
    head = ["method", "accuracy", "n", "Brier", "calibration error", "takes the longer", "takes A", "verdict"]
    words = (
        "A method may judge by a principle when its interval lies above one half over all labelled pairs and over that "
        f"principle's own. {len(record['principles'])} principles by {len(methods)} methods were tried; by luck alone about "
        "one interval in forty would."
    )
    return [
        tag("h3", "The judge on labelled pairs"),
        table(head, rows),
        tag("p", words),
    ]


def _by_principle(view: View, made: Run, revisions: list[Revision], preferences: list[Preference]) -> list[Html]:
    """What each principle brought: rows, those that helped, and how often judge and preference model keep it."""
    stage = view.stage("reward")
    learner = stage.seen.run if stage else None
    if not (made.manifest.get("judge") or {}).get("principles"):
        return []
    rows = effects(made, learner, revisions, preferences)
    words = "The preference model never saw the labelled pairs. Its judge was chosen on them, which flatters the judge."
    metrics = learner.manifest.get("metrics", {}) if learner else {}
    if metrics.get("principle_accuracy") and metrics.get("calibration"):
        whole, fit = metrics["principle_accuracy"], metrics["calibration"]
        words += (
            f" Preference model over all: {interval(whole)}, Brier {fit['brier']:.3f}, calibration error {fit['ece']:.3f}"
        )
        words += f"; it takes the longer answer in {interval(metrics['longer'])}." if metrics.get("longer") else "."
    cells = []
    for r in rows:
        scores = (score(i) if i else "-" for i in (r.judge, r.learned))
        cells.append([r.principle, f"{r.helped} of {r.revisions}", r.pairs, r.method or "left out", *scores])
    head = ["principle", "revisions that helped", "pairs", "judged by", "judge", "preference model"]
    series = {"judge": [r.judge for r in rows], "preference model": [r.learned for r in rows]}
    plot = principles_plot([r.principle for r in rows], series, "principles")
    caption = "Accuracy on the labelled pairs of each principle with 95 % intervals; chance is one half."
    return [tag("h3", "What each principle brought"), figure(plot, caption), table(head, cells), tag("p", words)]


def _rows(path: Path, kind: type[R]) -> list[R]:
    with contextlib.suppress(UserError):
        return read_rows(path, kind)
    return []


def _revision(row: Revision) -> Html:
    verdict = "helped" if row.helped else f"did not help: {row.why_not or 'no reason recorded'}"
    told = [
        ("prompt", spoken(row.prompt)),
        ("answer", spoken(row.answer)),
        ("critique", spoken(row.critique)),
        ("revision", spoken(row.revision)),
        ("principle", f"{row.principle}, version {row.principle_version}; round {row.round}"),
        ("judged", f"{_number(row.score_before)} before, {_number(row.score_after)} after; {verdict}"),
    ]
    return tag("div", pairs(told), class_="card")


def _number(value: float | None) -> str:
    return "no score" if value is None else f"{value:.3f}"


def _preference(row: Preference) -> Html:
    told = [
        ("prompt", spoken(row.prompt)),
        ("chosen", spoken(row.chosen)),
        ("rejected", spoken(row.rejected)),
        ("probability", f"{row.probability:.2f} that the chosen one is better"),
        ("judged by", ", ".join(row.principle) or "-"),
        ("source", tidy(row.source) or "-"),
    ]
    return tag("div", pairs(told), class_="card")


def spread(rows: Sequence[Any], count: int) -> list[Any]:
    """At most ``count`` rows, evenly spaced."""
    return list(rows) if len(rows) <= count else [rows[i * len(rows) // count] for i in range(count)]
