"""``truthward decide``: a dated page that says what was decided and why, and links the runs that it rests on."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from truthward import provenance
from truthward.errors import UserError
from truthward.ledger import Run
from truthward.reasons import says_nothing
from truthward.record.archive import newest_evals, settings_of
from truthward.record.words import METRICS, interval, place

LONGEST = 60  # letters of a page's name


def decide(title: str, because: str, runs: list[Run], folder: Path) -> Path:
    """Write the next page of ``folder`` and put it on record in each run.

    Args:
        title: the decision in one line.
        because: why; Markdown.
        runs: what it rests on.

    Returns:
        the page's path, ``NNNN-words-of-the-title.md``.

    Raises:
        UserError: the title has no words, or the reason says nothing.
    """
    words = re.sub(r"[^a-z0-9]+", "-", title.casefold()).strip("-")
    if not words:
        raise UserError(
            "the decision has no words", where="truthward decide", fix='say it in a line: decide "PPO keeps its KL"'
        )
    if says_nothing(because, ""):
        fix = "say what made you decide so, and name the runs by --run"
        raise UserError(f"a reason that says nothing is none: {because!r}", where="--because", fix=fix)
    number = max((int(p.name[:4]) for p in folder.glob("[0-9][0-9][0-9][0-9]-*.md")), default=0) + 1
    path = folder / f"{number:04d}-{words[:LONGEST].strip('-')}.md"
    folder.mkdir(parents=True, exist_ok=True)
    with open(path, "x", encoding="utf-8") as file:  # never over another page
        file.write(_page(number, title, because, runs))
    entry = {"page": str(path), "title": title, "who": provenance.who(), "time": provenance.now()}
    for run in runs:
        run.record(decisions=[*run.manifest.get("decisions", []), entry])
    return path


def _page(number: int, title: str, because: str, runs: list[Run]) -> str:
    head = f"# {number}. {title}\n\n{provenance.now()[:10]}, {provenance.who()}. {because.strip()}\n"
    if not runs:
        return head
    rows = [["run", *METRICS.values(), "values off their defaults"], ["---"] * (len(METRICS) + 2)]
    for run in runs:
        metrics = (newest_evals(run) or {}).get("metrics", {})
        scores = [interval(metrics[m]) if metrics.get(m) else "-" for m in METRICS]
        own = [s for s, by in settings_of(run).values() if s.changed and by.path == run.path and s.table == run.stage]
        rows.append([f"`{place(run.path)}`", *scores, ", ".join(f"{s.key} {s.value}" for s in own) or "-"])
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
    return (
        f"{head}\n## The runs it rests on\n\n{table}\n\nBrackets are 95 % intervals. `truthward trace RUN` tells the rest.\n"
    )


def decisions_on(run: Run, folder: Path) -> list[dict[str, Any]]:
    """Pages on record in a run, and pages of ``folder`` that name it."""
    found = {d["page"]: d for d in run.manifest.get("decisions", [])}
    for page in sorted(folder.glob("*.md")) if folder.is_dir() else []:
        text = page.read_text(encoding="utf-8", errors="replace")
        if run.path.name in text and str(page) not in found:
            found[str(page)] = {"page": str(page), "title": text.partition("\n")[0].lstrip("# ")}
    return [{"run": place(run.path), **d} for d in found.values()]
