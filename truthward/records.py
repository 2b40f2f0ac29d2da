"""Rows of data: what each kind holds, read with errors that name the file and line."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from truthward.errors import UserError
from truthward.ledger import write_text
from truthward.reading import parse_json, read_text
from truthward.redaction import clean


class Row(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Message(Row):
    role: Literal["system", "user", "assistant"]
    content: str = Field(min_length=1)


class Demonstration(Row):
    """A conversation whose last turn is the assistant's; that turn is what a model learns."""

    id: str
    kind: str = ""
    messages: list[Message] = Field(min_length=2)

    @model_validator(mode="after")
    def _ends_with_answer(self) -> Demonstration:
        if self.messages[-1].role != "assistant":
            raise ValueError("the last message must be the assistant's")
        return self


class Prompt(Row):
    id: str
    kind: str = ""
    prompt: str = Field(min_length=1)


class Question(Row):
    """A question with true and false answers; ``true[i]`` and ``false[i]`` are matched in first word and length.

    Attributes:
        manner: in careful words, or short and plain as people ask.
    """

    id: str
    topic: str
    kind: str
    question: str = Field(min_length=1)
    true: list[str] = Field(min_length=1)
    false: list[str] = Field(min_length=1)
    manner: Literal["careful", "plain"] = "careful"

    @model_validator(mode="after")
    def _answers_differ(self) -> Question:
        if set(self.true) & set(self.false):
            raise ValueError("an answer stands under both true and false")
        return self

    @property
    def asked(self) -> list[str]:
        """The text by which a leak into the training data is recognised."""
        return [self.question]


class Preference(Row):
    """Which of two answers is better, with what probability, and where that judgement came from.

    Attributes:
        probability: that ``chosen`` is the better one, in [0.5, 1] (a soft label).
        source: file or stage the row came from.
        principle, round, seed, model: for generated rows, what produced it.
    """

    prompt: str = Field(min_length=1)
    chosen: str = Field(min_length=1)
    rejected: str = Field(min_length=1)
    probability: float = Field(1.0, ge=0.5, le=1.0)
    source: str = ""
    principle: list[str] = []
    round: int = 0
    seed: int = 0
    model: str = ""


class Pair(Row):
    """A labelled pair: ``better`` keeps the principle, ``worse`` breaks it."""

    id: str = Field(min_length=1)
    principle: str = Field(min_length=1)
    prompt: str = Field(min_length=1)
    better: str = Field(min_length=1)
    worse: str = Field(min_length=1)

    @model_validator(mode="after")
    def _answers_differ(self) -> Pair:
        if self.better == self.worse:
            raise ValueError("better and worse are the same")
        return self


class Margin(Row):
    """What a preference model makes of a labelled pair: score of the better answer minus that of the worse one."""

    id: str
    principle: str
    margin: float


class Revision(Row):
    """One critique and revision of an answer (Bai et al. 2022, section 3.1), and whether it helped."""

    prompt_id: str
    prompt: str
    answer: str
    critique: str
    revision: str
    principle: str
    principle_version: int
    round: int
    seed: int
    model: str
    score_before: float | None
    score_after: float | None
    helped: bool
    why_not: str = ""


R = TypeVar("R", bound=Row)
T = TypeVar("T")


def read_rows(path: str | Path, kind: type[R]) -> list[R]:
    """All rows of a JSONL file, or of every ``*.jsonl`` of a directory in name order.

    Raises:
        UserError: missing, empty, or a line that is not such a row; names file, line and field.
    """
    path = Path(path)
    files = sorted(path.glob("*.jsonl")) if os.path.isdir(path) else [path]
    rows: list[R] = []
    for file in files:
        if not os.path.isfile(file):
            raise UserError("there is no such file", where=str(file), fix="mend the path in the recipe")
        for number, text in enumerate(read_text(file).split("\n"), 1):
            if text.strip():
                where = f"{file}:{number}"
                rows.append(validated(parse_json(text, where, "one JSON object a line"), kind, where))
    if not rows:
        raise UserError("no rows", where=str(path), fix=f"put {kind.__name__.lower()} rows there, one JSON object a line")
    return rows


def write_rows(path: Path, rows: list[Any]) -> None:
    """Write rows as JSONL, all or nothing, without the secrets that somebody may have said in them."""
    write_text(path, "".join(line(row) for row in rows))


def line(row: BaseModel) -> str:
    """A row as a line of JSONL, without the secrets that somebody may have said in it."""
    values = row.model_dump(mode="json")
    kept = clean(values, homes=True)
    return (row.model_dump_json() if kept == values else json.dumps(kept, ensure_ascii=False)) + "\n"


def validated(value: Any, kind: type[R], where: str) -> R:
    """A value as a row of its kind.

    Raises:
        UserError: it is none; names every key that is at fault.
    """
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'row'}: {_said(e)}" for e in error.errors())
        if all(e["type"] == "value_error" for e in error.errors()):  # our own rules say what is wanted
            raise UserError(faults, where=where, fix="mend what it names") from error
        fix = f"a {kind.__name__.lower()} has the keys {', '.join(kind.model_fields)}"
        raise UserError(faults, where=where, fix=fix) from error


def read_pairs(path: str, most: int) -> dict[str, list[Pair]]:
    """Labelled pairs by principle, at most so many of each: the first, in the order of the bank."""
    found: dict[str, list[Pair]] = {}
    for pair in read_rows(path, Pair):
        found.setdefault(pair.principle, []).append(pair)
    return {principle: pairs[:most] for principle, pairs in found.items()}


def read_demonstrations(paths: list[str]) -> list[Demonstration]:
    """Demonstrations and, from files named ``revisions*``, the revisions that helped."""
    rows: list[Demonstration] = []
    for path in paths:
        if Path(path).name.startswith("revisions"):
            rows += [
                Demonstration(
                    id=f"{r.prompt_id}/{r.round}",
                    kind="revision",
                    messages=[Message(role="user", content=r.prompt), Message(role="assistant", content=r.revision)],
                )
                for r in read_rows(path, Revision)
                if r.helped
            ]
        else:
            rows += read_rows(path, Demonstration)
    return rows


def truth_preferences(questions: list[Question], source: str, *, cross: bool = False) -> list[Preference]:
    """True answers against false ones: each with the one that matches it, or every true with every false (``cross``).

    Crossed pairs differ in length and first word, but over a question both sides have the same lengths and first words.
    """
    return [
        Preference(prompt=q.question, chosen=true, rejected=false, source=f"{source}/{q.id}")
        for q in questions
        for i, true in enumerate(q.true)
        for k, false in enumerate(q.false)
        if cross or i == k
    ]


def read_preferences(sources: list[str], constitution_run: Path | None, *, cross: bool = False) -> list[Preference]:
    """Preferences of truth banks (directories), files, and the ``constitution`` stage, in that order."""
    rows: list[Preference] = []
    for source in sources:
        if source == "constitution":
            if constitution_run is None:
                raise UserError("no constitution run", where="preferences", fix="run the constitution stage first")
            path = constitution_run / "preferences.jsonl"
            rows += read_rows(path, Preference) if path.stat().st_size else []
        elif Path(source).is_dir():
            rows += truth_preferences(read_rows(source, Question), source, cross=cross)
        else:
            rows += read_rows(source, Preference)
    if not rows:
        raise UserError("no preferences", where=", ".join(sources), fix="name a source that has some")
    return rows


def by_prompt(preferences: list[Preference]) -> list[list[Preference]]:
    """Preferences of the same prompt together, prompts in order of appearance."""
    groups: dict[str, list[Preference]] = {}
    for preference in preferences:
        groups.setdefault(preference.prompt, []).append(preference)
    return list(groups.values())


def draw(rows: list[T], limit: int, seed: int) -> list[T]:
    """At most ``limit`` rows in an order that depends on ``seed`` alone."""
    return random.Random(seed).sample(rows, min(limit, len(rows)))


def _said(error: ErrorDetails) -> str:
    return "unknown key" if error["type"] == "extra_forbidden" else error["msg"].removeprefix("Value error, ")
