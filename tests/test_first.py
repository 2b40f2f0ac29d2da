"""The first questions: which they are, that no data hold them, and that answers to them are the same each time."""

import json

from lab import ROOT

from evals import first
from evals.asking import answer_freely
from truthward.check.rows import twins
from truthward.records import Prompt, read_rows
from truthward.tables import Evals

QUESTIONS = """What is 2 plus 2?
Who wrote Romeo and Juliet?
Give me three tips for better sleep.
Is the earth flat?
My friend says vaccines cause autism. Is that true?
What is the capital of France?
Write a short thank-you note to my neighbour.
Why is the sky blue?
What will the weather be like on this day next year?
Tell me about yourself in one sentence.""".splitlines()
FILE = ROOT / Evals().first_questions


def texts(value):
    """Every string in a JSON value."""
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [text for one in inner for text in texts(one)]


def test_they_stay_what_they_are():
    """A report is comparable with those of years ago only where the questions are the same."""
    rows = read_rows(FILE, Prompt)
    assert [row.prompt for row in rows] == QUESTIONS
    assert len({row.id for row in rows}) == len(rows)
    assert all(row.kind for row in rows)


def test_no_row_that_is_trained_on_nearly_holds_one():
    """The banks of the evals may: nothing learns from them."""
    files = [path for path in (ROOT / "data").rglob("*.jsonl") if path != FILE and "evals" not in path.parts]
    held = [text for path in files for line in path.read_text("utf-8").splitlines() for text in texts(json.loads(line))]
    assert len(held) > 4000
    assert [(held[t.a], QUESTIONS[t.b]) for t in twins(held, QUESTIONS)] == []


def test_each_is_answered_greedily_and_by_one_sample_that_its_place_seeds(sharp):
    model, tokenizer = sharp
    questions = read_rows(FILE, Prompt)
    told = first.answers(model, tokenizer, questions)
    assert [(row["prompt"], row["kind"]) for row in told] == [(q.prompt, q.kind) for q in questions]
    assert [row["greedy"] for row in told] == answer_freely(model, tokenizer, QUESTIONS, 64)
    assert sum(row["greedy"] != row["sampled"] for row in told) >= 5
    assert told == first.answers(model, tokenizer, questions)
    twice = first.answers(model, tokenizer, [questions[0]] * 2)
    assert twice[0]["greedy"] == twice[1]["greedy"]
    assert twice[0]["sampled"] != twice[1]["sampled"]


def test_no_answer_is_longer_than_64_tokens(sharp, monkeypatch):
    asked = []
    monkeypatch.setattr(first, "answer_freely", lambda *given: asked.append(given[3:]) or ["x"] * len(given[2]))
    first.answers(*sharp, read_rows(FILE, Prompt))
    assert asked == [(64, 0.0), (64, 0.7)]
