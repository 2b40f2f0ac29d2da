"""``truthward principles effect RUN``: what each principle of a constitution run brought, and what leaving one out does."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from rich.table import Table

from truthward import processes
from truthward.console import console, plain, say
from truthward.errors import UserError
from truthward.ledger import Run, write_text
from truthward.record.settings import recipe_toml
from truthward.records import Margin, Preference, Revision, Row, read_rows
from truthward.stats import Interval, mean_interval, pair_wins

R = TypeVar("R", bound=Row)
SEED = 0  # of the intervals' resampling


class Effect(NamedTuple):
    """What one principle brought: revisions made and helped, preference pairs, and how often judge and learner keep it."""

    principle: str
    revisions: int
    helped: int
    pairs: int
    method: str
    judge: dict[str, Any] | None
    learned: dict[str, Any] | None


def effects(made: Run, learner: Run | None, revisions: list[Revision], preferences: list[Preference]) -> list[Effect]:
    """One row a principle, in the constitution's order.

    Args:
        made: a finished run of the constitution, with its rows.
        learner: a finished run of the preference model that was trained on them, if there is one.
    """
    record = made.manifest["judge"]
    learned = learner.manifest.get("metrics", {}).get("principles", {}) if learner else {}
    rows = []
    for name, methods in record["principles"].items():
        own = [r for r in revisions if r.principle == name]
        method = record["chosen"].get(name, "")
        best = method or max(methods, key=lambda m: methods[m]["accuracy"]["mean"], default="")
        judge = methods[best]["accuracy"] if best in methods else None
        pairs = sum(name in p.principle for p in preferences)
        rows.append(Effect(name, len(own), sum(r.helped for r in own), pairs, method, judge, learned.get(name)))
    return rows


def show_effect(path: str, leave_out: str = "") -> None:
    """Print the effect of every principle; with ``leave_out``, train the preference model again without that one's rows.

    Raises:
        UserError: no finished run of the constitution, no preference model trained on it, or no such principle.
    """
    made = Run.load(path)
    if made.manifest.get("stage") != "constitution" or not made.done:
        fix = "name a constitution-… directory that is complete"
        raise UserError("not a finished run of the constitution stage", where=path, fix=fix)
    if not made.manifest.get("judge"):
        raise UserError("the manifest says nothing of a judge", where=path, fix="make the run again")
    learner = _learner(made)
    table = Table("principle", "revisions", "helped", "pairs", "judged by", "judge", "preference model")
    revisions, preferences = (
        _made(made.path / "revisions.jsonl", Revision),
        _made(made.path / "preferences.jsonl", Preference),
    )
    for row in effects(made, learner, revisions, preferences):
        judged, learned = (_short(i) if i else "-" for i in (row.judge, row.learned))
        counts = map(str, (row.revisions, row.helped, row.pairs))
        table.add_row(row.principle, *counts, plain(row.method or "left out"), judged, learned)
    console.print(table)
    if learner is None:
        say("no preference model was trained on these rows yet")
    elif leave_out:
        if leave_out not in made.manifest["judge"]["principles"]:
            raise UserError(f"no principle {leave_out}", where=path, fix="take an id of the table")
        _compare(learner, _without(learner, leave_out), leave_out)


def _learner(made: Run) -> Run | None:
    """The newest preference model of these rows that left none of them out."""
    found = [run for run in _learners(made.path.parent) if run.manifest["parents"].get("preferences") == made.path.name]
    return max((run for run in found if not _left_out(run)), key=_finished, default=None)


def _learners(folder: Path) -> Iterator[Run]:
    """Finished preference models of a recipe; what can't be read is none."""
    for manifest in sorted(folder.glob("reward-*/manifest.json")):
        with contextlib.suppress(UserError):
            run = Run.load(manifest.parent)
            if run.done:
                yield run


def _left_out(run: Run) -> Any:
    return run.manifest["recipe"].get("reward", {}).get("without")


def _finished(run: Run) -> str:
    return run.manifest.get("finished", "")


def _made(path: Path, kind: type[R]) -> list[R]:
    """A file's rows; none where the run made none."""
    return read_rows(path, kind) if not path.exists() or path.stat().st_size else []


def _without(learner: Run, principle: str) -> Run:
    """The same preference model without the rows of a principle, trained now unless it is there."""
    folder = learner.path.parent
    recipe = folder / f"without-{principle}.toml"
    write_text(recipe, recipe_toml(learner.manifest["recipe"]))
    settings = [f"runs={folder.parent}", f"name={folder.name}", f'reward.without=["{principle}"]']
    why = f"what leaving {principle} out does to the preference model"
    command = [sys.executable, "-m", "reward", str(recipe), *settings, "--why", why]
    if processes.call(command):
        raise UserError("the preference model could not be trained again", where=str(recipe), fix="see its message above")
    return max((run for run in _learners(folder) if _left_out(run) == [principle]), key=_finished)


def _compare(learner: Run, other: Run, principle: str) -> None:
    """Paired by labelled pair: accuracy with the principle's rows minus without."""
    whole, less = ({m.id: m for m in read_rows(r.path / "margins.jsonl", Margin)} for r in (learner, other))
    say(f"accuracy with the rows of {principle} minus without, on the same labelled pairs:")
    for what, ids in (
        (principle, [i for i, m in whole.items() if m.principle == principle]),
        ("all principles", list(whole)),
    ):
        if ids:
            say(f"  {what:26} {difference([whole[i].margin for i in ids], [less[i].margin for i in ids]).signed()}")


def difference(margins: list[float], other: list[float]) -> Interval:
    """Accuracy by the first margins minus that by the others, paired, with its interval."""
    zeros = [0.0] * len(margins)
    wins = zip(pair_wins(margins, zeros), pair_wins(other, zeros), strict=True)
    return mean_interval([a - b for a, b in wins], seed=SEED)


def _short(interval: dict[str, Any]) -> str:
    return f"{interval['mean']:.2f} [{interval['low']:.2f}, {interval['high']:.2f}]"
