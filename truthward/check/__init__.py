"""``truthward check RECIPE``: what can be known to be wrong, or looks it, before compute is spent.

Every run starts with it. A rule is a function from :class:`Facts` to findings, each of which says what, where, why it
matters and what to do; ``docs/check.md`` gives every rule with its threshold and source. Nothing is downloaded.
"""

from __future__ import annotations

from rich.table import Table

from truthward.check import machine, pipeline, policy, ranges, ranks, rewards, rows, tokens, training
from truthward.check.facts import Facts
from truthward.check.findings import RULES, Finding, accept, as_finding, counted, refuse, tell
from truthward.check.memory import GB
from truthward.console import console, plain, say
from truthward.errors import UserError
from truthward.ledger import Run
from truthward.tables import Recipe

__all__ = ["Facts", "Finding", "check", "examine", "rows"]
THEMES = (rows, pipeline, training, ranges, policy, tokens, rewards, machine, ranks)  # in the order in which they are asked


def check(recipe: Recipe, where: str, *, brief: bool = False, launching: bool = False) -> None:
    """Ask every rule, tell what they found, and stop when there are errors.

    Args:
        recipe: the resolved recipe.
        where: its file.
        brief: leave out the recipe, the plan and the predicted memory.
        launching: whether a run is about to start on this machine.

    Raises:
        UserError: all errors that were found, with what to do.
    """
    facts = Facts(recipe, where, launching=launching)
    findings = examine(facts)
    tell(findings, brief=brief)
    refuse(findings, where)
    if brief:
        return
    console.print_json(recipe.model_dump_json(exclude_defaults=False))
    console.print(_plan_table(facts))
    if not machine.elsewhere(facts, machine.Machine.here()):
        console.print(_memory_table(facts))
    found = counted(findings)
    say(f"[green]{plain(where)} is in order[/]" + (f" ({found})" if found else ""))


def examine(facts: Facts) -> list[Finding]:
    """What all rules find, with what the recipe accepts as notes."""
    findings: list[Finding] = []
    themes = [theme.__name__ for theme in THEMES]
    for rule in sorted(RULES, key=lambda rule: themes.index(rule.find.__module__)):
        try:
            findings += rule.find(facts)
        except UserError as fault:
            findings.append(as_finding(rule.names[0], fault))
    return accept(findings, facts.recipe, {name for rule in RULES for name in rule.names})


def _plan_table(facts: Facts) -> Table:
    table = Table(
        "stage", "reads", "from", "writes", "state", title="what each stage reads and writes", title_justify="left"
    )
    for name, this in facts.planned.items():
        state = Run.find(this.path).manifest.get("status", "new")
        cells = ("\n".join(this.data) or "-", "\n".join(this.parents.values()) or "-", this.path, state)
        table.add_row(name, *map(plain, cells))
    return table


def _memory_table(facts: Facts) -> Table:
    predicted = machine.predictions(facts, machine.Machine.here())
    table = Table("stage", "total", *next(iter(predicted.values()))._fields if predicted else ())
    table.title, table.title_justify = "predicted peak of memory on each rank, GB", "left"
    for stage, memory in predicted.items():
        table.add_row(stage, *(f"{value / GB:.2f}" for value in (memory.total, *memory)))
    return table
