"""What a run is named after: the content of what its settings name, however that is spelt."""

import pytest
from lab import ROOT
from test_ledger import ALL, PPO, _fresh_hashes, changed, names, world

from truthward.ledger import plan

__all__ = ["_fresh_hashes", "world"]  # fixtures


@pytest.mark.parametrize("spelling", ["{home}/./demos.jsonl", "{home}/../{folder}/demos.jsonl", "demos.jsonl"])
def test_how_a_path_is_written_does_not_rename_a_run(world, tmp_path, monkeypatch, spelling):
    """Absolute, relative, or by a way round: the same file is the same data; another name or content is not."""
    before = names(world())
    if spelling == "demos.jsonl":
        places = ["truth", "style_bank", "banks", "first_questions"]  # found from the working directory
        defaults = {f"evals.{key}": getattr(world().evals, key) for key in places}
        defaults |= {"reward.principle_bank": "data/judge", "dpo.preferences": ["data/truth/train"]}
        absolute = [f"{k}={[str(ROOT / p) for p in v] if isinstance(v, list) else ROOT / v}" for k, v in defaults.items()]
        monkeypatch.chdir(tmp_path)
    else:
        absolute = []
    path = spelling.format(home=tmp_path, folder=tmp_path.name)
    assert names(world(*absolute, f"sft.data=['{path}']")) == before
    (tmp_path / "other.jsonl").write_bytes((tmp_path / "demos.jsonl").read_bytes())
    after = names(world(*absolute, f"sft.data=['{tmp_path}/other.jsonl']"))  # code goes by names such as revisions.jsonl
    assert changed(before, after) == {"sft", "evals-sft", "dpo", "evals-dpo"}


def test_a_base_from_a_folder_counts_by_its_content_in_every_stage(world, tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    before = names(world(f"model.base={tmp_path}/model"))
    assert names(world(f"model.base={tmp_path}/../{tmp_path.name}/model")) == before
    (tmp_path / "model" / "config.json").write_text("{ }")
    assert changed(before, names(world(f"model.base={tmp_path}/model"))) == ALL


def test_a_reward_by_its_modules_name_counts_by_its_source_and_is_not_imported(world, tmp_path, monkeypatch):
    """``package.module:function``, looked for from the working directory as Python will look for it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text("raise SystemExit('imported')")
    (tmp_path / "mine" / "scores.py").write_text("def short(completions): ...")
    absolute = [f"evals.{key}={ROOT / getattr(world().evals, key)}" for key in ("truth", "style_bank", "banks")]
    absolute += [f"evals.first_questions={ROOT}/data/first-questions.jsonl", f"ppo.prompts={ROOT}/data/prompts.jsonl"]
    recipe = world(*absolute, 'ppo.rewards=["mine.scores:short", "some/hub-id"]', text=PPO)
    before = names(recipe)
    assert "mine/scores.py" in plan(recipe)["ppo"].data
    (tmp_path / "mine" / "scores.py").write_text("def short(completions): return 1")
    assert changed(before, names(recipe)) == {"ppo", "evals-ppo"}
    other = world(*absolute, 'ppo.rewards=["mine.scores:long", "some/hub-id"]', text=PPO)
    assert changed(names(recipe), names(other)) == {"ppo", "evals-ppo"}
