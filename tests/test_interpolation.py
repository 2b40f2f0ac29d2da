"""Scores between a run and its start: the ends of the curve are the parent and the run, and it is written where the report looks."""

import json

import pytest

from evals import frontier as module
from evals.frontier import frontier
from truthward.errors import UserError
from truthward.ledger import Run, plan


@pytest.fixture
def banked(copy, tmp_path):
    """The lab with rows for the sets that listen, on record in its DPO run."""
    rows = {
        "short": [
            {"id": f"t-{n}", "topic": "t", "level": "easy", "question": f"What is {n}?", "answers": ["x"]} for n in range(3)
        ],
        "instructions": [
            {"id": "i-1", "topic": "i", "prompt": "Say x in one word.", "rules": [{"rule": "max_words", "count": 1}]}
        ],
        "text": [{"id": "p-1", "topic": "p", "text": "It rained all day, and nobody minded much."}],
    }
    for name, some in rows.items():
        folder = tmp_path / "banks" / name / "dev"
        folder.mkdir(parents=True)
        (folder / f"{some[0]['topic']}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    run = copy.run("dpo")
    recipe = run.manifest["recipe"]
    recipe["evals"] |= {"banks": str(tmp_path / "banks"), "style_bank": str(copy.home / "bank"), "resamples": 200}
    recipe["evals"] |= {"first_questions": str(copy.home / "prompts.jsonl")}
    run.record(recipe=recipe)
    return run


def test_the_ends_are_the_parent_and_the_run(banked, copy):
    """At 0 what SFT scores and at 1 what DPO scores; every point but the first has differences to it."""
    found = frontier(banked, (0.0, 0.5, 1.0))
    assert [p["scale"] for p in found["points"]] == [0.0, 0.5, 1.0]
    assert (found["model"], found["parent"]) == (banked.path.name, plan(copy.recipe())["sft"].path.name)
    assert found["split"] == "dev"
    first, _, last = found["points"]
    assert set(module.SHOWN) <= first["metrics"].keys()
    for metric in module.SHOWN:
        gain = last["metrics"][metric]["mean"] - first["metrics"][metric]["mean"]
        assert last["differences"][metric]["mean"] == pytest.approx(gain, abs=2e-3)
    assert "differences" not in first
    assert last["metrics"]["truth.mc2"]["mean"] != first["metrics"]["truth.mc2"]["mean"]


def test_a_run_without_a_change_is_refused(copy):
    base = Run.load(plan(copy.recipe())["base"].path)
    with pytest.raises(UserError, match="no change of weights to scale"):
        frontier(base, (0.0, 1.0))
    reward = Run.load(plan(copy.recipe())["reward"].path)
    with pytest.raises(UserError, match="sft, distill, dpo, ppo"):
        frontier(reward, (0.0, 1.0))


def test_a_recipe_of_another_version_is_refused(banked):
    banked.record(recipe=banked.manifest["recipe"] | {"gone": 1})
    with pytest.raises(UserError, match="not of this version"):
        frontier(banked, (0.0, 1.0))
