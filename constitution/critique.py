"""Critique and revision (Bai et al. 2022, arXiv 2212.08073, section 3.1), and the checks that a revision must pass.

Worked examples stand before a request as earlier turns of the same conversation, each asked in the very words of the
request, so that a small model sees the form it has to keep to.
"""

from __future__ import annotations

import random
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationInfo, field_validator

from truthward import chat
from truthward.errors import UserError
from truthward.principles import Principle, Text, Word, plain
from truthward.records import Row, validated

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


class Example(Row):
    """An answer with a fault, what is said of it, and how it is mended.

    Attributes:
        tags: those of the principles that it goes with.
    """

    prompt: Text
    answer: Text
    critique: Text
    revision: Text
    tags: list[Word] = Field(min_length=1)

    @field_validator("revision")
    @classmethod
    def _differs(cls, revision: str, info: ValidationInfo) -> str:
        if "answer" in info.data and words(revision) == words(info.data["answer"]):
            raise ValueError("it is the same as the answer, so that it shows nothing")
        return revision


# ------------------------------------------------------------------------------------------------------------ examples


def read_examples(path: str | Path) -> list[Example]:
    """The examples of a TOML file, in order.

    Raises:
        UserError: the first fault; names file, example and key.
    """
    path = Path(path)
    tables = _tables(path)
    if not tables:
        raise UserError("no [[example]] tables", where=str(path), fix="see constitution/examples.toml for some")
    examples, seen = [], dict[str, int]()
    for number, table in enumerate(tables, 1):
        where = f"{path}: example {number}"
        examples.append(validated(table, Example, where))
        first = seen.setdefault(plain(examples[-1].prompt), number)
        if first != number:
            fix = "ask something else in one of the two"
            raise UserError(f"prompt: the same as that of example {first}", where=where, fix=fix)
    return examples


def _tables(path: Path) -> list[Any]:
    if not path.is_file():
        raise UserError("there is no such file", where=str(path), fix="give the path of a TOML file with examples")
    try:
        tree = tomllib.loads(path.read_bytes().decode())
    except (ValueError, RecursionError) as error:  # also of integers and brackets beyond what Python reads
        raise UserError(f"not valid TOML: {error}", where=str(path), fix="mend the line it names") from error
    if unknown := sorted(tree.keys() - {"example"}):
        raise UserError(f"unknown key {unknown[0]}", where=str(path), fix="a file of examples holds [[example]] tables")
    tables = tree.get("example", [])
    if not isinstance(tables, list):
        raise UserError("example is not a list of tables", where=str(path), fix="head each one with [[example]]")
    return tables


def pick_shots(examples: Sequence[Example], principle: Principle, how_many: int, draw: random.Random) -> list[Example]:
    """Those that share most tags with the principle, the nearest last, where a model heeds it most; ties by ``draw``."""
    order = draw.sample(examples, len(examples))
    order.sort(key=lambda e: -len(set(e.tags) & set(principle.tags)))
    return order[:how_many][::-1]


# ------------------------------------------------------------------------------------------------------------ requests


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


def words(text: str) -> list[str]:
    """Words without case and punctuation; an apostrophe within a word is part of it."""
    return re.findall(r"\w+(?:'\w+)*", text.casefold().replace("’", "'"))
