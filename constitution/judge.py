"""The judge: which of two answers keeps a principle better, by log-probability, once it has shown that it can tell.

A judge scores an answer per token: under ``likelihood`` it is log p(answer | follow prompt), under ``contrast`` that minus
log p(answer | violate prompt) (after Yang et al. 2023, RLCD, arXiv 2307.12950). Before anything it says is used, each
method is measured on labelled pairs of equal length; one whose 95 % interval does not clear chance is refused.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

from truthward import chat, stats
from truthward.branches import Item
from truthward.console import progress
from truthward.errors import UserError
from truthward.principles import Principle
from truthward.records import Question
from truthward.score import answer_sums

METHODS = ("contrast", "likelihood")
CHANCE = 0.5


@dataclass(frozen=True)
class Case:
    """A prompt, its candidate answers, and the principles they are judged by."""

    prompt: str
    answers: list[str]
    principles: list[Principle]


class Judge:
    """A chat model that scores answers by one method."""

    def __init__(self, model: Any, tokenizer: Any, method: str = "likelihood") -> None:
        self.model, self.tokenizer, self.method = model, tokenizer, method

    def scores(self, cases: list[Case], description: str = "judging") -> list[list[float]]:
        """Mean score a token of every answer, averaged over the case's principles (nats)."""
        follow = self.under("follow", cases, description)
        if self.method == "likelihood":
            return follow
        return _minus(follow, self.under("violate", cases, description))

    def under(self, side: str, cases: list[Case], description: str) -> list[list[float]]:
        """log p a token of each answer under one side's system prompts, averaged over principles."""
        items, owners = [], []
        for index, case in enumerate(cases):
            answers = [chat.answer_ids(self.tokenizer, a) for a in case.answers]
            for principle in case.principles:
                system = principle.follow if side == "follow" else principle.violate
                items.append(Item(chat.prompt_ids(self.tokenizer, chat.user(case.prompt, system)), answers))
                owners.append(index)
        with progress() as bar:
            task = bar.add_task(f"{description} ({side})", total=len(items))
            sums = answer_sums(self.model, items, tick=lambda n: bar.advance(task, n))
        means = [[0.0] * len(case.answers) for case in cases]
        for item, owner, row in zip(items, owners, sums, strict=True):
            for k, value in enumerate(row):
                means[owner][k] += value / len(item.answers[k]) / len(cases[owner].principles)
        return means


def measure(
    model: Any,
    tokenizer: Any,
    questions: list[Question],
    principles: list[Principle],
    how_many: int,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Accuracy of every method on matched true and false answers, with intervals over questions.

    Returns:
        ``methods`` (accuracy, and refused where the interval does not clear chance) and ``chosen``, the best of them.
    """
    draw = random.Random(seed)
    cases = [Case(q.question, [*q.true, *q.false], pick(principles, how_many, draw)) for q in questions]
    judge = Judge(model, tokenizer)
    follow, violate = (judge.under(side, cases, "qualifying") for side in ("follow", "violate"))
    methods: dict[str, dict[str, Any]] = {}
    for method, scores in zip(METHODS, (_minus(follow, violate), follow), strict=True):
        right, owners = list[float](), list[str]()
        for question, row in zip(questions, scores, strict=True):
            wins = stats.pair_wins(row, row[len(question.true) :])
            right += wins
            owners += [question.id] * len(wins)
        accuracy = stats.mean_interval(right, clusters=owners, resamples=resamples, seed=seed)
        methods[method] = {"accuracy": accuracy.as_dict(), "refused": accuracy.low <= CHANCE}
    return {"methods": methods, "chosen": max(methods, key=lambda m: methods[m]["accuracy"]["mean"])}


def _minus(a: list[list[float]], b: list[list[float]]) -> list[list[float]]:
    return [[x - y for x, y in zip(row, other, strict=True)] for row, other in zip(a, b, strict=True)]


def require_qualified(record: dict[str, Any]) -> None:
    """Stop when even the best method is not shown to be better than chance.

    Raises:
        UserError: no method's interval lies above chance.
    """
    if record["methods"][record["chosen"]]["refused"]:
        rows = record["methods"].items()
        text = ", ".join(f"{m} {r['accuracy']['mean']:.3f} (interval from {r['accuracy']['low']:.3f})" for m, r in rows)
        raise UserError(
            f"no judge clears chance on the labelled pairs: {text}",
            where="constitution",
            fix='use a stronger constitution.parent, or leave "constitution" out of preferences and stages',
        )


def pick(principles: list[Principle], how_many: int, draw: random.Random) -> list[Principle]:
    """Different principles, drawn by weight."""
    left, chosen = list(principles), list[Principle]()
    while left and len(chosen) < how_many:
        (one,) = draw.choices(left, weights=[p.weight for p in left])
        left.remove(one)
        chosen.append(one)
    return chosen


def soft_label(difference: float, temperature: float) -> float:
    """Probability that the first of two answers is better, from the difference of their scores."""
    return 1 / (1 + math.exp(-max(-60.0, min(60.0, difference / temperature))))
