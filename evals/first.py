"""What a model says to the questions that people ask first: for reading, beside scores that hear none of its sentences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from evals.asking import answer_freely
from truthward.records import Prompt

MAX_NEW_TOKENS = 64
TEMPERATURE = 0.7


def answers(model: Any, tokenizer: Any, questions: Sequence[Prompt]) -> list[dict[str, str]]:
    """The most likely answer to each question and one sample, the same at every call with the same model."""
    asked = [q.prompt for q in questions]
    greedy, sampled = (answer_freely(model, tokenizer, asked, MAX_NEW_TOKENS, t) for t in (0.0, TEMPERATURE))
    return [
        {"prompt": q.prompt, "kind": q.kind, "greedy": g, "sampled": s}
        for q, g, s in zip(questions, greedy, sampled, strict=True)
    ]
