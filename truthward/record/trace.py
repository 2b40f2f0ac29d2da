"""``truthward trace MODEL``: everything that a model came from, and everything that was said of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.tree import Tree

from truthward.console import console, plain, say
from truthward.ledger import Run
from truthward.record.archive import author, evals_runs, lineage, newest_evals, settings_of
from truthward.record.decisions import decisions_on
from truthward.record.words import METRICS, commit, interval, place
from truthward.redaction import tidy


def trace(run: Run, decisions: Path) -> dict[str, Any]:
    """The answer as plain values: ``runs`` (parents first), ``data``, ``principles``, ``values``, ``evals``, ``incidents``,
    ``overrides`` and ``decisions``."""
    runs, evals = lineage(run), newest_evals(run)
    scored = [e for r in runs for e in evals_runs(r)]
    return {
        "model": place(run.path),
        "runs": [_run(r) for r in runs],
        "data": [row for r in runs for row in _data(r)],
        "principles": [_principles(r) for r in runs if r.stage == "constitution"],
        "values": [
            {"key": s.name, "value": s.value, "default": s.default, "reason": s.reason, **author(s, decided)}
            for s, decided in settings_of(run).values()
            if s.changed or s.reason
        ],
        "evals": _scores(evals) if evals else None,
        "incidents": [{"run": place(r.path), **i} for r in [*runs, *scored] for i in r.manifest.get("incidents", [])],
        "overrides": [
            {"run": place(e.path), "gate": e.manifest["gate"].get("text", ""), **e.manifest["gate"]["override"]}
            for e in scored
            if e.manifest.get("gate", {}).get("override")
        ],
        "decisions": [d for r in runs for d in decisions_on(r, decisions)],
    }


def _run(run: Run) -> dict[str, Any]:
    m = run.manifest
    keys = ("status", "started", "finished", "seconds", "peak_memory_gb", "dtype", "resumed", "seed", "metrics")
    return {
        "run": place(run.path),
        "stage": run.stage,
        "parents": m.get("parents", {}),
        "by": m.get("launched", {}).get("by", "unknown"),
        "recipe": m.get("launched", {}).get("recipe", ""),
        "overrides": m.get("launched", {}).get("overrides", []),
        "commit": commit(m),
        "code": m.get("code", "")[:16],
        "machine": m.get("machine", {}),
        "packages": m.get("packages", {}),
        **{key: m.get(key) for key in keys},
    }


def _data(run: Run) -> list[dict[str, Any]]:
    """Each source of data that a run read. A reason is the one that was given for the key that names it."""
    rows, settings = [], [s for s, _ in settings_of(run).values()]
    for path, value in run.manifest.get("data", {}).items():
        about = run.manifest.get("sources", {}).get(path, {})
        naming = [s for s in settings if s.value == path or (isinstance(s.value, list) and path in s.value)]
        reason = next((s.reason for s in naming if s.reason), "")
        rows.append({"path": path, "sha256": value, "stage": run.stage, **about, "reason": reason})
    return rows


def _principles(run: Run) -> dict[str, Any]:
    record = run.manifest.get("judge", {})
    files = run.manifest["recipe"]["constitution"]["principles"]
    return {
        "run": place(run.path),
        "files": {f: run.manifest["data"].get(f, "")[:12] for f in files},
        "judged": sorted(record.get("chosen", {})),
    }


def _scores(evals: dict[str, Any]) -> dict[str, Any]:
    against = {
        key.removeprefix("against_"): {"stage": evals[key]["stage"], **evals[key]["differences"]}
        for key in ("against_parent", "against_base")
        if evals.get(key)
    }
    return {"metrics": evals["metrics"], "against": against}


# ------------------------------------------------------------------------------------------------------------- in print


def show_trace(run: Run, decisions: Path, *, as_json: bool = False) -> None:
    """Print it, for people or for programs."""
    found = trace(run, decisions)
    if as_json:
        print(tidy(json.dumps(found, indent=1, ensure_ascii=False)))
        return
    console.print(_tree(found))
    _show_data(found["data"])
    for made in found["principles"]:
        files = ", ".join(f"{f} ({value})" for f, value in made["files"].items())
        say(f"\n[bold]constitution[/] {plain(tidy(files))}; judged by {plain(', '.join(made['judged'])) or 'nobody'}")
    _show_scores(found["evals"])
    for word in ("overrides", "incidents", "decisions"):
        _show_list(word, found[word])
    off = sum(bool(v["reason"]) for v in found["values"])
    say(f"\n{off} values with their reasons: truthward why {plain(found['model'])}")


def _tree(found: dict[str, Any]) -> Tree:
    runs = {r["run"].rpartition("/")[2]: r for r in found["runs"]}
    newest = found["runs"][-1]
    shown: set[str] = set()

    def grow(tree: Tree, run: dict[str, Any]) -> Tree:
        for role, name in run["parents"].items():
            parent = runs.get(name)
            words = _line(parent) if parent and name not in shown else f"{name} ({'above' if parent else 'lost'})"
            branch = tree.add(f"{role}: {words}")
            if parent and name not in shown:
                shown.add(name)
                grow(branch, parent)
        return tree

    return grow(Tree(f"[bold]{_line(newest)}[/]"), newest)


def _line(run: dict[str, Any]) -> str:
    machine, seconds = run["machine"].get("cpu", ""), run["seconds"]
    parts = [
        f"[bold]{plain(run['run'])}[/]" + ("" if run["status"] == "complete" else f" [yellow]{run['status']}[/]"),
        f"{(run['started'] or '')[:10]} by {plain(run['by'])}",
        f"commit {run['commit']}" if run["commit"] != "no commit" else f"code {run['code']}",
        str(run["dtype"] or "").removeprefix("torch."),
        f"{seconds:.0f} s, {run['peak_memory_gb']} GB on {plain(machine)}" if seconds is not None else "",
        plain(" ".join(run["overrides"])),
    ]
    return " · ".join(p for p in parts if p)


def _show_data(rows: list[dict[str, Any]]) -> None:
    used: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        used.setdefault((row["path"], row["sha256"]), []).append(row)
    table = Table("data", "rows", "licence", "SHA-256", "read by", "why", title="data", title_justify="left")
    for (path, value), same in used.items():
        first = same[0]
        reason = next((r["reason"] for r in same if r["reason"]), first.get("origin", ""))
        stages = ", ".join(dict.fromkeys(r["stage"] for r in same))
        cells = [tidy(path), str(first.get("rows") or "-"), first.get("licence") or "unknown", value[:12], stages, reason]
        table.add_row(*map(plain, cells))
    console.print(table)


def _show_scores(scores: dict[str, Any] | None) -> None:
    if not scores:
        say("\nthis model was not scored")
        return
    names = [f"{other['stage']} ({role})" for role, other in scores["against"].items()]
    table = Table("metric", "score", "n", *[f"against {n}" for n in names], title="evals", title_justify="left")
    for metric, value in scores["metrics"].items():
        if value:
            against = [interval(o[metric], sign=True) if o.get(metric) else "-" for o in scores["against"].values()]
            table.add_row(METRICS.get(metric, metric), interval(value), str(value["n"]), *against)
    console.print(table)


def _show_list(word: str, rows: list[dict[str, Any]]) -> None:
    say(f"\n[bold]{word}[/]" + ("" if rows else ": none"))
    for row in rows:
        say("  " + plain(tidy(" · ".join(f"{k} {v}" for k, v in row.items() if v not in ("", None)))))
