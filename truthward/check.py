"""``truthward check RECIPE``: everything that can be known to be wrong before compute is spent."""

from __future__ import annotations

import ast
import re
import shutil
from pathlib import Path
from typing import Any

from rich.table import Table

from truthward.banks import BANKS, Labelled, tested_texts
from truthward.console import console, plain, say
from truthward.errors import UserError
from truthward.examples import read_examples
from truthward.ledger import Planned, Run, plan
from truthward.principles import read_principles
from truthward.reasons import require_reasons
from truthward.recipe import bank_path, labels_path, probed
from truthward.records import Pair, Preference, Prompt, Question, read_demonstrations, read_rows
from truthward.tables import BANK_OF, Recipe

NEAR = 0.7  # share of common words from which two questions count as the same
SPACE_GB = 4  # what a run of a 135M model writes, with room


def check(recipe: Recipe, where: str, *, brief: bool = False) -> None:
    """Read every data file, look for test items in the training data, and print what each stage will read and write.

    Raises:
        UserError: the first fault, with what to do.
    """
    unexplained = require_reasons(recipe, where)
    read_data(recipe)
    check_rewards(recipe)
    planned = plan(recipe)
    leaks = leaked(recipe)
    if leaks:
        train, test, source = leaks[0]
        raise UserError(
            f"{len(leaks)} rows of the training data are near-duplicates of test questions, e.g. {train!r} and {test!r}",
            where=source,
            fix=f"take them out of {source} or out of the bank",
        )
    _check_disk(Path(recipe.runs))
    if unexplained:
        say(f"[yellow]note[/]: no reason is given for {', '.join(unexplained)}")
    if brief:
        return
    console.print_json(recipe.model_dump_json(exclude_defaults=False))
    console.print(_table(planned))
    say(f"[green]{plain(where)} is in order[/]")


def read_data(recipe: Recipe) -> None:
    """Parse every row that the recipe names.

    Raises:
        UserError: the first file, line and field that is wrong.
    """
    sources: list[tuple[str, str, Any]] = [
        *(("constitution", path, Prompt) for path in recipe.constitution.prompts),
        ("constitution", recipe.judge.bank, Pair),
        ("reward", recipe.reward.validation, Question),
        ("reward", recipe.reward.principle_bank, Pair),
        ("ppo", recipe.ppo.prompts, Prompt),
        *([("ppo", recipe.reward.validation, Question)] if probed(recipe) else []),
        *(("base", bank_path(recipe, name), BANKS[BANK_OF.get(name, name)]) for name in ("truth", *recipe.evals.sets)),
        *([("base", labels_path(recipe), Labelled)] if "open" in recipe.evals.sets else []),
        ("base", recipe.evals.style_bank, Question),
        ("base", recipe.evals.sample_prompts, Prompt),
    ]
    for stage in ("reward", "dpo"):
        for source in getattr(recipe, stage).preferences:
            if source != "constitution":
                sources.append((stage, source, Question if Path(source).is_dir() else Preference))
    sources += [("distill", path, Question if Path(path).is_dir() else Prompt) for path in recipe.distill.prompts]
    for path, kind in dict.fromkeys((path, kind) for stage, path, kind in sources if stage in recipe.stages):
        read_rows(path, kind)
    for stage, paths in (("sft", recipe.sft.data), ("ppo", recipe.ppo.ptx_data)):
        if stage in recipe.stages and paths:
            read_demonstrations(paths)
    if "distill" in recipe.stages:
        read_principles(*recipe.distill.principles)
    if "constitution" in recipe.stages:
        read_principles(*recipe.constitution.principles)
        read_examples(recipe.constitution.examples)


def check_rewards(recipe: Recipe) -> None:
    """Every reward that PPO names is there: a function in its file, or a classifier in its folder. Nothing is imported.

    Raises:
        UserError: one is not. A hub id or a module can't be known to be wrong here.
    """
    for name in recipe.ppo.rewards if "ppo" in recipe.stages else []:
        path, colon, function = name.rpartition(":")
        if path.endswith(".py"):
            names = _functions(Path(path))
            if function not in names:
                found = f"it has {', '.join(sorted(names)) or 'no functions'}" if Path(path).is_file() else "mend the path"
                raise UserError(f"there is no function {function} in {path}", where="ppo.rewards", fix=found)
        elif Path(name).is_dir() and name != "reward" and not (Path(name) / "config.json").is_file():
            fix = "give the folder of a sequence classifier as save_pretrained writes it"
            raise UserError(f"{name} holds no config.json", where="ppo.rewards", fix=fix)
        elif name.endswith(".py"):
            raise UserError(f"{name} names no function", where="ppo.rewards", fix=f"write {name}:function")


def _functions(path: Path) -> set[str]:
    """Names of what a Python file defines or imports at its top level."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return set()
    except SyntaxError as error:
        raise UserError(f"not valid Python: {error}", where=str(path), fix="mend the line it names") from error
    bound = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    for node in tree.body:
        if isinstance(node, ast.ImportFrom | ast.Import):
            bound += [alias.asname or alias.name for alias in node.names]
        elif isinstance(node, ast.Assign):
            bound += [target.id for target in node.targets if isinstance(target, ast.Name)]
    return set(bound)


def leaked(recipe: Recipe) -> list[tuple[str, str, str]]:
    """Training texts that are near-duplicates of what the evals ask: (training text, test text, source)."""
    tests = [(text, _words(text)) for text in tested_texts(recipe)]
    found = []
    for source, text in _training_texts(recipe):
        words = _words(text)
        for question, other in tests:
            sizes = sorted((len(words), len(other)))
            if sizes[0] > NEAR * sizes[1] and len(words & other) > NEAR * len(words | other):
                found.append((text, question, source))
    return found


def _training_texts(recipe: Recipe) -> list[tuple[str, str]]:
    texts = []
    for stage, key, paths in (("sft", "sft.data", recipe.sft.data), ("ppo", "ppo.ptx_data", recipe.ppo.ptx_data)):
        for d in read_demonstrations(paths) if stage in recipe.stages and paths else []:
            texts += [(key, m.content) for m in d.messages if m.role == "user"]
    for stage in ("reward", "dpo"):
        sources = getattr(recipe, stage).preferences if stage in recipe.stages else []
        for source in (s for s in sources if s != "constitution"):
            if Path(source).is_dir():
                texts += [(source, q.question) for q in read_rows(source, Question)]
            else:
                texts += [(source, p.prompt) for p in read_rows(source, Preference)]
    for path in recipe.distill.prompts if "distill" in recipe.stages else []:
        if Path(path).is_dir():
            texts += [(path, q.question) for q in read_rows(path, Question)]
        else:
            texts += [(path, p.prompt) for p in read_rows(path, Prompt)]
    for key, paths in (("constitution", recipe.constitution.prompts), ("ppo", [recipe.ppo.prompts])):
        for path in paths if key in recipe.stages else []:
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
        cells = ("\n".join(this.data) or "-", "\n".join(this.parents.values()) or "-", this.path, state)
        table.add_row(name, *map(plain, cells))
    return table
