"""The constitution: principles with every text that a stage shows a model, read from TOML files and checked.

A file holds ``[[principle]]`` tables, and may hold one ``[persona]`` table; then each of its principles must carry the tag
``persona``. Texts are shown to the model as they stand: none of them may hold a placeholder in braces.
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from truthward.errors import UserError
from truthward.ledger import Run, write_text
from truthward.reading import read_toml
from truthward.records import Row, validated

TEXTS = ("text", "critique", "revision", "follow", "violate")  # what a model reads; a change of one is a new version
APART = 0.25  # share of the longer one by which follow and violate may differ in length
WORD = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
COPIES = "principles"  # folder of a constitution run with its own copies of the files that it was given, byte for byte


def _text(value: str) -> str:
    if not value.strip():
        raise ValueError("the text is empty")
    if placeholder := re.search(r"\{[^{}]*\}", value):
        raise ValueError(f"unknown placeholder {placeholder[0]}: no stage fills it, the text is shown as it stands")
    return value


def _word(value: str) -> str:
    if not WORD.fullmatch(value):
        raise ValueError(f"{value!r} is not lower-case words joined by hyphens, as in no-stereotypes")
    return value


Text = Annotated[str, AfterValidator(_text)]
Word = Annotated[str, AfterValidator(_word)]


class Principle(Row):
    """One principle of the constitution.

    Attributes:
        version: raised by one with every change of a text that a model reads (``TEXTS``).
        follow, violate: system prompts under which an answer keeps the principle, and breaks it.
        weight: how often it is drawn, against the sum of all weights.
        why: what it is there for; the only text beside the title that no model reads.
    """

    id: Word
    version: int = Field(ge=1)
    title: Text
    text: Text
    critique: Text
    revision: Text
    follow: Text
    violate: Text
    weight: float = Field(1.0, gt=0, allow_inf_nan=False)
    tags: list[Word] = []
    why: Text

    @field_validator("violate")
    @classmethod
    def _is_not_follow(cls, violate: str, info: ValidationInfo) -> str:
        if "follow" in info.data and plain(violate) == plain(info.data["follow"]):
            raise ValueError("it is the same as follow, so that no answer could keep one and break the other")
        return violate


class Reasons(Row):
    """Why a persona is as it is."""

    voice: Text
    humour: Text
    limits: Text


class Persona(Row):
    """Whom the model speaks as: how it sounds, what it jokes about, what it never does."""

    name: Text
    voice: Text
    humour: Text
    limits: Text
    why: Reasons


class Constitution(NamedTuple):
    """What its files hold."""

    principles: list[Principle]
    persona: Persona | None


def read_principles(*paths: str | Path) -> list[Principle]:
    """The principles of one or several files, which together make one constitution, in order.

    Raises:
        UserError: the first fault; names file, principle and key.
    """
    return read_constitution(*paths).principles


def read_constitution(*paths: str | Path) -> Constitution:
    """Principles and persona of one or several files.

    Raises:
        UserError: as :func:`read_principles`, or a second persona.
    """
    files = [_read(Path(path)) for path in paths]
    _require_distinct([pair for _, placed in files for pair in placed])
    personas = [persona for persona, _ in files if persona]
    if len(personas) > 1:
        raise UserError(
            "a second [persona]", where=str(paths[-1]), fix="a model speaks as one persona; leave the others out"
        )
    return Constitution([principle for _, placed in files for _, principle in placed], next(iter(personas), None))


def read_persona(path: str | Path) -> tuple[Persona, list[Principle]]:
    """A persona and the principles that keep the model to it.

    Raises:
        UserError: as :func:`read_principles`, or there is no ``[persona]`` table.
    """
    principles, persona = read_constitution(path)
    if persona is None:
        raise UserError("no [persona] table", where=str(path), fix="see constitution/persona.toml for one")
    return persona, principles


def keep_copies(paths: list[str], run: Path) -> None:
    """Put a constitution's files into a run directory, numbered in their order; their bytes keep their hashes."""
    for number, path in enumerate(paths, 1):
        write_text(run / COPIES / f"{number}-{Path(path).name}", Path(path).read_bytes().decode())


def located(path: str | Path) -> list[Path]:
    """A constitution's files: ``path`` itself, or a constitution run's own copies in order.

    Raises:
        UserError: a directory that is no run of the constitution, or that keeps no copies.
    """
    path = Path(path)
    if not path.is_dir():
        return [path]
    run = Run.load(path)
    if run.manifest.get("stage") != "constitution":
        raise UserError("not a run of the constitution stage", where=str(path), fix="name a constitution-… directory")
    copies = sorted((path / COPIES).glob("*.toml"), key=lambda p: int(p.name.partition("-")[0]))
    if not copies:
        raise UserError(f"the run keeps no {COPIES}", where=str(path), fix="name the TOML files that it was given")
    return copies


def advice(principles: list[Principle]) -> list[str]:
    """What is allowed and yet likely to mislead a judge, one sentence each."""
    found, seen = [], dict[tuple[str, str], str]()
    for p in principles:
        long, short = sorted((len(p.follow), len(p.violate)), reverse=True)
        if long - short > APART * long:
            lengths = f"follow has {len(p.follow)} characters, violate {len(p.violate)}"
            found.append(f"{p.id}: {lengths}; a judge could tell the answers by form")
        for key in TEXTS:
            first = seen.setdefault((key, plain(getattr(p, key))), p.id)
            if first != p.id:
                found.append(f"{p.id}: {key} is the same as that of {first}")
    return found


def plain(text: str) -> str:
    """A text without what makes no difference to a reader: case and spacing."""
    return " ".join(text.casefold().split())


def _tree(path: Path) -> dict[str, Any]:
    if not os.path.isfile(path):
        raise UserError("there is no such file", where=str(path), fix="give the path of a TOML file with principles")
    return read_toml(path)


def _read(path: Path) -> tuple[Persona | None, list[tuple[str, Principle]]]:
    """A file's persona, and its principles, each with where it stands."""
    tree = _tree(path)
    if unknown := sorted(tree.keys() - {"principle", "persona"}):
        fix = "a constitution holds [[principle]] tables and at most one [persona] table"
        raise UserError(f"unknown key {unknown[0]}", where=str(path), fix=fix)
    tables = tree.get("principle", [])
    if not isinstance(tables, list):
        raise UserError("principle is not a list of tables", where=str(path), fix="head each one with [[principle]]")
    if not tables:
        raise UserError("no [[principle]] tables", where=str(path), fix="see constitution/principles.toml for some")
    persona = validated(tree["persona"], Persona, f"{path}: persona") if "persona" in tree else None
    placed = []
    for number, table in enumerate(tables, 1):
        name = str(table.get("id", "")) if isinstance(table, dict) else ""
        where = f"{path}: principle {number}" + (f" ({name})" if WORD.fullmatch(name) else "")
        placed.append((where, validated(table, Principle, where)))
    for where, principle in placed:
        if persona and "persona" not in principle.tags:
            raise UserError("tags: not tagged persona", where=where, fix='a persona\'s principles have tags = ["persona"]')
    return persona, placed


def _require_distinct(placed: list[tuple[str, Principle]]) -> None:
    ids, texts = dict[str, str](), dict[str, str]()
    for where, p in placed:
        if p.id in ids:
            raise UserError(f"id: used twice, first by {ids[p.id]}", where=where, fix="give each principle its own id")
        if plain(p.text) in texts:
            fix = "say what sets them apart, or raise the weight of one"
            raise UserError(f"text: the same as that of {texts[plain(p.text)]}", where=where, fix=fix)
        ids[p.id] = texts[plain(p.text)] = where
    if not math.isfinite(sum(p.weight for _, p in placed)):
        raise UserError("weight: the sum is not finite", where=placed[-1][0], fix="make all weights smaller alike")
