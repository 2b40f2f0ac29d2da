"""The report's first section: what every stage says to the same few questions."""

from __future__ import annotations

from truthward.report.page import Html, join, note, spoken, table, tag
from truthward.report.view import Stage, View

SILENT = "(no words)"
WORDS = (
    "The most likely (greedy) answer of every stage; below it, muted, one sample at temperature 0.7. No answer goes on after"
    " 64 tokens. The check before launch keeps these questions out of training data."
)


def first(view: View) -> Html:
    """A row a question and a column a stage, of the stages whose evals asked."""
    told = {stage.name: _answers(stage) for stage in view.scored}
    told = {name: answers for name, answers in told.items() if answers}
    asked = {prompt: row["kind"] for answers in told.values() for prompt, row in answers.items()}
    if not asked:
        return Html("")
    rows = []
    for prompt, kind in asked.items():
        question = join([spoken(prompt), tag("span", kind, class_="where")], "")
        rows.append([question, *[_said(answers.get(prompt)) for answers in told.values()]])
    return join([note(WORDS), table(["question", *told], rows, "even")])


def _answers(stage: Stage) -> dict[str, dict[str, str]]:
    """A stage's answers by question; none where its evals are older than the questions."""
    return {row["prompt"]: {"kind": "", **row} for row in (stage.evals or {}).get("first_questions", [])}


def _said(row: dict[str, str] | None) -> Html:
    """The greedy answer over the sampled one; a dash where the question was not asked."""
    if row is None:
        return Html("-")
    sampled = tag("div", row["sampled"] or SILENT, class_="text off")
    return join([spoken(row["greedy"] or SILENT), sampled], "")
