"""``truthward diff A B``: what two runs differ in, and what came of it."""

from __future__ import annotations

import difflib
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from truthward import processes
from truthward.amendments import compare as compare_constitutions
from truthward.console import console, plain, say
from truthward.errors import UserError
from truthward.fingerprint import files_of
from truthward.ledger import Run
from truthward.principles import COPIES, read_constitution
from truthward.record.archive import kept_code, kept_data, lineage, newest_evals, settings_of
from truthward.record.words import place
from truthward.redaction import tidy

SHOWN = 5  # rows of data shown in each direction
GENERATED = ("preferences.jsonl", "revisions.jsonl")  # rows that a run made itself
VARYING = ("seed", "model")  # keys of a generated row that differ between any two runs


class Changed(NamedTuple):
    """A value in both runs, with its reasons; None where a run does not depend on it."""

    key: str
    values: tuple[Any, ...]
    reasons: tuple[str, ...] = ("", "")


class Rows(NamedTuple):
    """Rows of one source of data that are in one run alone; ``note`` where the rows themselves were not kept."""

    source: str
    removed: list[str]
    added: list[str]
    note: str = ""


def values(a: Run, b: Run) -> list[Changed]:
    """Values that differ, in the recipe's order; of a table that one run alone depends on, those that were chosen."""
    before, after = ({k: s for k, (s, _) in settings_of(run).items()} for run in (a, b))
    found = []
    for key in dict.fromkeys([*before, *after]):
        pair = before.get(key), after.get(key)
        there = [s for s in pair if s]
        if there[0].value != there[-1].value or (len(there) == 1 and (there[0].changed or there[0].reason)):
            own = tuple(s.value if s else None for s in pair)
            found.append(Changed(key, own, tuple(s.reason if s else "" for s in pair)))
    return found


def rows(a: Run, b: Run) -> list[Rows]:
    """What differs in the data that both runs and all before them read, and in the rows that these made."""
    before, after = _sources(a), _sources(b)
    found = []
    for source in dict.fromkeys([*before, *after]):
        past, now = before.get(source), after.get(source)
        if past and now and past[1] == now[1]:
            continue
        lines = [Counter(_lines(held[0]) if held else []) for held in (past, now)]
        lost = [held for held in (past, now) if held and held[0] is None]
        note = "its rows were not kept, the hashes differ" if lost else ""
        gone, come = (list((x - y).elements()) for x, y in (lines, reversed(lines)))
        if gone or come or note:
            found.append(Rows(source, gone, come, note))
    return found


def _sources(run: Run) -> dict[str, tuple[Path | None, str]]:
    """Every source of data of a run and those before it: where its rows are kept, and the hash of its content."""
    found: dict[str, tuple[Path | None, str]] = {}
    for each in lineage(run):
        for path, value in each.manifest.get("data", {}).items():
            if not path.endswith(".toml"):
                found[path] = kept_data(each, path), value
        for name in GENERATED:
            if (each.path / name).is_file():
                found[f"{each.stage}/{name}"] = each.path / name, each.path.name
    return found


def _lines(path: Path | None) -> list[str]:
    """Rows as text; of generated ones, without what differs between any two runs."""
    if path is None:
        return []
    whole = [
        line for f in files_of(path) for line in f.read_text(encoding="utf-8", errors="replace").split("\n") if line.strip()
    ]
    return [_plain(line) for line in whole] if path.name in GENERATED else whole


def _plain(line: str) -> str:
    row = json.loads(line)
    return json.dumps({k: v for k, v in row.items() if k not in VARYING}, ensure_ascii=False)


def code(a: Run, b: Run) -> dict[str, list[str]]:
    """Unified differences by module, over all modules that any run of either lineage ran."""
    before, after = ({k: v for run in lineage(r) for k, v in kept_code(run).items()} for r in (a, b))
    found = {}
    for name in sorted(before | after):
        past, now = before.get(name, ""), after.get(name, "")
        if past != now:
            found[name] = list(difflib.unified_diff(past.split("\n"), now.split("\n"), "before", "after", lineterm="", n=2))
    return found


def surroundings(a: Run, b: Run) -> list[Changed]:
    """Packages and machine that differ."""
    flat = [
        {**r.manifest.get("machine", {}), **r.manifest.get("packages", {}), "dtype": r.manifest.get("dtype")} for r in (a, b)
    ]
    keys = [k for k in flat[0] | flat[1] if flat[0].get(k) != flat[1].get(k)]
    return [Changed(k, (flat[0].get(k), flat[1].get(k))) for k in keys]


# ------------------------------------------------------------------------------------------------------------- in print


def show_diff(a: Run, b: Run, *, whole: bool = False) -> None:
    """Print it; with ``whole``, every line of code and every row."""
    say(f"A is {plain(place(a.path))}, B is {plain(place(b.path))}")
    _show_values(a, b)
    _show_principles(a, b)
    _show_rows(rows(a, b), whole)
    _show_code(a, b, whole)
    _show_table("machine and packages", surroundings(a, b))
    say("\n[bold]what came of it[/] (B minus A)")
    if newest_evals(a) and newest_evals(b):
        sys.stdout.flush()
        processes.call([sys.executable, "-m", "evals.compare", str(a.path), str(b.path)])
    else:
        lacking = " and ".join(plain(place(r.path)) for r in (a, b) if not newest_evals(r))
        say(f"  nothing can be said: {lacking} {'was' if newest_evals(a) or newest_evals(b) else 'were'} not scored")


def _show_values(a: Run, b: Run) -> None:
    stages = [list(dict.fromkeys(r.stage for r in lineage(run))) for run in (a, b)]
    if stages[0] != stages[1]:
        say(f"\n[bold]stages[/]  A {', '.join(stages[0])}; B {', '.join(stages[1])}")
    _show_table("values", values(a, b))


def _show_table(title: str, changed: list[Changed]) -> None:
    if not changed:
        say(f"\n[bold]{title}[/]: the same")
        return
    table = Table("key", "A", "B", "why in A", "why in B", title=f"\n{title}", title_justify="left")
    for c in changed:
        cells = [c.key, *(("-" if v is None else str(v)) for v in c.values), *(tidy(r) or "-" for r in c.reasons)]
        table.add_row(*map(plain, cells))
    console.print(table)


def _show_principles(a: Run, b: Run) -> None:
    made = [next((r for r in lineage(run) if r.stage == "constitution"), None) for run in (a, b)]
    folders = [m.path / COPIES for m in made if m and (m.path / COPIES).is_dir()]
    if len(folders) < 2:
        return
    try:
        found = compare_constitutions(*(read_constitution(*sorted(f.glob("*.toml"))) for f in folders))
    except UserError as error:
        say(f"\n[bold]principles[/]: {plain(str(error))}")
        return
    parts = [f"added {p.id}" for p in found.added] + [f"removed {p.id}" for p in found.removed]
    parts += [f"{i}: {', '.join(c.key for c in changes)}" for i, changes in found.changed.items()]
    parts += ["persona"] if found.persona else []
    say("\n[bold]principles[/]: " + (plain("; ".join(parts)) or "the same"))


def _show_rows(found: list[Rows], whole: bool) -> None:
    say("\n[bold]rows of data[/]" + ("" if found else ": the same"))
    for source, removed, added, note in found:
        say(f"  {plain(tidy(source))}: {note or f'{len(removed)} removed, {len(added)} added'}")
        for sign, lines in (("-", removed), ("+", added)):
            for line in lines if whole else lines[:SHOWN]:
                say(f"    {sign} {plain(line if whole else line[:160])}")


def _show_code(a: Run, b: Run, whole: bool) -> None:
    kept = [bool(kept_code(r)) for r in (a, b)]
    if not all(kept):
        say("\n[bold]code[/]: not kept in " + " and ".join("AB"[i] for i, k in enumerate(kept) if not k))
        return
    found = code(a, b)
    say("\n[bold]code[/]" + ("" if found else ": the same"))
    before, after = ({name for run in lineage(r) for name in kept_code(run)} for r in (a, b))
    for letter, own in (("A", before - after), ("B", after - before)):
        if own:
            say(f"  in {letter} alone: {', '.join(sorted(own))}")
    for name, lines in found.items():
        if name not in before & after:
            continue
        counts = Counter(line[:1] for line in lines[2:])
        say(f"  {name}: {counts['+']} lines added, {counts['-']} removed")
        for line in lines if whole else []:
            say(f"    {plain(line)}")
