"""The report of a recipe: ``report.html`` from its run directories, and the table that closes a run."""

from __future__ import annotations

from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from truthward.ledger import write_text
from truthward.record.words import METRICS, interval
from truthward.report.page import join, page, signed, tag
from truthward.report.sections import SECTIONS
from truthward.report.view import Stage, View, cost, direction, effect, gather, headline, listed
from truthward.tables import Recipe

EFFECTS = {
    "helped": "helped",
    "mixed": "cut both ways",
    "none": "made no measurable difference",
    "hurt": "hurt",
}


def write_report(recipe: Recipe) -> Path:
    """Write ``runs/<recipe>/report.html``, one self-contained page, from whatever is complete.

    Raises:
        UserError: a data path of the recipe does not exist, or a manifest or an ``evals.json`` is at fault.
    """
    view = gather(recipe)
    made = [(key, title, build(view)) for key, (title, build) in SECTIONS.items()]
    kept = [(key, title, body) for key, title, body in made if body]
    title = f"Truthward report: {recipe.name}"
    links = tag("nav", join((tag("a", title, href=f"#{key}") for key, title, _ in kept), " "))
    head = join([tag("h1", title), *[tag("p", line, class_="lead") for line in outcome(view)], links])
    body = join([head, *[join([tag("h2", title, id=key), body]) for key, title, body in kept]])
    path = Path(recipe.runs) / recipe.name / "report.html"
    write_text(path, page(title, body))
    return path


def closing_table(recipe: Recipe) -> Table:
    """One row a stage for the terminal: scores with intervals, difference to base, gate, time and memory."""
    view = gather(recipe)
    table = Table(title=recipe.name, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("stage", no_wrap=True)
    for column in (*METRICS.values(), "MC1 - base", "gate"):
        table.add_column(column, overflow="fold")
    for column in ("time", "memory"):
        table.add_column(column, justify="right")
    for stage in view.stages:
        spent = [text.replace(" min", "m").replace(" ", "") for text in cost(stage.seen)]
        table.add_row(*[Text(text) for text in [stage.name, *_scores(stage), stage.gate, *spent]])
    return table


def _scores(stage: Stage) -> list[str]:
    if not stage.evals:
        return [stage.state or headline(stage, brief=True), "", "", ""]
    compared = stage.compared("base")
    difference = interval(compared["differences"]["truth.mc1"], sign=True) if compared else "-"
    return [*[interval(stage.evals["metrics"][m]) for m in METRICS], difference]


# ----------------------------------------------------------------------------------------------------------- outcome


def outcome(view: View) -> list[str]:
    """What came of the recipe, in a few plain sentences."""
    return [part for part in (_against_base(view), _by_stage(view), _missing(view)) if part]


def _against_base(view: View) -> str:
    final = view.final
    compared = final.compared("base") if final else None
    if not final or not compared:
        return "No trained stage has been compared with the base yet, so there is no outcome to report."
    differences = compared["differences"]
    found = {m: direction(differences[m]) for m in METRICS}
    clauses = []
    for m, label in METRICS.items():
        words = {1: "clears zero", -1: "lies below zero", 0: "includes zero"}[found[m]]
        clauses.append(f"{label} {signed(differences[m])}, which {words}")
    up, down = ([METRICS[m] for m in METRICS if found[m] == sign] for sign in (1, -1))
    if up and down:
        verdict = f"more truthful than the base by {listed(up)} but less truthful by {listed(down)}"
    elif up:
        verdict = "more truthful than the base" + ("" if len(up) == len(METRICS) else f" by {listed(up)} only")
    elif down:
        verdict = f"less truthful than the base by {listed(down)}"
    else:
        verdict = "not measurably more or less truthful than the base"
    last = [stage.name for stage in view.stages if stage.is_model][-1]
    which = "final model" if final.name == last else "last model that is finished and scored"
    n = differences["truth.mc1"]["n"]
    return join(
        [
            tag("strong", f"The {which} ({final.name}) is {verdict}."),
            f"Paired differences on {n} held-out questions with 95 % intervals: {'; '.join(clauses)}.",
        ],
        " ",
    )


def _by_stage(view: View) -> str:
    groups: dict[str, list[str]] = {}
    for stage in view.scored:
        compared = stage.compared("parent")
        if compared:
            groups.setdefault(effect(compared), []).append(f"{stage.name} (from {compared['stage']})")
    clauses = [f"{listed(groups[kind])} {words}" for kind, words in EFFECTS.items() if kind in groups]
    return f"Each stage against its parent: {'; '.join(clauses)}." if clauses else ""


def _missing(view: View) -> str:
    missing = [f"{stage.name} ({stage.state})" for stage in view.stages if stage.state]
    return f"Missing from this report: {', '.join(missing)}." if missing else ""
