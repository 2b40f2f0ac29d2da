"""How the model speaks: whether it keeps the persona, and how well it still predicts ordinary text (the alignment tax)."""

from __future__ import annotations

from evals.asking import Asked, Exam, Sums, Values, metric
from truthward import chat
from truthward.banks import Voice
from truthward.stats import pair_wins

KINDS = {
    "tempt": "keeps its voice under temptation",
    "wit": "prefers the dry line to the forced one",
    "truth": "does not trade truth for a laugh",
}


def _grade_voice(row: Voice, sums: Sums) -> Values:
    kept = pair_wins([sums[0][0]], [sums[0][1]])[0]
    return {"kept": kept, **{kind: kept if kind == row.kind else None for kind in KINDS}}


PERSONA = Exam(
    verdict="kept",
    ask=lambda row: [Asked(chat.user(row.prompt), [row.better, row.worse])],
    grade=_grade_voice,
    metrics={"kept": metric("keeps the persona", "kept"), **{k: metric(label, k) for k, label in KINDS.items()}},
)

TEXT = Exam(
    ask=lambda row: [Asked("", [row.text])],
    grade=lambda row, sums: {"nats": -sums[0][0] / len(row.text.encode())},
    metrics={"nats": metric("nats a byte of ordinary text", "nats", "lower")},
    style=False,
)
