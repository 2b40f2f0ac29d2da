"""``truthward why MODEL [KEY]``: a value's reason, who gave it and when, what it rests on, and what other values gave."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from rich.table import Table

from truthward.console import console, plain, say
from truthward.errors import UserError
from truthward.ledger import Run
from truthward.reasons import links
from truthward.record.archive import Archive, author, newest_evals, settings_of
from truthward.record.decisions import decisions_on
from truthward.record.settings import Setting
from truthward.record.words import METRICS, interval, place
from truthward.redaction import tidy


def show_why(run: Run, archive: Archive, key: str, decisions: Path) -> None:
    """Every value with a reason, or all about one value.

    Raises:
        UserError: the model does not depend on a value of that name; names the nearest.
    """
    settings = settings_of(run)
    if not key:
        _show_all(run, settings)
        return
    named = [name for name in settings if key in (name, name.rpartition(".")[2])]
    if len(named) != 1:
        near = difflib.get_close_matches(key, settings, n=3, cutoff=0.5)
        same = [name for name in settings if name.rpartition(".")[2] == key.rpartition(".")[2]]
        known = dict.fromkeys([*same, *near])
        fix = f"did you mean {' or '.join(known)}?" if known else f"see truthward why {place(run.path)}"
        raise UserError(f"{place(run.path)} does not depend on a value {key}", where="truthward why", fix=fix)
    key = named[0]
    setting, decided = settings[key]
    by = author(setting, decided)
    say(f"[bold]{key}[/] = {plain(_value(setting.value))}   default {plain(_value(setting.default))}")
    say(f"  what it is  {plain(setting.about) or '-'}")
    say(f"  reason      {plain(tidy(setting.reason)) or _without(setting)}")
    if setting.reason:
        say(f"  given by    {plain(by['by'])}, {by['at']}{', commit ' + by['commit'] if by['commit'] else ''}")
    say(f"  set for     {plain(place(decided.path))}, started {decided.manifest.get('started', '-')}")
    _show_evidence(setting, decided, archive, decisions)
    _show_tried(tried(archive, decided, key))


def _without(setting: Setting) -> str:
    return "none was given" if setting.changed else "the default stands; nobody gave a reason"


def _show_all(run: Run, settings: dict[str, tuple[Setting, Run]]) -> None:
    title = f"values of {place(run.path)} that are off their default or explained"
    table = Table("key", "value", "default", "why", "by", "when", title=title, title_justify="left")
    for name, (s, decided) in settings.items():
        if s.changed or s.reason:
            by = author(s, decided)
            cells = [name, _value(s.value), _value(s.default), tidy(s.reason) or _without(s), by["by"], by["at"]]
            table.add_row(*map(plain, cells))
    console.print(table)
    say(f"one of them at length: truthward why {plain(place(run.path))} KEY")


# ------------------------------------------------------------------------------------------------------------ evidence


def _show_evidence(setting: Setting, decided: Run, archive: Archive, decisions: Path) -> None:
    rows = [_followed(link, archive) for link in links(setting.reason)]
    rows += [f"{d['page']}: {d['title']}" for d in decisions_on(decided, decisions)]
    rows += [f"incident {i['kind']} at {i.get('time', '-')}" for i in decided.manifest.get("incidents", [])]
    say("  evidence    " + (plain(tidy(rows[0])) if rows else "none is linked"))
    for row in rows[1:]:
        say(f"              {plain(tidy(row))}")


def _followed(link: str, archive: Archive) -> str:
    """A link of a reason with what is there: a run's scores, whether a file exists."""
    found = archive.named(link)
    if found:
        return "; ".join(f"{place(r.path)}: {outcome(r)}" for r in found)
    if "/" in link and not link.startswith("http"):
        return link if Path(link).exists() else f"{link} (no such file here)"
    return link


def outcome(run: Run) -> str:
    """What came of a run in one line: its status, leading scores, or what it measured itself."""
    evals = newest_evals(run)
    if evals:
        return ", ".join(
            f"{label} {interval(evals['metrics'][m])}" for m, label in METRICS.items() if evals["metrics"].get(m)
        )
    if not run.done:
        kinds = ", ".join(i["kind"] for i in run.manifest.get("incidents", []))
        return f"{run.manifest.get('status', 'unknown')}{', ' + kinds if kinds else ''}"
    numbers = run.manifest.get("metrics", {})
    accuracy = numbers.get("validation_accuracy")
    if accuracy:
        return f"validation accuracy {interval(accuracy)}"
    return ", ".join(f"{k} {v:g}" for k, v in numbers.items() if isinstance(v, int | float))[:100] or "complete"


# --------------------------------------------------------------------------------------------------- what else was tried


def tried(archive: Archive, decided: Run, key: str) -> list[dict[str, Any]]:
    """Every run of the same stage, with its value of a key, its reason, and what came of it (a model's paired difference
    to its parent, where it was scored), in the order in which they were started."""
    rows = []
    for run in archive.runs:
        if run.stage != decided.stage:
            continue
        setting, _ = settings_of(run).get(key, (None, run))
        if setting:
            compared = (newest_evals(run) or {}).get("against_parent") or {}
            rows.append(
                {
                    "run": run,
                    "value": setting.value,
                    "reason": setting.reason,
                    "this": run.path.name == decided.path.name,
                    "outcome": outcome(run),
                    "against": compared.get("differences", {}).get("truth.mc1"),
                }
            )
    return rows


def _show_tried(rows: list[dict[str, Any]]) -> None:
    table = Table("value", "run", "when", "why", "what came of it", "MC1 against parent", title_justify="left")
    table.title = f"tried in {len(rows)} runs"
    for row in rows:
        run, against = row["run"], row["against"]
        change = interval(against, sign=True) if against else "-"
        cells = [
            _value(row["value"]),
            place(run.path),
            str(run.manifest.get("started", "-"))[:10],
            tidy(row["reason"]) or "-",
        ]
        table.add_row(*map(plain, cells), plain(row["outcome"]), change, style="bold" if row["this"] else "")
    console.print(table)


def _value(value: Any) -> str:
    return "-" if value is None else ", ".join(map(str, value)) or "[]" if isinstance(value, list) else str(value)
