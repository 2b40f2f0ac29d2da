"""JSON and TOML from files: values that the rest of the code can take, or one error that names the place.

Python reads more than can be worked with: integers of any size, numbers that are none, text that no file can hold,
brackets without end. Here it ends.
"""

from __future__ import annotations

import contextlib
import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from truthward.errors import UserError
from truthward.redaction import SURROGATE, holds_secret

DEPTH = 64  # most brackets within brackets
CONTROL = re.compile(r"[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        UserError: it is not there, is no file, or is not UTF-8.
    """
    try:
        return _bytes(path).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 text: {error}", where=str(path)) from error


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise UserError("there is no such file", where=str(path), fix="mend the path") from error
    except (ValueError, OSError) as error:
        what = (error.strerror if isinstance(error, OSError) else "") or str(error)
        raise UserError(f"it cannot be read: {what}", where=str(path), fix="mend the path") from error


def parse_json(text: str, where: str, fix: str = "") -> Any:
    """A JSON value.

    Raises:
        UserError: it is none, or holds what no result of ours can: see :func:`require_plain`.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not valid JSON: {error}", where=where, fix=fix) from error
    require_plain(value, where)
    return value


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file.

    Raises:
        UserError: it is not there, is none, or holds a key, a control character, or what :func:`require_plain` refuses.
    """
    try:
        tree = tomllib.loads(_bytes(path).decode())
    except (ValueError, RecursionError) as error:  # also of integers and brackets beyond what Python reads
        raise UserError(f"not valid TOML: {error}", where=str(path), fix="mend the line it names") from error
    require_plain(tree, str(path), written=True)
    return tree


@contextlib.contextmanager
def refused_pickles(where: str) -> Iterator[None]:
    """Turn torch's refusal of a file that is more than tensors and numbers (``weights_only``) into an error of ours.

    Raises:
        UserError: such a file was met within the block; nothing in it was run.
    """
    try:
        yield
    except UnpicklingError as error:
        what = "a file of this checkpoint holds more than tensors and numbers, and loading it could run code"
        raise UserError(what, where=where, fix="delete the checkpoint; the run goes on from the one before") from error


def require_plain(value: Any, where: str, *, written: bool = False) -> None:
    """Refuse what JSON and TOML can say and nothing here can take.

    Args:
        value: dictionaries, lists and scalars, as deep as may be.
        written: by hand; then a secret or a control character is refused too, and a number that is not finite is left to
            the check of its key.

    Raises:
        UserError: brackets too deep, an integer beyond 64 bits, a number that is not finite, half a surrogate pair.
    """
    todo: list[tuple[Any, tuple[Any, ...]]] = [(value, ())]
    while todo:
        one, place = todo.pop()
        if len(place) > DEPTH:
            raise UserError(f"brackets within brackets, more than {DEPTH} deep", where=where, fix="take some out")
        if isinstance(one, dict):
            todo += [(key, place) for key in one] + [(inner, (*place, key)) for key, inner in one.items()]
        elif isinstance(one, list):
            todo += [(inner, (*place, number)) for number, inner in enumerate(one)]
        elif fault := _fault(one, written):
            what, fix = fault
            raise UserError(what, where=": ".join(filter(None, [where, _named(place)])), fix=fix)


def _fault(value: Any, written: bool) -> tuple[str, str] | None:
    """What is wrong with a scalar and what to do about it; None where nothing is."""
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return "an integer beyond 64 bits", "take a smaller number"
    if isinstance(value, float) and not written and not abs(value) < float("inf"):
        return "a number that is not finite", "take a finite one, or null"
    if not isinstance(value, str):
        return None
    if SURROGATE.search(value):
        return "half a surrogate pair, which is no character", "write the character itself"
    if written and CONTROL.search(value):
        return f"the control character {CONTROL.findall(value)[0]!r}", "take it out"
    if written and holds_secret(value):
        return (
            "this looks like a key or a password, and what is written here is recorded with every result",
            "put it into an environment variable; for a judge's server name that one in judge.key_env",
        )
    return None


def _named(place: tuple[Any, ...]) -> str:
    """A place in dotted form, short, and without what must not be shown."""
    dotted = ".".join(map(str, place))
    return "" if holds_secret(dotted) else dotted[:80]
