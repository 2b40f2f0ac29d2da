"""``truthward principles``: what a constitution says, what two of them differ in, and which runs used which."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table
from rich.text import Text

from truthward.console import console, plain, say
from truthward.errors import UserError
from truthward.ledger import Run, as_list, hash_path
from truthward.principles import (
    TEXTS,
    Constitution,
    Persona,
    Principle,
    advice,
    located,
    read_constitution,
)


class Change(NamedTuple):
    """One key with its two values."""

    key: str
    old: Any
    new: Any


class Comparison(NamedTuple):
    """What two constitutions differ in; every part is empty where they don't.

    Attributes:
        changed: principle id -> its changes.
        persona: changes of the persona; its reasons are keys such as ``why.voice``.
        moved: ids whose order differs, which changes what is drawn.
        faults: texts that changed without a higher version, one sentence each.
    """

    added: list[Principle]
    removed: list[Principle]
    changed: dict[str, list[Change]]
    persona: list[Change]
    moved: list[str]
    faults: list[str]


def compare(old: Constitution, new: Constitution) -> Comparison:
    """What became of ``old``. A text that a model reads may change only together with a higher version."""
    before, after = ({p.id: p for p in c.principles} for c in (old, new))
    kept = [i for i in before if i in after]
    changed = {i: found for i in kept if (found := _changes(_fields(before[i]), _fields(after[i])))}
    faults = []
    for i, found in changed.items():
        texts = [c.key for c in found if c.key in TEXTS]
        was, now = before[i].version, after[i].version
        if texts and now <= was:
            version = f"version is still {was}" if now == was else f"version fell from {was} to {now}"
            faults.append(f"{i}: {', '.join(texts)} changed and {version}")
    return Comparison(
        added=[p for i, p in after.items() if i not in before],
        removed=[p for i, p in before.items() if i not in after],
        changed=changed,
        persona=_changes(*(_fields(c.persona) if c.persona else {} for c in (old, new))),
        moved=[a for a, b in zip(kept, [i for i in after if i in before], strict=True) if a != b],
        faults=faults,
    )


def shares(principles: list[Principle]) -> dict[str, float]:
    """How often each principle is the first to be drawn: its weight over the sum of weights, by id."""
    total = sum(p.weight for p in principles)
    return {p.id: p.weight / total for p in principles}


def word_diff(old: str, new: str) -> Text:
    """A text with the words that went as ``[-old-]`` and those that came as ``{+new+}``."""
    a, b = old.split(), new.split()
    pieces: list[Text] = []
    for kind, i, j, k, m in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if kind == "equal":
            pieces.append(Text(" ".join(a[i:j])))
            continue
        if i < j:
            pieces.append(Text(f"[-{' '.join(a[i:j])}-]", style="red"))
        if k < m:
            pieces.append(Text(f"{{+{' '.join(b[k:m])}+}}", style="green"))
    return Text(" ").join(pieces)


def users(runs: Path) -> Iterator[tuple[Run, set[str]]]:
    """Every run that a constitution had a part in, with the content hashes of those it descends from.

    Runs whose manifest can't be read are passed over with a warning.
    """
    found: dict[Path, Run] = {}
    for file in sorted(runs.glob("*/*/manifest.json")):
        try:
            found[file.parent] = Run.load(file.parent)
        except UserError as error:
            say(f"[yellow]warning[/] passed over: {plain(error)}")
    for run in found.values():
        used, todo, seen = set[str](), [run], set[Path]()
        while todo:
            this = todo.pop()
            if this.path in seen:
                continue
            seen.add(this.path)
            todo += [found[p] for name in this.manifest["parents"].values() if (p := this.path.parent / name) in found]
            used |= _constitution_of(this)
        if used:
            yield run, used


def _constitution_of(run: Run) -> set[str]:
    """Content hashes of a constitution run's files."""
    named = run.manifest["recipe"].get("constitution", {}).get("principles", []) if run.stage == "constitution" else []
    data = run.manifest.get("data", {})
    return {data[path] for path in as_list(named) if path in data}


def show(paths: list[str], *, long: bool = False) -> None:
    """List one constitution, of one or several files or a run's own, and what is to be said against it.

    Raises:
        UserError: the first fault; names file, principle and key.
    """
    files = [file for path in paths for file in located(path)]
    principles, persona = read_constitution(*files)
    if persona:
        _show_persona(persona, long)
    table = Table(
        "id", "version", "weight", "share", "tags", "title", title=Text(", ".join(map(str, files))), title_justify="left"
    )
    for p, share in zip(principles, shares(principles).values(), strict=True):
        table.add_row(p.id, str(p.version), f"{p.weight:g}", f"{share:.1%}", ", ".join(p.tags), Text(p.title))
    console.print(table)
    for p in principles if long else []:
        say(f"\n[bold]{p.id}[/]")
        for key in (*TEXTS, "why"):
            _line(key, Text(getattr(p, key)))
    notes = advice(principles)
    for note in notes:
        say(f"[yellow]warning[/] {plain(note)}")
    say(f"{len(principles)} principles in order" + (f", {len(notes)} warnings" if notes else ""))


def show_difference(old: str, new: str, runs: str) -> None:
    """Print what two constitutions differ in, and which runs below ``runs`` used which.

    Raises:
        UserError: one of them is at fault, or a text changed without a higher version (after all has been printed).
    """
    files = [located(old), located(new)]
    before, after = (read_constitution(*each) for each in files)
    found = compare(before, after)
    if any(found):
        _show_table(before, after, found)
    else:
        say(plain(f"{_names(files[0])} and {_names(files[1])} have the same principles"))
    for name, changes in (("persona", found.persona), *found.changed.items()):
        if changes:
            say(f"\n[bold]{name}[/]")
        for key, a, b in changes:
            _line(key, word_diff(a, b) if isinstance(a, str) and isinstance(b, str) else Text(f"{_value(a)} -> {_value(b)}"))
    _show_users(files, Path(runs))
    if found.faults:
        fix = "raise the version by one with every change of a text, or name the older constitution first"
        raise UserError("; ".join(found.faults), where=_names(files[1]), fix=fix)


def _fields(row: Principle | Persona) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in row.model_dump().items():
        flat |= {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def _changes(old: dict[str, Any], new: dict[str, Any]) -> list[Change]:
    return [Change(key, old.get(key), new.get(key)) for key in old | new if old.get(key) != new.get(key)]


def _show_table(before: Constitution, after: Constitution, found: Comparison) -> None:
    table = Table("id", "version", "share before", "after", "what", title="principles", title_justify="left")
    was, now = shares(before.principles), shares(after.principles)
    versions = [{p.id: str(p.version) for p in c.principles} for c in (before, after)]
    for i in was | now:
        what = "added" if i not in was else "removed" if i not in now else ", ".join(c.key for c in found.changed.get(i, []))
        version = " -> ".join(dict.fromkeys(v[i] for v in versions if i in v))
        style = {"added": "green", "removed": "red"}.get(what, "bold" if what else "dim")
        cells = [f"{share[i]:.1%}" if i in share else "-" for share in (was, now)]
        table.add_row(i, version, *cells, what + (" (moved)" if i in found.moved else ""), style=style)
    console.print(table)


def _names(files: list[Path]) -> str:
    return " with ".join(map(str, files))


def _show_users(files: list[list[Path]], runs: Path) -> None:
    names = dict[str, str]()
    for letter, each in zip("AB", files, strict=True):
        for value in {hash_path(str(file)) for file in each}:
            names[value] = names.get(value, "") + letter
    used = [(run, [names[h] for h in sorted(hashes) if h in names]) for run, hashes in users(runs)]
    used = [(run, letters) for run, letters in used if letters]
    say(plain(f"\nA is {_names(files[0])}\nB is {_names(files[1])}"))
    if not used:
        say(plain(f"no run in {runs} used either"))
        return
    table = Table("run", "stage", "status", "used", title=Text(f"runs in {runs}"), title_justify="left")
    for run, letters in used:
        status = run.manifest.get("status", "-")
        table.add_row(Text(str(run.path.relative_to(runs))), run.stage, Text(status), " and ".join("".join(letters)))
    console.print(table)


def _show_persona(persona: Persona, long: bool) -> None:
    say(f"[bold]persona[/] {plain(persona.name)}")
    for key, reason in persona.why.model_dump().items():
        _line(key, Text(getattr(persona, key)))
        if long:
            _line("", Text(f"why: {reason}"))


def _line(key: str, text: Text) -> None:
    console.print(Text.assemble(f"  {key:8} ", text), soft_wrap=True)


def _value(value: Any) -> str:
    return "-" if value is None or value == [] else ", ".join(value) if isinstance(value, list) else str(value)
