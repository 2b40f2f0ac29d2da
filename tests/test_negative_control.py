"""The gates on the voice stop what they were made for: a DPO that gained truth and lost its own answers.

``fixtures/voice_lost.json`` holds what rules found of each greedy answer to the test banks: of the base, of the DPO model
that the laptop recipe made before it replayed anything, and of the one that it makes now.
"""

import json
from pathlib import Path

import pytest

from evals import comparison
from evals.asking import Scored
from evals.suite import exams
from truthward.recipe import load_recipe

COLUMNS = {"short": "right", "instructions": "followed", "fluency": "broken"}
FIXTURE = Path(__file__).parent / "fixtures" / "voice_lost.json"


@pytest.fixture(scope="module")
def recorded() -> dict:
    return json.loads(FIXTURE.read_text(encoding="utf-8"))


def items(recorded: dict, model: str) -> list[Scored]:
    """A model's answers as their sets grade them; columns that no gate reads are left out."""
    found = []
    for name, rows in recorded["items"].items():
        exam = exams(len)[name]
        columns = {exam.verdict, *(column for metric in exam.metrics.values() for column in metric.columns)}
        for row in rows:
            values = dict.fromkeys(columns) | {COLUMNS[name]: row[model]}
            found.append(Scored(name, row["id"], row["topic"], values, ""))
    return found


def verdict(recorded: dict, model: str) -> dict:
    """What the laptop recipe's gates say of a model against the base."""
    table = load_recipe("recipes/laptop.toml").evals
    base = {"model": "base", "stage": "base", "items": [vars(s) for s in items(recorded, "base")]}
    return comparison.verdict(table, comparison.compare(items(recorded, model), base, exams(len), table, 17))


@pytest.mark.usefixtures("at_root")
def test_the_dpo_that_lost_its_voice_is_stopped(recorded):
    found = verdict(recorded, "before")
    assert found["mode"] == "block"
    assert "short.right" in found["worse"]


@pytest.mark.usefixtures("at_root")
def test_the_dpo_that_keeps_it_is_not(recorded):
    found = verdict(recorded, "now")
    assert found["gated"] == ["short.right", "instructions.followed", "fluency.broken"]
    assert found["worse"] == {}
