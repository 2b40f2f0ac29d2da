"""Strategies for what nobody should feed a program and somebody will."""

from __future__ import annotations

import copy
import functools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from truthward.errors import UserError

ATTACKS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "</table></main><svg onload=alert(1)>",
    "\"'><b>",
    "\x1b[2J\x1b[31mred\x1b]0;title\x07",
    "\x9b31m",
    "[red]", "[/]", "[/bold]", "[link=http://x]x[/link]", "\\[", "[",
    "\u202eturned\u202c",
    "`</code>`", "| a | b |", "```\n<script>", "![x](javascript:alert(1))",
    "$\\frac{1}{$", "$x$", "{}", "%s", "{0.__class__}",
    "../../etc/passwd", "/", "", " ", "\0", "a\nb", "<|im_end|>", "<|endoftext|>",
]  # fmt: skip
ODD_TEXT = st.one_of(st.sampled_from(ATTACKS), st.text(st.characters(), max_size=12))  # half surrogate pairs too
ODD_NUMBERS = st.one_of(
    st.integers(-3, 3),
    st.sampled_from([2**31, 2**63 - 1, 2**63, -(2**63) - 1, 10**30, 10**400, 1e308, -0.0, 5e-324]),
    st.floats(),
)
SCALARS = st.one_of(st.none(), st.booleans(), ODD_NUMBERS, ODD_TEXT)
JSON = st.recursive(
    SCALARS, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(ODD_TEXT, inner, max_size=3)), max_leaves=6
)


def deep(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def dumps(value: Any) -> str:
    """JSON as lax writers make it: with NaN, infinities, huge integers and half surrogate pairs."""
    return json.dumps(value, allow_nan=True)


def places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where everything within a JSON value lies."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place, *(found for key, one in inner for found in places(one, (*place, key)))]


@st.composite
def mutated(draw: Any, values: st.SearchStrategy[Any]) -> Any:
    """A good JSON value with one to three things replaced, dropped or added."""
    root = [copy.deepcopy(draw(values))]
    for _ in range(draw(st.integers(1, 3))):
        *way, last = draw(st.sampled_from(places(root)[1:] or [(0,)]))
        holder: Any = root
        for key in way:
            holder = holder[key]
        kind = draw(st.sampled_from(["replace", "replace", "drop", "add"]))
        if kind == "drop" and way:
            del holder[last]
        elif kind == "add" and isinstance(holder[last], dict):
            holder[last][draw(ODD_TEXT)] = draw(JSON)
        else:
            holder[last] = draw(JSON)
        if not places(root)[1:]:
            break
    return root[0] if root else None


def _toml(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {_toml(v)}" for k, v in value.items()) + "}"
    if value is None:
        return "1979-05-27T07:32:00Z"
    return repr(value).lower() if isinstance(value, bool | int | float) else json.dumps(value, ensure_ascii=False)


TOML_VALUES = st.one_of(
    JSON.map(_toml),
    st.sampled_from(
        ["'", "nan", "inf", "1_0", "07", "[" * 2000, "{a=" * 1500, "9" * 5000, "2000-13-45", "", "\\", "'''", '"""']
    ),
    st.integers(1, 3000).map(lambda n: "[" * n + "]" * n),
    ODD_TEXT,
)


@st.composite
def edited(draw: Any, texts: st.SearchStrategy[str]) -> str:
    """A good text with one to four lines dropped, doubled, moved, cut or given another value."""
    lines = draw(texts).split("\n")
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(lines) - 1))
        kind = draw(st.sampled_from(["value", "value", "value", "drop", "double", "move", "cut", "insert"]))
        if kind == "value" and "=" in lines[at]:
            lines[at] = f"{lines[at].split('=')[0]}= {draw(TOML_VALUES)}"
        elif kind == "drop":
            del lines[at : at + draw(st.integers(1, 3))]
        elif kind == "double":
            lines.insert(at, lines[at])
        elif kind == "move":
            lines.insert(draw(st.integers(0, len(lines))), lines.pop(at))
        elif kind == "cut":
            lines[at] = lines[at][: draw(st.integers(0, 20))]
        else:
            lines.insert(at, draw(st.one_of(ODD_TEXT, TOML_VALUES.map(lambda v: f"seed = {v}"))))
        lines = lines or [""]
    return "\n".join(lines)


def encoded(text: str) -> bytes:
    """As UTF-8, with half surrogate pairs as bytes that are none."""
    return text.encode("utf-8", "surrogatepass")


# ---------------------------------------------------------------------------------------------------- feeding

fed: Counter[str] = Counter()


def cases(count: int, *strategies: Any) -> Callable[[Any], Any]:
    """So many cases of a test, counted as they are run."""
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.large_base_example]
    given_so_many = settings(
        max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=checks
    )

    def decorate(test: Any) -> Any:
        @functools.wraps(test)
        def counted(*arguments: Any, **options: Any) -> None:
            fed[test.__name__] += 1
            test(*arguments, **options)

        return given_so_many(given(*strategies)(counted))

    return decorate


def trace(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*")}


def taken(folder: Path, read: Callable[[], Any], writes: bool = False) -> bool:
    """Whether bad input was taken; refused, it must be a :class:`UserError` of few words, with nothing written."""
    before = trace(folder)
    try:
        read()
    except UserError as error:
        assert 0 < len(str(error)) < 20_000
        assert trace(folder) == before
        return False
    assert writes or trace(folder) == before
    return True
