"""The report's page: its template, and the few pieces of HTML that it is built of. Everything is escaped by default."""

from __future__ import annotations

import html
import string
from collections.abc import Iterable, Sequence
from typing import Any

from truthward.console import inert
from truthward.record.words import interval
from truthward.redaction import without_secrets

PAGE = string.Template("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>$title</title>
<style>
:root { --paper: #fdfdfb; --ink: #1d2126; --muted: #646b75; --line: #dddfe2; --soft: #f3f4f3; --accent: #1f5fa8;
  --good: #23743c; --bad: #b03426; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #15181c; --ink: #e4e6e9; --muted: #9aa2ad; --line: #343a42; --soft: #1d2126; --accent: #7db4f0;
    --good: #73c68d; --bad: #f0917f; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 1000px; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .75rem; }
h2 { font-size: 1.2rem; margin: 2.75rem 0 .5rem; padding-top: .6rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.5rem 0 .4rem; }
p { max-width: 46rem; margin: .5rem 0; }
nav { font-size: .85rem; margin-top: 1.25rem; color: var(--muted); }
nav a { color: var(--accent); text-decoration: none; margin-right: .9rem; white-space: nowrap; }
.lead { font-size: 1.08rem; max-width: 50rem; }
.note, figcaption { color: var(--muted); font-size: .87rem; }
.wide { overflow-x: auto; margin: .75rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .87rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .35rem .7rem .35rem 0; border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--muted); vertical-align: bottom; }
td small, .where { color: var(--muted); font-size: .8rem; }
td small { white-space: nowrap; }
.good { color: var(--good); } .bad { color: var(--bad); } .off { color: var(--muted); }
.text { white-space: pre-wrap; overflow-wrap: anywhere; }
.even { table-layout: fixed; }
.tight { white-space: nowrap; } .roomy { display: inline-block; min-width: 9rem; }
.dense { font-size: .8rem; } .dense td, .dense th { padding-right: .45rem; } .dense small { font-size: .7rem; }
.dense .where { font-size: .74rem; }
code { font: .92em ui-monospace, Menlo, Consolas, monospace; overflow-wrap: break-word; }
figure { margin: 1rem 0; } svg { display: block; width: 100%; height: auto; }
.card { border-left: 3px solid var(--line); padding: .1rem 0 .1rem 1rem; margin: 1.1rem 0; }
dl { display: grid; grid-template-columns: 8rem 1fr; gap: .2rem 1rem; margin: 0; font-size: .9rem; }
dt { color: var(--muted); } dd { margin: 0; min-width: 0; }
@media print {
  :root { --paper: #fff; --ink: #000; --muted: #444; --line: #ccc; --soft: #fff; --accent: #1f5fa8;
    --good: #23743c; --bad: #b03426; }
  html { font-size: 11px; }
  main { max-width: none; padding: 0; }
  nav { display: none; }
  tr, figure, .card { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  .wide { overflow: visible; }
}
</style>
</head>
<body>
<main>
$body
</main>
</body>
</html>
""")


class Html(str):
    """Text that is HTML already; everything else is escaped where it enters the page."""


def text(value: Any) -> Html:
    """A value as HTML, escaped unless it is HTML already; without secrets and characters that steer a terminal or a line."""
    return value if isinstance(value, Html) else Html(html.escape(inert(without_secrets(str(value)))))


def tag(name: str, value: Any = "", **attributes: str) -> Html:
    """An element; ``class_`` stands for ``class``."""
    pairs = "".join(f' {key.rstrip("_")}="{text(v)}"' for key, v in attributes.items() if v)
    return Html(f"<{name}{pairs}>{text(value)}</{name}>")


def join(parts: Iterable[Any], between: str = "\n") -> Html:
    """Parts one after the other."""
    return Html(between.join(text(part) for part in parts))


def lines(parts: Iterable[Any]) -> Html:
    """Parts on lines of their own."""
    return join(parts, "<br>")


def spoken(value: str) -> Html:
    """Text by a model or from a bank, with its own line breaks."""
    return tag("div", value, class_="text")


def cell(value: Any, span: int) -> Html:
    """A table cell over several columns."""
    return tag("td", value, colspan=str(span))


def table(columns: Sequence[Any], rows: Iterable[Sequence[Any]], class_: str = "") -> Html:
    """A table; a value made by :func:`cell` is taken as the cell that it is."""
    head = tag("tr", join((tag("th", c, scope="col") for c in columns), ""))
    body = [
        tag("tr", join((v if isinstance(v, Html) and v.startswith("<td") else tag("td", v) for v in row), ""))
        for row in rows
    ]
    return tag("div", tag("table", join([tag("thead", head), tag("tbody", join(body))]), class_=class_), class_="wide")


def note(words: Any) -> Html:
    """A remark under what it is about."""
    return tag("p", words, class_="note")


def pairs(rows: Iterable[tuple[Any, Any]]) -> Html:
    """Names and their texts."""
    return tag("dl", join(join([tag("dt", name), tag("dd", value)], "") for name, value in rows))


def signed(value: dict[str, Any]) -> str:
    """A difference with its interval in one line, with true minus signs."""
    return interval(value, sign=True).replace("-", "\N{MINUS SIGN}")


def score(value: dict[str, Any]) -> Html:
    """A mean over its interval."""
    mean, _, span = interval(value).partition(" ")
    return lines([mean, tag("small", span)])


def difference(value: dict[str, Any]) -> Html:
    """A difference over its interval, coloured where the interval leaves out zero."""
    mean, _, span = signed(value).partition(" ")
    colour = "good" if value["low"] > 0 else "bad" if value["high"] < 0 else ""
    return lines([tag("span", mean, class_=colour), tag("small", span)])


def figure(svg: str, caption: str) -> Html:
    """A plot under its caption."""
    return tag("figure", join([Html(inert(without_secrets(svg))), tag("figcaption", caption)]))


def page(title: str, body: Html) -> str:
    """The whole document."""
    return PAGE.substitute(title=text(title), body=body)
