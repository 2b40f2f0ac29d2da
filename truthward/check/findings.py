"""What the check finds, and how it is told."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from truthward.console import plain, say
from truthward.errors import UserError
from truthward.tables import Recipe

if TYPE_CHECKING:
    from truthward.check.facts import Facts

Level = Literal["error", "warning", "note"]
COLOURS = {"error": "red", "warning": "yellow", "note": "cyan"}


@dataclass(frozen=True)
class Finding:
    """Something that is wrong, or looks it.

    Attributes:
        level: an error stops the launch; a warning or note does not.
        rule: its name, under which ``docs/check.md`` explains it.
        where: recipe key, or file and line.
        what: what was found, with its numbers.
        why: what comes of it.
        fix: what to do.
    """

    level: Level
    rule: str
    where: str
    what: str
    why: str
    fix: str

    @property
    def name(self) -> str:
        """By which a recipe can accept this finding alone."""
        return f"{self.rule}@{self.where}"

    def __str__(self) -> str:
        lines = [f"{self.where}: {self.what}", self.why and f"why: {self.why}", self.fix and f"to do: {self.fix}"]
        return "\n  ".join(filter(None, lines)) + f"  [{self.rule}]"


Found = Iterator[Finding]


class Rule(NamedTuple):
    """A function that looks at the facts, and the names of what it can find."""

    names: tuple[str, ...]
    find: Callable[[Facts], Found]


RULES: list[Rule] = []  # in the order in which their modules are imported


def rule(*names: str) -> Callable[[Callable[[Facts], Found]], Callable[[Facts], Found]]:
    """Enter a function among the rules."""

    def enter(find: Callable[[Facts], Found]) -> Callable[[Facts], Found]:
        RULES.append(Rule(names, find))
        return find

    return enter


def error(rule: str, where: str, what: str, *, why: str, fix: str) -> Finding:
    return Finding("error", rule, where, what, why, fix)


def warning(rule: str, where: str, what: str, *, why: str, fix: str) -> Finding:
    return Finding("warning", rule, where, what, why, fix)


def note(rule: str, where: str, what: str, *, why: str = "", fix: str = "") -> Finding:
    return Finding("note", rule, where, what, why, fix)


def as_finding(rule: str, fault: UserError) -> Finding:
    """An error that reading or planning met."""
    return error(rule, fault.where, fault.what, why="a stage would stop at it", fix=fault.fix)


def accept(findings: list[Finding], recipe: Recipe, known: set[str]) -> list[Finding]:
    """Findings that ``check.accept`` names by rule, or by ``rule@where``, become notes with the recipe's reason.

    Args:
        known: names of all rules: a word of ``accept`` that names none is an error, one that nothing answers to a note.
    """
    words, used = recipe.check.accept, set()
    reason = recipe.check.why.get("accept", "no reason given")
    result = []
    for finding in findings:
        named = {finding.rule, finding.name} & set(words)
        used |= named
        if named:
            finding = dataclasses.replace(finding, level="note", why=f"accepted: {reason}")
        result.append(finding)
    for word in dict.fromkeys(w for w in words if w not in used):
        rule = word.partition("@")[0]
        if rule in known:
            text, fix = f"{word!r} accepts nothing: it was not found", "take it out"
            result.append(note("accept-idle", "check.accept", text, fix=fix))
        else:
            near = next(iter(difflib.get_close_matches(rule, sorted(known), n=1)), "")
            fix = f"did you mean {near}?" if near else "docs/check.md names the rules"
            text = f"there is no rule {rule!r}"
            result.append(error("accept-unknown", "check.accept", text, why="nothing would be accepted by it", fix=fix))
    return result


def tell(findings: list[Finding], *, brief: bool = False) -> None:
    """Print warnings and notes, of notes only how many if it is to be brief; errors are raised by :func:`refuse`."""
    notes = [f for f in findings if f.level == "note"]
    for finding in [f for f in findings if f.level == "warning"] + ([] if brief else notes):
        say(f"[{COLOURS[finding.level]}]{finding.level}[/]: {plain(finding)}")
    if brief and notes:
        say(f"[dim]{len(notes)} {'note' if len(notes) == 1 else 'notes'}: truthward check tells them[/]")


def refuse(findings: list[Finding], where: str) -> None:
    """Stop when there are errors, with all of them.

    Raises:
        UserError: there are some.
    """
    errors = [f for f in findings if f.level == "error"]
    if errors:
        count = f"{len(errors)} errors in {where}\n" if len(errors) > 1 else ""
        raise UserError(count + "\n".join(map(str, errors)))


def counted(findings: list[Finding]) -> str:
    """``2 warnings, 1 note``; empty without any."""
    counts: dict[Any, int] = {}
    for finding in findings:
        counts[finding.level] = counts.get(finding.level, 0) + 1
    words = [f"{n} {level}{'s' if n > 1 else ''}" for level, n in counts.items()]
    return ", ".join(words)
