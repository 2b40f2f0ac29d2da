"""``truthward find 'ppo.kl_coef > 0.03 and evals.mc1 > 0.3'``: runs for which an expression holds."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from typing import Any

from rich.table import Table

from truthward.console import console, plain, say
from truthward.errors import UserError
from truthward.ledger import Run
from truthward.recipe import table_names
from truthward.record.archive import Archive, newest_evals, settings_of
from truthward.record.why import outcome
from truthward.record.words import place
from truthward.tables import Recipe

EXAMPLE = "ppo.kl_coef > 0.03 and evals.mc1 > 0.3"
OPERATORS: dict[type, Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}
MANIFEST = ("stage", "status", "started", "finished", "seconds", "peak_memory_gb", "dtype", "seed", "resumed", "code")


class Missing:
    """A value that a run does not have; no comparison with it holds."""


MISSING = Missing()


def find(archive: Archive, expression: str) -> list[tuple[Run, dict[str, Any]]]:
    """Runs for which the expression holds, each with the values that it names.

    Names are ``<table>.<key>`` of the recipe for runs that depend on it, ``evals.<metric>`` for scores (``evals.mc1`` for
    ``evals.truth.mc1``), ``metrics.<name>`` for what a stage measured, ``machine.…`` and ``packages.…``, and ``stage``,
    ``status``, ``name``, ``by``, ``started``, ``seconds``, ``incidents`` (how many) and so on. They are compared with
    numbers, strings or lists by ``== != < <= > >= in``, and joined by ``and``, ``or``, ``not`` and parentheses.

    Raises:
        UserError: it is no such expression, or a name that no run could have.
    """
    try:
        tree = ast.parse(expression.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"not an expression: {error}", where=expression, fix=f"for example {EXAMPLE}") from error
    names = sorted(_names(tree))
    for name in names:
        _require_known(name)
    found = []
    for run in archive.runs:
        settings = settings_of(run)
        values = {name: settings[name][0].value if name in settings else _value(run, name) for name in names}
        if _holds(tree, values):
            found.append((run, {k: v for k, v in values.items() if v is not MISSING}))
    return found


def show_found(archive: Archive, expression: str, *, paths: bool = False) -> None:
    """Print the runs that are found, or their paths alone."""
    found = find(archive, expression)
    for sentence in archive.unreadable:
        say(f"[yellow]note[/]: passed over {plain(sentence)}")
    if paths:
        for run, _ in found:
            print(run.path)
        return
    names = list(dict.fromkeys(name for _, values in found for name in values))
    table = Table("run", "status", *names, "what came of it", title=f"{len(found)} of {len(archive.runs)} runs")
    table.title_justify = "left"
    for run, values in found:
        cells = [_shown(values.get(n, "-")) for n in names]
        table.add_row(*map(plain, [place(run.path), run.manifest.get("status", "-"), *cells, outcome(run)]))
    console.print(table)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _refused(node: ast.AST) -> UserError:
    what = f"{type(node).__name__} has no place in a search"
    return UserError(what, where="truthward find", fix=f"compare names with values, e.g. {EXAMPLE}")


def _dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    if isinstance(node, ast.Name):
        return node.id
    raise _refused(node)


def _names(node: ast.AST) -> set[str]:
    """Every name of an expression; anything but comparisons of names and constants is refused."""
    if isinstance(node, ast.BoolOp):
        return set[str]().union(*(_names(v) for v in node.values))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return _names(node.operand)
    if isinstance(node, ast.Compare):
        for op in node.ops:
            if type(op) not in OPERATORS:
                raise _refused(op)
        return set[str]().union(*(_names(v) for v in (node.left, *node.comparators)))
    if isinstance(node, ast.Name | ast.Attribute):
        return {_dotted(node)}
    try:
        ast.literal_eval(node)
    except (ValueError, TypeError):
        raise _refused(node) from None
    return set()


def _holds(node: ast.AST, values: dict[str, Any]) -> bool:
    if isinstance(node, ast.BoolOp):
        return (all if isinstance(node.op, ast.And) else any)(_holds(v, values) for v in node.values)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return not _holds(node.operand, values)
    if isinstance(node, ast.Compare):
        sides = [_operand(v, values) for v in (node.left, *node.comparators)]
        return all(_compared(op, *sides[i : i + 2]) for i, op in enumerate(node.ops))
    value = _operand(node, values)
    return value is not MISSING and bool(value)


def _compared(op: ast.cmpop, left: Any, right: Any) -> bool:
    if left is MISSING or right is MISSING:
        return False
    try:
        return OPERATORS[type(op)](left, right)
    except TypeError:
        return False  # a number beside a string: no run of which it holds


def _operand(node: ast.AST, values: dict[str, Any]) -> Any:
    return values[_dotted(node)] if isinstance(node, ast.Name | ast.Attribute) else ast.literal_eval(node)


# -------------------------------------------------------------------------------------------------------------- values


def _require_known(name: str) -> None:
    """Refuse what no run could have; scores and metrics are known only to the runs."""
    head, dot, key = name.partition(".")
    fields = Recipe.model_fields
    tables = table_names()
    if not dot and (head in MANIFEST or head in ("name", "by", "incidents") or (head in fields and head not in tables)):
        return
    if dot and (
        head in ("evals", "metrics", "machine", "packages")
        or (head in tables and key in type(fields[head].default).model_fields)
    ):
        return
    known = f"{', '.join(tables)}, metrics, machine, packages; or {', '.join(MANIFEST)}, name, by, incidents"
    raise UserError(f"no run has a value {name}", where="truthward find", fix=f"names begin with {known}")


def _value(run: Run, name: str) -> Any:
    manifest = run.manifest
    if name == "name":
        return run.path.name
    if name == "by":
        return manifest.get("launched", {}).get("by", MISSING)
    if name == "incidents":
        return len(manifest.get("incidents", []))
    if name in MANIFEST:
        return manifest.get(name, MISSING)
    head, _, key = name.partition(".")
    if head == "evals":
        return _score(run, key)
    value = manifest.get(head, {})
    return value.get(key, MISSING) if isinstance(value, dict) else MISSING


def _score(run: Run, metric: str) -> Any:
    """A score by its whole name, or by its last part where one set alone has it; the truth set goes before others."""
    metrics = {k: v for k, v in ((newest_evals(run) or {}).get("metrics") or {}).items() if v}
    whole = [m for m in (metric, f"truth.{metric}") if m in metrics]
    named = whole or [m for m in metrics if m.rpartition(".")[2] == metric]
    return metrics[named[0]]["mean"] if len(named) == 1 or whole else MISSING
