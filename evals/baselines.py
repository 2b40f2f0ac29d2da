"""What scores without knowledge: judges by style alone, and a model of random weights.

The first-word and bag-of-words judges learn on the bank that training learns from, so they hold what training could have
picked up of style. They stand beside every model's numbers; and the pairs in which the bag of words points to the false
answer show whether a gain is more than style.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from evals.asking import Exam
from evals.suite import judged, means
from evals.truth import Style
from truthward.records import Question


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.casefold())


def first_word(text: str) -> list[str]:
    return words(text)[:1]


def learn_style(questions: Sequence[Question], features: Callable[[str], list[str]] = words) -> Style:
    """Naive Bayes: log odds of true against false by the features of an answer, add-one smoothed."""
    true = Counter(f for q in questions for a in q.true for f in features(a))
    false = Counter(f for q in questions for a in q.false for f in features(a))
    total = math.log((sum(true.values()) + 1) / (sum(false.values()) + 1))
    return lambda answer: sum(math.log((true[f] + 1) / (false[f] + 1)) - total for f in features(answer))


def style_baselines(
    rows: Mapping[str, Sequence[Any]], by_name: Mapping[str, Exam], style_bank: Sequence[Question]
) -> dict[str, dict[str, float]]:
    """What each judge by style scores, by ``set.metric``, on the sets that can be won by style."""
    judges: dict[str, Style] = {
        "longest answer": lambda answer: float(len(answer)),
        "shortest answer": lambda answer: -float(len(answer)),
        "first word": learn_style(style_bank, first_word),
        "bag of words": learn_style(style_bank),
    }
    found: dict[str, dict[str, float]] = {}
    for name, judge in judges.items():
        found[name] = {}
        for own in (n for n in rows if by_name[n].style):
            found[name] |= means(judged(own, rows[own], by_name[own], judge), by_name[own], own)
    return found
