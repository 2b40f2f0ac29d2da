"""Worked examples of critique and revision, which may stand before a request (Bai et al. 2022, section 3.1)."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationInfo, field_validator

from truthward.errors import UserError
from truthward.principles import Text, Word, plain
from truthward.reading import read_toml
from truthward.records import Row, validated


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
    if not os.path.isfile(path):
        raise UserError("there is no such file", where=str(path), fix="give the path of a TOML file with examples")
    tree = read_toml(path)
    if unknown := sorted(tree.keys() - {"example"}):
        raise UserError(f"unknown key {unknown[0]}", where=str(path), fix="a file of examples holds [[example]] tables")
    tables = tree.get("example", [])
    if not isinstance(tables, list):
        raise UserError("example is not a list of tables", where=str(path), fix="head each one with [[example]]")
    return tables


def words(text: str) -> list[str]:
    """Words without case and punctuation; an apostrophe within a word is part of it."""
    return re.findall(r"\w+(?:'\w+)*", text.casefold().replace("’", "'"))
