"""``truthward evals compare A B``: the evals of two models side by side, paired question by question."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from rich.table import Table

from evals import benchmarks, comparison, harness, suite
from evals.asking import Exam
from evals.suite import Scored
from truthward.console import console, plain, say
from truthward.errors import UserError
from truthward.ledger import Run
from truthward.record.archive import newest_evals
from truthward.recorded import read_evals
from truthward.stage import guarded
from truthward.stats import Interval
from truthward.tables import Evals

FLIPS = 10  # changed items shown


def evals_of(path: str) -> dict[str, Any]:
    """The ``evals.json`` of an evals run, or of the newest evals of a model's run.

    Raises:
        UserError: it is no run directory, or its model was not scored.
    """
    run = Run.load(path)
    if run.stage == "evals" and run.done:
        return read_evals(run.path / "evals.json")
    found = newest_evals(run)
    if not found:
        raise UserError("this model was not scored", where=path, fix="run python -m evals RECIPE, or name its evals-… run")
    return found


def compare(a: str, b: str, resamples: int, seed: int) -> dict[str, Any]:
    """B minus A on the items that both were asked."""
    before, after = evals_of(a), evals_of(b)
    by_name = {**suite.exams(len), **benchmarks.EXAMS, "ifeval": harness.IFEVAL}
    for path, side in ((a, before), (b, after)):
        _require_gradable(side["items"], by_name, path)
    scored = [Scored(**row) for row in after["items"]]
    found = comparison.compare(scored, before, by_name, Evals(resamples=resamples), seed)
    if not found["differences"]:
        raise UserError("the two have no question in common", where=f"{a}, {b}", fix="score both on the same banks")
    return {**found, "before": before, "after": after}


def _require_gradable(items: list[dict[str, Any]], by_name: dict[str, Exam], where: str) -> None:
    wanted = {name: {exam.verdict, *(c for m in exam.metrics.values() for c in m.columns)} for name, exam in by_name.items()}
    for row in items:
        if row["set"] not in wanted or (wanted[row["set"]] - {""}) - row["values"].keys():
            what = f"item {row['id']!r} of {row['set']!r} is not of a set that this version knows"
            raise UserError(what, where=where, fix="score the model again")


def show(found: dict[str, Any]) -> None:
    """A row a metric: both scores, the paired difference, its corrected p and what could have been detected."""
    before, after = found["before"], found["after"]
    table = Table("metric", plain(before["model"]), plain(after["model"]), "difference", "n", "p (Holm)", "detectable")
    for name, d in found["differences"].items():
        both = (f"{e['metrics'][name]['mean']:.3f}" if e["metrics"].get(name) else "-" for e in (before, after))
        change = Interval(d["mean"], d["low"], d["high"], d["n"]).signed().rpartition(" n=")[0]
        table.add_row(name, *both, change, str(d["n"]), f"{d['p_corrected']:.3f}", f"{d['detectable']:.3f}")
    console.print(table)
    for better, words in ((True, "for the better"), (False, "for the worse")):
        flipped = [f for f in found["flipped"] if f["better"] is better]
        say(f"{len(flipped)} verdicts changed {words}" + (", e.g." if flipped else ""))
        for f in flipped[:FLIPS]:
            say(plain(f"  {f['set']}/{f['id']}: {f['before']!r} became {f['after']!r}"))


def main() -> None:
    parser = argparse.ArgumentParser(prog="truthward evals compare", description="two models, paired question by question")
    parser.add_argument("a", help="run directory of a model, or of its evals")
    parser.add_argument("b", help="the same")
    parser.add_argument("--resamples", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sys.exit(guarded(lambda: show(compare(options.a, options.b, options.resamples, options.seed))))


if __name__ == "__main__":
    main()
