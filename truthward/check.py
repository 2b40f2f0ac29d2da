"""``truthward check RECIPE``: everything that can be known to be wrong before compute is spent."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from rich.table import Table

from truthward.console import console, say
from truthward.errors import UserError
from truthward.ledger import Planned, Run, plan
from truthward.recipe import missing_reasons, require_reasons
from truthward.records import (
    Preference,
    Prompt,
    Question,
    read_demonstrations,
    read_principles,
    read_rows,
)
from truthward.tables import Recipe

NEAR = 0.7  # share of common words from which two questions count as the same
SPACE_GB = 4  # what a run of a 135M model writes, with room


def check(recipe: Recipe, where: str, *, brief: bool = False) -> None:
    """Read every data file, look for test items in the training data, and print what each stage will read and write.

    Raises:
        UserError: the first fault, with what to do.
    """
    require_reasons(recipe, where)
    read_data(recipe)
    planned = plan(recipe)
    leaks = leaked(recipe)
    if leaks:
        train, test, source = leaks[0]
        raise UserError(
            f"{len(leaks)} rows of the training data are near-duplicates of test questions, e.g. {train!r} and {test!r}",
            where=source,
            fix=f"take them out of {source} or out of {recipe.evals.truth}",
        )
    _check_disk(Path(recipe.runs))
    _note_missing_reasons(recipe)
    if brief:
        return
    console.print_json(recipe.model_dump_json(exclude_defaults=False))
    console.print(_table(planned))
    say(f"[green]{where} is in order[/]")


def read_data(recipe: Recipe) -> None:
    """Parse every row that the recipe names.

    Raises:
        UserError: the first file, line and field that is wrong.
    """
    sources: list[tuple[str, str, Any]] = [
        ("constitution", recipe.constitution.prompts, Prompt),
        ("constitution", recipe.constitution.judge_bank, Question),
        ("reward", recipe.reward.validation, Question),
        ("ppo", recipe.ppo.prompts, Prompt),
        ("base", recipe.evals.truth, Question),
        ("base", recipe.evals.style_bank, Question),
        ("base", recipe.evals.sample_prompts, Prompt),
    ]
    for stage in ("reward", "dpo"):
        for source in getattr(recipe, stage).preferences:
            if source != "constitution":
                sources.append((stage, source, Question if Path(source).is_dir() else Preference))
    for path, kind in dict.fromkeys((path, kind) for stage, path, kind in sources if stage in recipe.stages):
        read_rows(path, kind)
    if "sft" in recipe.stages:
        read_demonstrations(recipe.sft.data)
    if "constitution" in recipe.stages:
        read_principles(recipe.constitution.principles)


def _note_missing_reasons(recipe: Recipe) -> None:
    missing = missing_reasons(recipe)
    if missing:
        say(f"[yellow]note[/]: no reason is given for {', '.join(missing)}")


def leaked(recipe: Recipe) -> list[tuple[str, str, str]]:
    """Training texts that are near-duplicates of a test question: (training text, test question, source)."""
    tests = [(q.question, _words(q.question)) for q in read_rows(recipe.evals.truth, Question)]
    found = []
    for source, text in _training_texts(recipe):
        words = _words(text)
        for question, other in tests:
            if len(words & other) > NEAR * len(words | other):
                found.append((text, question, source))
    return found


def _training_texts(recipe: Recipe) -> list[tuple[str, str]]:
    texts = []
    if "sft" in recipe.stages:
        for d in read_demonstrations(recipe.sft.data):
            texts += [("sft.data", m.content) for m in d.messages if m.role == "user"]
    for stage in ("reward", "dpo"):
        sources = getattr(recipe, stage).preferences if stage in recipe.stages else []
        for source in (s for s in sources if s != "constitution"):
            if Path(source).is_dir():
                texts += [(source, q.question) for q in read_rows(source, Question)]
            else:
                texts += [(source, p.prompt) for p in read_rows(source, Preference)]
    for key, path in (("constitution", recipe.constitution.prompts), ("ppo", recipe.ppo.prompts)):
        if key in recipe.stages:
            texts += [(path, p.prompt) for p in read_rows(path, Prompt)]
    return list(dict.fromkeys(texts))


def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z0-9']+", text.casefold()))


def _check_disk(runs: Path) -> None:
    where = next(p for p in [runs.absolute(), *runs.absolute().parents] if p.exists())
    free = shutil.disk_usage(where).free / 2**30
    if free < SPACE_GB:
        raise UserError(f"{free:.1f} GB are free, a run needs about {SPACE_GB}", where=str(where), fix="make room")


def _table(planned: dict[str, Planned]) -> Table:
    table = Table(
        "stage", "reads", "from", "writes", "state", title="what each stage reads and writes", title_justify="left"
    )
    for name, this in planned.items():
        state = Run.find(this.path).manifest.get("status", "new")
        table.add_row(name, "\n".join(this.data) or "-", "\n".join(this.parents.values()) or "-", str(this.path), state)
    return table
