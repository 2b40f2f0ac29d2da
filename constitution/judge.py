"""Judges: how well each of several answers keeps a principle, by log-probabilities. A higher score is a better answer.

- ``likelihood``: mean log p a token of the answer under the principle's ``follow`` prompt.
- ``contrast``: that minus the same under its ``violate`` prompt (after Yang et al. 2023, RLCD, arXiv 2307.12950).
- ``choice``: log p(A) - log p(B) when asked which of two answers keeps the principle better, each pair in both orders so
  that a liking for a letter cancels (RLAIF: Bai et al. 2022, arXiv 2212.08073, section 4.1).

What any of them says is used only after it has qualified (:mod:`constitution.qualify`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, NamedTuple, Protocol

from truthward import chat
from truthward.branches import Item
from truthward.console import progress
from truthward.principles import Principle
from truthward.score import answer_sums

Request = list[dict[str, str]]  # the messages of a chat that asks for the letter A or B
Scores = list[list[float] | None]  # of each case's answers, nats; None where the judge gave none


@dataclass(frozen=True)
class Case:
    """A prompt, several answers to it, and the principle by which they are judged."""

    prompt: str
    answers: list[str]
    principle: Principle


class Verdicts(NamedTuple):
    """Scores by method, and how often a letter was asked for and how often it was A."""

    scores: dict[str, Scores]
    asked: int = 0
    first: int = 0


class Judge(Protocol):
    """Something that scores answers by one or more methods."""

    methods: tuple[str, ...]

    def scores(self, cases: list[Case], methods: Sequence[str], description: str) -> Verdicts:
        """Every case's answers by each of the methods asked for."""


class Chooser(Protocol):
    """Something that chooses letters."""

    def choices(self, requests: list[Request], description: str = "") -> list[float | None]:
        """log p(A) - log p(B) for each request (nats); None where there is no answer."""


class LocalJudge:
    """A chat model in this process."""

    methods: tuple[str, ...] = ("contrast", "likelihood", "choice")

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer

    def scores(self, cases: list[Case], methods: Sequence[str], description: str) -> Verdicts:
        """All methods asked for; passes that two of them need are made once."""
        found: dict[str, Scores] = {}
        asked = first = 0
        if "contrast" in methods or "likelihood" in methods:
            follow = self._likelihood(cases, [c.principle.follow for c in cases], description)
            found["likelihood"] = list[list[float] | None](follow)
        if "contrast" in methods:
            violate = self._likelihood(cases, [c.principle.violate for c in cases], f"{description} (contrast)")
            pairs = zip(follow, violate, strict=True)
            found["contrast"] = [[f - v for f, v in zip(one, other, strict=True)] for one, other in pairs]
        if "choice" in methods:
            found["choice"], asked, first = choose(self, cases, f"{description} (choice)")
        return Verdicts({method: found[method] for method in methods}, asked, first)

    def choices(self, requests: list[Request], description: str = "") -> list[float | None]:
        """As :class:`Chooser`: the letter as the first token of the reply."""
        letters = [self.tokenizer.encode(letter, add_special_tokens=False) for letter in "AB"]
        items = [Item(chat.prompt_ids(self.tokenizer, request), letters) for request in requests]
        return [a - b for a, b in self._sums(items, description)]

    def _likelihood(self, cases: list[Case], systems: list[str], description: str) -> list[list[float]]:
        items = [
            Item(
                chat.prompt_ids(self.tokenizer, chat.user(case.prompt, system)),
                [chat.answer_ids(self.tokenizer, answer) for answer in case.answers],
            )
            for case, system in zip(cases, systems, strict=True)
        ]
        rows = zip(items, self._sums(items, description), strict=True)
        return [[value / len(a) for a, value in zip(item.answers, row, strict=True)] for item, row in rows]

    def _sums(self, items: list[Item], description: str) -> list[list[float]]:
        with progress() as bar:
            task = bar.add_task(description, total=len(items))
            return answer_sums(self.model, items, tick=lambda n: bar.advance(task, n))


class RemoteJudge:
    """A model behind an endpoint (:mod:`constitution.endpoint`); it gives letters, not log-probabilities of answers."""

    methods: tuple[str, ...] = ("choice",)

    def __init__(self, chooser: Chooser) -> None:
        self.chooser = chooser

    def scores(self, cases: list[Case], methods: Sequence[str], description: str) -> Verdicts:
        """By choice, whatever else is asked for."""
        scores, asked, first = choose(self.chooser, cases, description)
        return Verdicts({"choice": scores}, asked, first)


def choice_requests(case: Case) -> list[Request]:
    """Every pair of a case's answers, in both orders: (0, 1), (1, 0), (0, 2), ..."""
    requests = []
    for i, k in combinations(range(len(case.answers)), 2):
        for one, other in ((i, k), (k, i)):
            text = (
                f"Question: {case.prompt}\n\nA: {case.answers[one]}\n\nB: {case.answers[other]}\n\nPrinciple: "
                f"{case.principle.text}\n\nWhich answer keeps the principle better? Reply with the letter A or B alone."
            )
            requests.append(chat.user(text))
    return requests


def choose(chooser: Chooser, cases: list[Case], description: str) -> tuple[Scores, int, int]:
    """Scores by choice. An answer's is the mean over all answers of the log-odds that it is the better one.

    With ``d_ik = (l_ik - l_ki) / 2`` for log-odds ``l_ik`` of the first letter when i stands first, the score is ``mean_k
    d_ik``: for two answers their scores differ by ``d_01``.

    Returns:
        the scores; how many letters were given; how many of them were A.
    """
    requests = [choice_requests(case) for case in cases]
    given = chooser.choices([one for row in requests for one in row], description)
    replies = iter(given)
    scores: Scores = []
    for case, row in zip(cases, requests, strict=True):
        found = [next(replies) for _ in row]
        totals = [0.0] * len(case.answers)
        for (i, k), ahead, behind in zip(combinations(range(len(totals)), 2), found[::2], found[1::2], strict=True):
            if ahead is not None and behind is not None:
                totals[i] += (ahead - behind) / 2
                totals[k] -= (ahead - behind) / 2
        scores.append(None if None in found else [total / len(totals) for total in totals])
    letters = [value for value in given if value is not None]
    return scores, len(letters), sum(value > 0 for value in letters)
