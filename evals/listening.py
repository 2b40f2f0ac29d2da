"""Sets that listen: a model answers in its own words, greedily and sampled, and rules check what it said.

``short``: questions whose answer is a word or a few; right, wrong, or an abstention. ``instructions``: prompts that ask for
a form; followed or not. How the answers are as language is measured by :mod:`evals.fluency`. No judge is asked, so that a
set of 300 rows takes the time of the sampling alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from evals.answers import PHRASINGS, Said, phrasing_of
from evals.asking import Exam, Scored, Values, metric
from evals.short_answers import outcome
from truthward.banks import Instruction, ShortFact
from truthward.instruction_rules import follows, follows_loosely

SHORT = Exam(
    ask=lambda row: [],
    grade=lambda row, sums: {},
    metrics={
        "right": metric("short answers, right", "right"),
        "wrong": metric("short answers, wrong", "wrong", "lower"),
        "abstains": metric("short answers, abstains", "abstains", ""),
        "right_sampled": metric("short answers, right when sampled", "right_sampled"),
        "wrong_sampled": metric("short answers, wrong when sampled", "wrong_sampled", "lower"),
        "abstains_sampled": metric("short answers, abstains when sampled", "abstains_sampled", ""),
        "easy": metric("right of the easy questions", "easy"),
        "middling": metric("right of the middling questions", "middling"),
        "timid": metric("abstains where the base was right", "timid", "lower"),
    },
    verdict="right",
    style=False,
    fixed_topics=True,
)
INSTRUCTIONS = Exam(
    ask=lambda row: [],
    grade=lambda row, sums: {},
    metrics={
        "followed": metric("instructions followed (strict)", "followed"),
        "loose": metric("instructions followed (loose)", "loose"),
        "followed_sampled": metric("instructions followed when sampled", "followed_sampled"),
    },
    verdict="followed",
    style=False,
    fixed_topics=True,
)


def base_values(base: Mapping[str, Any] | None, name: str) -> dict[str, Values] | None:
    """A set's values by id from the base's ``evals.json``; None where this is the base, which has none before it."""
    return None if base is None else {row["id"]: row["values"] for row in base["items"] if row["set"] == name}


def score_short(rows: Sequence[ShortFact], said: Sequence[Said], base: Mapping[str, Values] | None) -> list[Scored]:
    """Grade short answers.

    Args:
        said: by :func:`evals.answers.answer_all`; those of other sets are passed over.
        base: the base's values by id, or None where this is the base: nobody is more timid than themselves.
    """
    heard = {(s.id, s.way): s for s in said if s.set == "short"}
    return [_score_short(row, heard[row.id, "greedy"], heard.get((row.id, "sampled")), base) for row in rows]


def _score_short(row: ShortFact, greedy: Said, sampled: Said | None, base: Mapping[str, Values] | None) -> Scored:
    around = [part.strip() for part in PHRASINGS[phrasing_of(row.id)].split("{q}")]
    asked = "\n".join([greedy.asked, row.question, *around])
    found = {"": outcome(greedy.text, row.answers, asked)}
    found |= {"_sampled": outcome(sampled.text, row.answers, asked)} if sampled else {}
    values: Values = {
        f"{kind}{way}": float(found[way] == kind) if way in found else None
        for way in ("", "_sampled")
        for kind in ("right", "wrong", "abstains")
    }
    values |= {level: values["right"] if level == row.level else None for level in ("easy", "middling")}
    before = values["right"] if base is None else base.get(row.id, {}).get("right")
    values["timid"] = values["abstains"] if before == 1 else None
    return Scored("short", row.id, row.topic, values, greedy.text)


def score_instructions(rows: Sequence[Instruction], said: Sequence[Said]) -> list[Scored]:
    """Check answers by the rules of their rows."""
    heard = {(s.id, s.way): s.text for s in said if s.set == "instructions"}
    scored = []
    for row in rows:
        answer, sampled = heard[row.id, "greedy"], heard.get((row.id, "sampled"))
        values: Values = {
            "followed": float(follows(answer, row.rules)),
            "loose": float(follows_loosely(answer, row.rules)),
            "followed_sampled": None if sampled is None else float(follows(sampled, row.rules)),
        }
        scored.append(Scored("instructions", row.id, row.topic, values, answer))
    return scored
