"""Critique and revision (Bai et al. 2022, arXiv 2212.08073, section 3.1), and the checks a revision must pass."""

from __future__ import annotations

import re

from truthward import chat
from truthward.principles import Principle

LEAKS = ("critique", "the principle", "revised answer", "rewrite", "this answer")


def critique_request(prompt: str, answer: str, principle: Principle) -> list[dict[str, str]]:
    """What the model is asked in order to criticise an answer."""
    return chat.user(f"Question: {prompt}\nAnswer: {answer}\n\n{principle.text} {principle.critique}")


def revision_request(prompt: str, answer: str, critique: str, principle: Principle) -> list[dict[str, str]]:
    """What the model is asked in order to revise an answer."""
    return chat.user(f"Question: {prompt}\nAnswer: {answer}\nCritique: {critique}\n\n{principle.text} {principle.revision}")


def fault(answer: str, revision: str, finished: bool) -> str:
    """Why a revision cannot be used, or an empty string."""
    if not re.search(r"\w", revision):
        return "empty"
    if not finished:
        return "did not end"
    if _same(answer, revision):
        return "unchanged"
    if repeats(revision):
        return "repeats itself"
    if any(leak in revision.casefold() for leak in LEAKS):
        return "speaks of the critique"
    return ""


def repeats(text: str, span: int = 4) -> bool:
    """Whether any run of ``span`` words comes back three times."""
    words = text.casefold().split()
    runs = [tuple(words[i : i + span]) for i in range(len(words) - span + 1)]
    return any(runs.count(run) >= 3 for run in set(runs))


def _same(a: str, b: str) -> bool:
    return re.sub(r"\W+", " ", a.casefold()).strip() == re.sub(r"\W+", " ", b.casefold()).strip()
