"""Critique and revision (Bai et al. 2022, arXiv 2212.08073, section 3.1), and the checks that a revision must pass.

Worked examples stand before a request as earlier turns of the same conversation, each asked in the very words of the
request, so that a small model sees the form it has to keep to.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from truthward import chat
from truthward.examples import Example, words
from truthward.principles import Principle

LEAKS = ("critique", "the principle", "revised answer", "rewrite", "this answer")
COPIED = 8  # words in a row that two texts hardly share by chance


def _one_of(*patterns: str) -> str:
    return f"(?:{'|'.join(patterns)})"


# How a refusal opens. "I can't know that", "I can't help laughing", "I won't lie to you" go on otherwise, and are answers.
LEADS = _one_of(
    r"i(?:'m| am)(?: \w+)? sorry",
    r"as an ai(?: \w+){0,2}",
    "sorry|i apologi[sz]e|(?:my )?apologies|unfortunately|no|but",
)
UNABLE = _one_of(
    "i (?:can't|can ?not|couldn't|could not|won't|will not|wouldn't|would not)",
    "i(?:'m| am) (?:not able|not allowed|not going|unable) to",
)
TASKS = _one_of(
    r"help(?! but| \w+ing)",
    "assist|comply|support|condone|encourage|participate|engage|take part|discuss|do (?:that|this|it)",
    r"(?:give|provide|offer|share)(?: \w+){0,3} (?:advice|help|assistance|instructions|guidance|information)",
    r"(?:answer|write|create) (?:that|this|such)(?: \w+)?(?=[.!;]|$)",
)
OUTRIGHT = _one_of(
    "i (?:must|have to) (?:decline|refuse)",
    "i (?:decline|prefer not) to",
    "i(?:'d| would) (?:rather|prefer) not",
    "i(?:'m| am) not comfortable",
    "(?:that|this|it)(?:'s| is) (?:nothing|not something) (?:that )?i can (?:help|assist|do)",
)
REFUSAL = re.compile(rf"(?:{LEADS}[\s,.;:!-]+)*(?:{UNABLE} {TASKS}|{OUTRIGHT})\b")


# ------------------------------------------------------------------------------------------------------------ requests


def pick_shots(examples: Sequence[Example], principle: Principle, how_many: int, draw: random.Random) -> list[Example]:
    """Those that share most tags with the principle, the nearest last, where a model heeds it most; ties by ``draw``."""
    order = draw.sample(examples, len(examples))
    order.sort(key=lambda e: -len(set(e.tags) & set(principle.tags)))
    return order[:how_many][::-1]


def critique_request(prompt: str, answer: str, principle: Principle, shots: Sequence[Example] = ()) -> list[dict[str, str]]:
    """What the model is asked in order to criticise an answer: messages, the last of them the user's."""
    request = "Question: {}\nAnswer: {}\n\n{} {}".format
    asked = principle.text, principle.critique
    shown = [(request(s.prompt, s.answer, *asked), s.critique) for s in shots]
    return _conversation(shown, request(prompt, answer, *asked))


def revision_request(
    prompt: str, answer: str, critique: str, principle: Principle, shots: Sequence[Example] = ()
) -> list[dict[str, str]]:
    """What the model is asked in order to revise an answer: messages, the last of them the user's."""
    request = "Question: {}\nAnswer: {}\nCritique: {}\n\n{} {}".format
    asked = principle.text, principle.revision
    shown = [(request(s.prompt, s.answer, s.critique, *asked), s.revision) for s in shots]
    return _conversation(shown, request(prompt, answer, critique, *asked))


def _conversation(shown: list[tuple[str, str]], asked: str) -> list[dict[str, str]]:
    turns = [turn for text, reply in shown for turn in (*chat.user(text), {"role": "assistant", "content": reply})]
    return turns + chat.user(asked)


# -------------------------------------------------------------------------------------------------------------- checks


def fault(answer: str, revision: str, finished: bool, shots: Sequence[Example] = (), *, may_refuse: bool = False) -> str:
    """Why a revision cannot be used, or an empty string.

    Args:
        answer: what was revised.
        finished: the revision ended by itself.
        shots: the examples that stood before the request.
        may_refuse: the principle asks for a refusal where the answer gave none (those on harm do).
    """
    if not re.search(r"\w", revision):
        return "empty"
    if not finished:
        return "did not end"
    if words(answer) == words(revision):
        return "unchanged"
    if repeats(revision):
        return "repeats itself"
    if any(leak in revision.casefold() for leak in LEAKS):
        return "speaks of the critique"
    if not may_refuse and refuses(revision) and not refuses(answer):
        return "refuses"
    if any(shared_run(revision, text) >= COPIED for shot in shots for text in (shot.critique, shot.revision)):
        return "copies an example"
    return ""


def repeats(text: str, span: int = 4) -> bool:
    """Whether any run of ``span`` words comes back three times."""
    said = words(text)
    runs = [tuple(said[i : i + span]) for i in range(len(said) - span + 1)]
    return any(runs.count(run) >= 3 for run in set(runs))


def refuses(text: str) -> bool:
    """Whether an answer opens as a refusal to help: "Sorry, but I can't help with that", "I must decline".

    Only the opening counts. Saying plainly what is not known or what an AI has not got ("I can't know that", "As an AI, I
    don't sleep") is an answer, and so is a refusal spoken of later ("Tell him that you won't help").
    """
    return REFUSAL.match(text.casefold().replace("’", "'").strip(" \n\"'*")) is not None


def shared_run(a: str, b: str) -> int:
    """Length in words of the longest run that stands in both texts."""
    longest, before = 0, dict[int, int]()
    other = words(b)
    for word in words(a):
        ending = {k: before.get(k - 1, 0) + 1 for k, w in enumerate(other) if w == word}
        longest, before = max(longest, *ending.values(), 0), ending
    return longest
