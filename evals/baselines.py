"""What style alone would score: answers judged without their question or any knowledge.

The first-word and bag-of-words judges learn on the bank that training learns from, so they hold what training could have
picked up of style. They stand beside every model's numbers; and the pairs in which the bag of words points to the false
answer show whether a gain is more than style.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable

from evals.truth import METRICS, Style, score_question
from truthward.records import Question


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.casefold())


def first_word(text: str) -> list[str]:
    return words(text)[:1]


def learn_style(questions: list[Question], features: Callable[[str], list[str]] = words) -> Style:
    """Naive Bayes: log odds of true against false by the features of an answer, add-one smoothed."""
    true = Counter(f for q in questions for a in q.true for f in features(a))
    false = Counter(f for q in questions for a in q.false for f in features(a))
    total = math.log((sum(true.values()) + 1) / (sum(false.values()) + 1))
    return lambda answer: sum(math.log((true[f] + 1) / (false[f] + 1)) - total for f in features(answer))


def style_baselines(questions: list[Question], style_bank: list[Question]) -> dict[str, dict[str, float]]:
    """Mean MC1, MC2 and pairs of each judge over the questions."""
    judges: dict[str, Style] = {
        "longest answer": lambda answer: float(len(answer)),
        "shortest answer": lambda answer: -float(len(answer)),
        "first word": learn_style(style_bank, first_word),
        "bag of words": learn_style(style_bank),
    }
    return {name: _means(questions, judge) for name, judge in judges.items()}


def _means(questions: list[Question], judge: Style) -> dict[str, float]:
    rows = [score_question(q, [judge(a) for a in q.true + q.false], judge) for q in questions]
    return {m: round(sum(getattr(r, m) for r in rows) / len(rows), 4) for m in METRICS}
