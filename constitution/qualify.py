"""Which method of a judge may judge by which principle: measured on labelled pairs before anything it says is used.

A method qualifies when the 95 % interval of its accuracy over all labelled pairs lies above chance, and for a principle
when that over the principle's own pairs does too. Scores become probabilities by a temperature fitted on the same pairs.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from constitution.judge import Case, Judge, Scores, Verdicts
from truthward import stats
from truthward.errors import UserError
from truthward.principles import Principle
from truthward.records import Pair

CHANCE = 0.5


def qualify(
    judge: Judge,
    labelled: dict[str, list[Pair]],
    principles: list[Principle],
    methods: Sequence[str],
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Measure each method on the labelled pairs.

    Args:
        labelled: pairs by principle; those of other principles are ignored.
        methods: those of the judge's that are to be tried.

    Returns:
        the record that the manifest keeps. ``methods``: of each, accuracy over all pairs, whether it is refused, its
        temperature, expected calibration error and Brier score, the share of pairs in which it takes the longer answer,
        the share of first letters (choice alone). ``principles``: of each, by method, accuracy and whether refused.
        ``chosen``: the method of each principle that has one.
    """
    known = {p.id: p for p in principles}
    pairs = [pair for name in known for pair in labelled.get(name, [])]
    cases = to_cases(labelled, principles)
    verdicts = judge.scores(cases, [m for m in methods if m in judge.methods], "qualifying") if pairs else Verdicts({})
    record: dict[str, Any] = {"methods": {}, "principles": {p.id: {} for p in principles}, "chosen": {}}
    for method, scores in verdicts.scores.items():
        margins = _margins(scores)
        whole = stats.accuracy(margins, resamples, seed)
        heat, lengths = stats.fit_temperature(margins), [(len(p.better), len(p.worse)) for p in pairs]
        longer = stats.takes_longer(lengths, margins, resamples, seed)
        row = {
            "accuracy": whole.as_dict(),
            "refused": whole.low <= CHANCE,
            "temperature": heat,
            **stats.calibration(margins, heat),
            "longer": longer.as_dict() if longer else None,
        }
        if method == "choice":
            row["first"] = verdicts.first / max(1, verdicts.asked)
        record["methods"][method] = row
        for name in known:
            own = [m for m, pair in zip(margins, pairs, strict=True) if pair.principle == name]
            if own:
                part = stats.accuracy(own, resamples, seed)
                refused = row["refused"] or part.low <= CHANCE
                record["principles"][name][method] = {"accuracy": part.as_dict(), "refused": refused}
    record["chosen"] = _choose(record["principles"])
    return record


def to_cases(labelled: dict[str, list[Pair]], principles: list[Principle]) -> list[Case]:
    """What a judge is asked of the labelled pairs of these principles, the better answer first."""
    return [Case(pair.prompt, [pair.better, pair.worse], p) for p in principles for pair in labelled.get(p.id, [])]


def require_qualified(record: dict[str, Any], gate: str) -> None:
    """Stop when no method may judge by any principle.

    Raises:
        UserError: none may, and ``gate`` is "block".
    """
    if record["chosen"] or gate != "block":
        return
    found = [f"{m} {stats.Interval(**row['accuracy'])}" for m, row in record["methods"].items()]
    raise UserError(
        f"no judge clears chance by any principle: {'; '.join(found) or 'there are no labelled pairs of these principles'}",
        where="judge",
        fix='use a stronger judge (judge.model or judge.base_url), or leave "constitution" out of preferences and stages',
    )


class Panel:
    """The methods that qualified, each for its principles; their verdicts as log-odds.

    Args:
        record: what :func:`qualify` found. Where nothing qualified (and the gate let that pass) the best method judges by
            every principle.
    """

    def __init__(self, judge: Judge, principles: list[Principle], record: dict[str, Any]) -> None:
        self.judge, self.methods = judge, record["methods"]
        self.chosen: dict[str, str] = record["chosen"]
        if not self.chosen:
            best = max(self.methods, key=lambda m: self.methods[m]["accuracy"]["mean"], default=judge.methods[0])
            self.chosen = {p.id: best for p in principles}
        self.principles = [p for p in principles if p.id in self.chosen]

    def log_odds(self, cases: list[tuple[str, list[str], list[Principle]]], description: str) -> Scores:
        """Of each (prompt, answers, principles) a score for every answer, averaged over the principles.

        The difference of two answers' scores is the log-odds that the first is better; None where the judge gave none.
        """
        singles = [
            (number, Case(prompt, answers, principle))
            for number, (prompt, answers, principles) in enumerate(cases)
            for principle in principles
        ]
        sums: Scores = [[0.0] * len(answers) for _, answers, _ in cases]
        for method in dict.fromkeys(self.chosen.values()):
            mine = [(number, case) for number, case in singles if self.chosen[case.principle.id] == method]
            if not mine:
                continue
            temperature = self.methods[method]["temperature"] if method in self.methods else 1.0
            scores = self.judge.scores([case for _, case in mine], [method], description).scores[method]
            for (number, _), row in zip(mine, scores, strict=True):
                before, share = sums[number], temperature * len(cases[number][2])
                both = None if before is None or row is None else zip(before, row, strict=True)
                sums[number] = None if both is None else [b + value / share for b, value in both]
        return sums


def pick(principles: list[Principle], how_many: int, draw: random.Random) -> list[Principle]:
    """Different principles, drawn by weight."""
    left, chosen = list(principles), list[Principle]()
    while left and len(chosen) < how_many:
        (one,) = draw.choices(left, weights=[p.weight for p in left])
        left.remove(one)
        chosen.append(one)
    return chosen


def _margins(scores: Scores) -> list[float]:
    """Better minus worse; 0, a tie, where the judge gave no score: a judge is not excused from its labelled pairs."""
    return [0.0 if row is None else row[0] - row[1] for row in scores]


def _choose(principles: dict[str, dict[str, Any]]) -> dict[str, str]:
    chosen = {}
    for name, methods in principles.items():
        fit = {m: row["accuracy"]["mean"] for m, row in methods.items() if not row["refused"]}
        if fit:
            chosen[name] = max(fit, key=lambda m: fit[m])
    return chosen
