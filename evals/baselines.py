"""What style alone would score: answers judged without their question or any knowledge.

Each baseline learns on all topics but one and is scored on that one (length has nothing to learn). A bank on which one of
them does well can be won without knowing anything, so they stand beside every model's numbers.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable

from evals.truth import METRICS, score_question
from truthward.records import Question

Features = Callable[[str], list[str]]


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.casefold())


def first_word(text: str) -> list[str]:
    return words(text)[:1]


def style_baselines(questions: list[Question]) -> dict[str, dict[str, float]]:
    """Mean MC1, MC2 and pairs of each baseline over the questions."""
    return {
        "longest answer": _means([[float(len(a)) for a in q.true + q.false] for q in questions], questions),
        "shortest answer": _means([[-float(len(a)) for a in q.true + q.false] for q in questions], questions),
        "first word": _learned(questions, first_word),
        "bag of words": _learned(questions, words),
    }


def _learned(questions: list[Question], features: Features) -> dict[str, float]:
    scores: dict[str, list[float]] = {}
    for topic in sorted({q.topic for q in questions}):
        judge = _naive_bayes([q for q in questions if q.topic != topic], features)
        scores |= {q.id: [judge(a) for a in q.true + q.false] for q in questions if q.topic == topic}
    return _means([scores[q.id] for q in questions], questions)


def _naive_bayes(questions: list[Question], features: Features) -> Callable[[str], float]:
    """log odds of true against false by the words of an answer, add-one smoothed."""
    true = Counter(f for q in questions for a in q.true for f in features(a))
    false = Counter(f for q in questions for a in q.false for f in features(a))
    total = math.log((sum(true.values()) + 1) / (sum(false.values()) + 1))
    return lambda answer: sum(math.log((true[f] + 1) / (false[f] + 1)) - total for f in features(answer))


def _means(scores: list[list[float]], questions: list[Question]) -> dict[str, float]:
    rows = [score_question(q, s) for q, s in zip(questions, scores, strict=True)]
    return {m: round(sum(getattr(r, m) for r in rows) / len(rows), 4) for m in METRICS}
