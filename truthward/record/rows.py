"""``truthward rows MODEL``: the rows that a model learned from, by source and by principle."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from rich.table import Table

from truthward.console import console, plain, say
from truthward.errors import UserError
from truthward.ledger import Run
from truthward.record.archive import kept_data, lineage
from truthward.record.words import place
from truthward.redaction import tidy

TRAINED = {
    "sft": ("data",),
    "distill": ("prompts",),
    "reward": ("preferences",),
    "dpo": ("preferences",),
    "ppo": ("prompts", "ptx_data"),
}
MADE = {"preferences.jsonl": "preference", "revisions.jsonl": "revision"}


def rows_of(run: Run) -> list[dict[str, Any]]:
    """Every row that a model and those before it learned from, or that a constitution run of its lineage made.

    Each has ``kind``, ``source``, ``stage`` (who learned from it), ``principle`` (ids, of generated rows) and the ``row``.
    """
    runs = lineage(run)
    found = []
    for each in runs:
        for source in _named(each):
            copy = kept_data(each, source)
            for row in _read(copy) if copy else []:
                found.append({"kind": "given", "source": source, "stage": each.stage, "principle": [], "row": row})
        if each.stage == "constitution":
            learned = [
                r.stage for r in runs if each.path.name in r.manifest.get("parents", {}).values() and r.stage in TRAINED
            ]
            for name, kind in MADE.items():
                for row in _read(each.path / name) if (each.path / name).is_file() else []:
                    principle = [row["principle"]] if isinstance(row["principle"], str) else row["principle"]
                    learners = ", ".join(learned) if kind == "preference" else "-"
                    own = {"kind": kind, "source": place(each.path), "stage": learners, "principle": principle, "row": row}
                    found.append(own)
    return found


def show_rows(run: Run, *, principle: str = "", source: str = "", as_json: bool = False) -> None:
    """Print the rows that a principle or a source brought; how many of each, where neither is named.

    Raises:
        UserError: there is no such row; names the principles or sources that there are.
    """
    found = rows_of(run)
    chosen = [r for r in found if (not principle or principle in r["principle"]) and (not source or source in r["source"])]
    if not chosen:
        known = sorted({p for r in found for p in r["principle"]} if principle else {r["source"] for r in found})
        what = f"no row of {place(run.path)} came from {principle or source or 'anywhere'}"
        raise UserError(what, where="truthward rows", fix=f"there are {', '.join(known) or 'no rows on record'}")
    if as_json:
        for r in chosen:
            print(tidy(json.dumps(r, ensure_ascii=False)))
        return
    if not (principle or source):
        _show_counts(chosen)
        return
    for r in chosen:
        say(f"\n[bold]{r['kind']}[/] from {plain(tidy(r['source']))}, learned by {plain(r['stage'])}")
        for key, value in r["row"].items():
            say(f"  {key:12} {plain(tidy(str(value)))}")
    say(f"\n{len(chosen)} rows")


def _show_counts(found: list[dict[str, Any]]) -> None:
    table = Table("source", "kind", "principle", "learned by", "rows", title="rows by source", title_justify="left")
    counts = Counter((tidy(r["source"]), r["kind"], p, r["stage"]) for r in found for p in r["principle"] or ["-"])
    for (source, kind, principle, stage), count in sorted(counts.items()):
        table.add_row(*map(plain, [source, kind, principle, stage, str(count)]))
    console.print(table)
    say("read them: --principle ID, --source TEXT, --json")


def _named(run: Run) -> list[str]:
    """Sources of data that a stage learns from."""
    values = run.manifest["recipe"].get(run.stage, {})
    named = [values.get(key) for key in TRAINED.get(run.stage, ())]
    return [p for value in named if value for p in (value if isinstance(value, list) else [value]) if p != "constitution"]


def _read(path: Path) -> list[dict[str, Any]]:
    files = [path] if path.is_file() else sorted(path.rglob("*.jsonl"))
    return [json.loads(line) for f in files for line in f.read_text(encoding="utf-8").split("\n") if line.strip()]
