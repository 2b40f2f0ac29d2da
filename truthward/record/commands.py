"""The commands of the record: trace, why, diff, find, rows and decide."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from truthward.console import say
from truthward.record.archive import Archive, resolve
from truthward.record.decisions import decide
from truthward.record.difference import show_diff
from truthward.record.query import EXAMPLE, show_found
from truthward.record.rows import show_rows
from truthward.record.trace import show_trace
from truthward.record.why import show_why

MODEL = "run directory, its name (dpo-1f2e, laptop/dpo-1f2e), or an exported model's folder"
PAGES = "docs/decisions"


def register(commands: Any) -> None:
    """Add the record's commands to those of ``truthward``."""

    def add(name: str, about: str, work: Any) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = commands.add_parser(name, help=about, description=about)
        parser.add_argument("--runs", default="runs", metavar="FOLDER", help="where the runs are (runs)")
        parser.set_defaults(work=work)
        return parser

    traces = add("trace", "what a model came from: parents, data, code, machine, evals, incidents", _trace)
    traces.add_argument("model", help=MODEL)
    traces.add_argument("--json", action="store_true", help="all of it as one JSON document")
    asks = add("why", "why a value is what it is, and what others gave", _why)
    asks.add_argument("model", help=MODEL)
    asks.add_argument("key", nargs="?", default="", help="e.g. ppo.kl_coef; all explained values if left out")
    differs = add("diff", "what two runs differ in, and what came of it", _diff)
    differs.add_argument("a", help=MODEL)
    differs.add_argument("b", help=MODEL)
    differs.add_argument("--whole", action="store_true", help="every row and every line of code that differs")
    finds = add("find", "runs for which an expression holds", _find)
    finds.add_argument("expression", help=f"e.g. '{EXAMPLE}'")
    finds.add_argument("--paths", action="store_true", help="only the paths, one a line")
    rows = add("rows", "the rows that a model learned from", _rows)
    rows.add_argument("model", help=MODEL)
    rows.add_argument("--principle", default="", metavar="ID", help="rows that this principle brought")
    rows.add_argument("--source", default="", metavar="TEXT", help="rows of sources whose path holds this")
    rows.add_argument("--json", action="store_true", help="one JSON object a line")
    decides = add("decide", "write a dated page of a decision, linked to runs", _decide)
    decides.add_argument("title", help="the decision in one line")
    decides.add_argument("--because", required=True, help="why, in Markdown")
    decides.add_argument("--run", action="append", default=[], metavar="RUN", help="a run that it rests on; may be repeated")
    for parser in (traces, asks, decides):
        parser.add_argument("--pages", default=PAGES, metavar="FOLDER", help=f"where decisions are written ({PAGES})")


def _trace(options: argparse.Namespace) -> None:
    show_trace(resolve(options.model, options.runs)[0], Path(options.pages), as_json=options.json)


def _why(options: argparse.Namespace) -> None:
    show_why(*resolve(options.model, options.runs), options.key, Path(options.pages))


def _diff(options: argparse.Namespace) -> None:
    show_diff(*(resolve(m, options.runs)[0] for m in (options.a, options.b)), whole=options.whole)


def _find(options: argparse.Namespace) -> None:
    show_found(Archive(Path(options.runs)), options.expression, paths=options.paths)


def _rows(options: argparse.Namespace) -> None:
    run = resolve(options.model, options.runs)[0]
    show_rows(run, principle=options.principle, source=options.source, as_json=options.json)


def _decide(options: argparse.Namespace) -> None:
    runs = [resolve(name, options.runs)[0] for name in options.run]
    say(f"wrote {decide(options.title, options.because, runs, Path(options.pages))}")
