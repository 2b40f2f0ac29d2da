"""Models between a run and its start: their weights, and the scores that a run's frontier holds."""

import json

import pytest
import torch

from evals import frontier as module
from evals.frontier import frontier
from truthward.errors import UserError
from truthward.interpolation import between
from truthward.ledger import Run, plan
from truthward.models import compose


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


# ------------------------------------------------------------------------------------------------------------ weights


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_a_share_of_the_change_is_saved(copy, tune):
    """scale = 0.25: the weights lie a quarter of the way from the parent to where training ended."""
    ends = {}
    for scale in (1.0, 0.25):
        words = [f"sft.scale={scale}", f'sft.tune="{tune}"', "sft.lora_alpha=8", "sft.batch_size=4"]
        ends[scale] = compose(copy.run("sft", *words)).state_dict()
    base = compose(Run.load(plan(copy.recipe())["base"].path)).state_dict()
    moved = max((ends[1.0][name] - base[name]).abs().max().item() for name in base)
    assert moved > 1e-3
    for name, start in base.items():
        expected = start + 0.25 * (ends[1.0][name] - start)
        torch.testing.assert_close(ends[0.25][name], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_a_model_between_a_run_and_its_start(copy, stage):
    """0 is the model that it started from (PPO's policy from DPO's), 1 its own, and a half lies half way."""
    run = copy.run(stage)
    first, half, last = (between(run, scale).state_dict() for scale in (0.0, 0.5, 1.0))
    start = compose(Run.load(plan(copy.recipe())["base" if stage == "sft" else "dpo"].path)).state_dict()
    end = compose(run).state_dict()
    assert any(not torch.equal(start[name], end[name]) for name in end)
    for name in end:
        torch.testing.assert_close(first[name], start[name], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(last[name], end[name], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(half[name], (start[name] + end[name]) / 2, atol=1e-6, rtol=1e-5)
