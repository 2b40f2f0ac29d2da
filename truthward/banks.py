"""Rows of the evaluation banks, and what of them must never be trained on.

A bank is ``data/evals/<set>/<split>/``, one file a topic. How each was made stands in ``data/README.md``; what is asked and
how answers become scores stands in the modules of ``evals/``.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from truthward.instruction_rules import parameters_of
from truthward.recipe import bank_path, banked
from truthward.records import Question, Row, read_rows
from truthward.tables import BANK_OF, BANKLESS, Recipe

Kind = Literal["conflict", "stale", "absent", "distractor"]


class Bankrow(Row):
    id: str = Field(min_length=1)
    topic: str = Field(min_length=1)

    @property
    def asked(self) -> list[str]:
        """The texts by which a leak into the training data is recognised."""
        raise NotImplementedError


class Fact(Bankrow):
    """A question with one right and some wrong short answers, each of which can complete "The answer is ...".

    Attributes:
        field: who would pass for an expert, as in "I am a chemist"; empty where no expert is asked for.
        wrong: the most tempting one first.
    """

    field: str = ""
    question: str = Field(min_length=1)
    right: str = Field(min_length=1)
    wrong: list[str] = Field(min_length=1)

    @model_validator(mode="after")
    def _options_differ(self) -> Fact:
        if len({self.right, *self.wrong}) != 1 + len(self.wrong):
            raise ValueError("two options are the same")
        return self

    @property
    def asked(self) -> list[str]:
        return [self.question]


class Twins(Bankrow):
    """Two questions as alike as can be: one whose answer is known, one that nobody can answer without further facts."""

    known: str = Field(min_length=1)
    answer: str = Field(min_length=1)
    unknown: str = Field(min_length=1)
    guess: str = Field(min_length=1)

    @property
    def asked(self) -> list[str]:
        return [self.known, self.unknown]


class Situation(Bankrow):
    """Two people, a question that the context leaves open, and two sentences either of which settles it.

    Attributes:
        target: whom a stereotype would name; ``other`` is the other one.
        for_target, for_other: put after the context, makes that one the answer.
    """

    kind: Literal["negative", "positive"]
    context: str = Field(min_length=1)
    question: str = Field(min_length=1)
    target: str = Field(min_length=1)
    other: str = Field(min_length=1)
    for_target: str = Field(min_length=1)
    for_other: str = Field(min_length=1)

    @property
    def asked(self) -> list[str]:
        return [f"{self.context} {self.question}"]


class Passage(Row):
    date: str = Field(pattern=r"^\d{4}-\d\d-\d\d$")
    text: str = Field(min_length=1)


class Dated(Bankrow):
    """A question to be answered from dated passages; ``cite`` is the number of the one that answers it, 0 when none does."""

    kind: Kind
    passages: list[Passage] = Field(min_length=1)
    question: str = Field(min_length=1)
    answer: str
    wrong: list[str] = Field(min_length=1)
    cite: int = Field(ge=0)

    @model_validator(mode="after")
    def _cites_what_is_there(self) -> Dated:
        if self.cite > len(self.passages):
            raise ValueError(f"cite {self.cite}, but there are {len(self.passages)} passages")
        if (self.kind == "absent") != (self.cite == 0) or (self.kind == "absent") != (not self.answer):
            raise ValueError("absent rows, and they alone, have no answer and cite 0")
        return self

    @property
    def asked(self) -> list[str]:
        return [self.question]


class Voice(Bankrow):
    """A prompt that tempts the persona, an answer that keeps it and one that does not."""

    kind: Literal["tempt", "wit", "truth"]
    prompt: str = Field(min_length=1)
    better: str = Field(min_length=1)
    worse: str = Field(min_length=1)

    @property
    def asked(self) -> list[str]:
        return [self.prompt]


class Prose(Bankrow):
    """A passage of ordinary text."""

    text: str = Field(min_length=1)

    @property
    def asked(self) -> list[str]:
        return [self.text]


class ShortFact(Bankrow):
    """A question whose answer is a word or a few, with every form of it that counts as right.

    Attributes:
        level: how many people would know it.
        answers: variants of the one right answer, the plainest first; case, marks and articles do not matter.
    """

    level: Literal["easy", "middling"]
    question: str = Field(min_length=1)
    answers: list[str] = Field(min_length=1)

    @model_validator(mode="after")
    def _answers_are_words(self) -> ShortFact:
        bare = [answer for answer in self.answers if not any(map(str.isalnum, answer))]
        if bare:
            raise ValueError(f"an answer without a letter or digit: {bare[0]!r}")
        if len({answer.casefold() for answer in self.answers}) < len(self.answers):
            raise ValueError("an answer stands there twice")
        return self

    @property
    def asked(self) -> list[str]:
        return [self.question]


class Instruction(Bankrow):
    """A prompt that asks for an answer of a certain form, with the rules that such an answer follows."""

    prompt: str = Field(min_length=1)
    rules: list[dict[str, Any]] = Field(min_length=1)

    @model_validator(mode="after")
    def _rules_are_known(self) -> Instruction:
        for rule in self.rules:
            parameters_of(rule)
        return self

    @property
    def asked(self) -> list[str]:
        return [self.prompt]


class Labelled(Bankrow):
    """A model's answer to a question, read and labelled, by which the judge of open answers is measured.

    Attributes:
        true, false: the answers that the truth bank has for the question.
        right: nothing that it claims of weight is false.
        informative: it answers the question, rightly or wrongly.
    """

    question: str = Field(min_length=1)
    true: list[str] = Field(min_length=1)
    false: list[str] = Field(min_length=1)
    answer: str = Field(min_length=1)
    right: bool
    informative: bool

    @property
    def asked(self) -> list[str]:
        return [self.question]


BANKS: dict[str, type[Row]] = {
    "truth": Question,
    "short": ShortFact,
    "instructions": Instruction,
    "facts": Fact,
    "unknown": Twins,
    "bias": Situation,
    "grounded": Dated,
    "persona": Voice,
    "skills": Fact,
    "text": Prose,
}


def read_bank(recipe: Recipe, name: str) -> list[Any]:
    """All rows that an eval set reads; none for a set without a bank.

    Raises:
        UserError: they are not there, or one is wrong.
    """
    return [] if name in BANKLESS else read_rows(bank_path(recipe, name), BANKS[BANK_OF.get(name, name)])


def tested_texts(recipe: Recipe) -> list[str]:
    """Every text that this recipe's evals ask about."""
    banks = {bank_path(recipe, name): name for name in ("truth", *banked(recipe.evals.sets))}
    return [text for name in banks.values() for row in read_bank(recipe, name) for text in row.asked]
