"""The terminal: one console, and progress bars with time left for everything over a few seconds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from rich.console import Console
from rich.errors import MarkupError
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.segment import Segment

from truthward import ranks
from truthward.redaction import without_secrets

ODD = re.compile(r"[\0-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufdd0\ufdd1]")
ASIDE = str.maketrans({"[": "\ufdd0", "\\": "\ufdd1"})  # no characters: what markup is made of is kept out of its sight
BACK = {ord(code): chr(sign) for sign, code in ASIDE.items()}
T = TypeVar("T")


def inert(text: str) -> str:
    """Text that cannot steer a terminal: U+FFFD in place of control characters (lines and tabs stay) and turned writing."""
    return ODD.sub("\N{REPLACEMENT CHARACTER}", text)


def plain(text: Any) -> str:
    """Somebody else's words in a line for :func:`say` or a cell of a table: brackets are brackets and no markup."""
    return inert(str(text)).translate(ASIDE)


class Inert(Console):
    """A console on which no text, whoever wrote it, does more than be read; its own styles stay."""

    def render(self, *arguments: Any, **options: Any) -> Iterator[Segment]:  # type: ignore[override]
        for segment in super().render(*arguments, **options):
            yield segment if segment.control else Segment(inert(segment.text.translate(BACK)), segment.style)


console = Inert(quiet=not ranks.first())
if not console.is_terminal:
    console = Inert(width=140, quiet=not ranks.first())  # a file has no width; tables fit on one line a row


def say(text: str) -> None:
    """A line with markup; somebody else's words in it go through :func:`plain`."""
    text = without_secrets(text)
    try:
        console.print(text, highlight=False, soft_wrap=True)
    except MarkupError:
        console.print(text, highlight=False, soft_wrap=True, markup=False)


def tell(text: str) -> None:
    """Somebody else's words as they stand, with nothing in them that works."""
    print(inert(text), flush=True)


def progress() -> Progress:
    """A bar with count, time spent and time left; silent where the output is not a terminal."""
    return Progress(
        TextColumn("  {task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=console.quiet or not console.is_terminal,
    )


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate with a bar."""
    with progress() as bar:
        task = bar.add_task(description, total=total if total is not None else len(items))  # type: ignore[arg-type]
        for item in items:
            yield item
            bar.advance(task)
