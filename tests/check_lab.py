"""Mistakes to be planted: a recipe with and without each, and what the check must say of it."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from lab import ROOT, write

import truthward.check  # enters the rules
from truthward.check.facts import Facts
from truthward.check.findings import RULES, Finding, Level
from truthward.recipe import load_recipe

assert truthward.check
NOWHERE = str(Path(tempfile.gettempdir()) / "no-runs-here")


class Planted(NamedTuple):
    """A mistake.

    Attributes:
        rule, level, where: of the finding that it must give.
        word: in its text.
        changes: overrides of the recipe, or a function from an empty folder to some.
        recipe: of the shipped ones, in which it is planted.
    """

    rule: str
    level: Level
    where: str
    word: str
    changes: list[str] | Callable[[Path], list[str]]
    recipe: str = "laptop"

    @property
    def id(self) -> str:
        return f"{self.rule} {self.where}".replace("/", "-")


def ids(planted: list[Planted]) -> list[str]:
    """A name for each, numbered where two would have the same."""
    names = [p.id for p in planted]
    return [f"{name} {i}" if names.count(name) > 1 else name for i, name in enumerate(names)]


def facts(recipe: str, changes: list[str], **options: Any) -> Facts:
    loaded = load_recipe(ROOT / "recipes" / f"{recipe}.toml", [f"runs={NOWHERE}", *changes])
    return Facts(loaded, f"recipes/{recipe}.toml", **options)


def find(rule: str, subject: Facts) -> list[Finding]:
    """What the rule of this name finds."""
    return [f for entry in RULES if rule in entry.names for f in entry.find(subject) if f.rule == rule]


@functools.cache
def clean(rule: str, recipe: str) -> list[Finding]:
    """What it finds in the recipe as it is shipped."""
    return find(rule, facts(recipe, []))


def assert_found(planted: Planted, folder: Path, **options: Any) -> Finding:
    """It is found by its name, level and place, with its word; and is not found without the mistake."""
    changes = planted.changes if isinstance(planted.changes, list) else planted.changes(folder)
    found = find(planted.rule, facts(planted.recipe, changes, **options))
    where = planted.where.replace("TMP", str(folder))
    matching = [f for f in found if (f.level, f.where) == (planted.level, where)]
    assert matching, [str(f) for f in found]
    finding = matching[0]
    assert planted.word in f"{finding.what} {finding.why} {finding.fix}", str(finding)
    assert finding.what
    assert finding.level == "note" or (finding.why and finding.fix)
    assert [f for f in clean(planted.rule, planted.recipe) if (f.level, f.where) == (planted.level, where)] == []
    return finding


def rows(key: str, made: list[dict[str, Any]], name: str = "planted.jsonl") -> Callable[[Path], list[str]]:
    """A change that lets a key name a file with these rows."""

    def change(folder: Path) -> list[str]:
        write(folder / name, made)
        many = key.partition(".")[2] in ("data", "preferences", "prompts") and key != "ppo.prompts"
        return [f"{key}={json.dumps([str(folder / name)]) if many else folder / name}"]

    return change


def demonstration(question: str, answer: str, name: str = "x") -> dict[str, Any]:
    turns = [("user", question), ("assistant", answer)]
    return {"id": name, "messages": [{"role": role, "content": text} for role, text in turns]}


def pair(prompt: str, chosen: str, rejected: str, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}
