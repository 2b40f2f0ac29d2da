"""A cluster's recipe on a laptop: what is cut, what stays, that it is in order, and that it runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from lab import ROOT, write

from truthward import hardware, shrink
from truthward.check import Facts, examine
from truthward.check.machine import Machine
from truthward.check.memory import GB
from truthward.errors import UserError
from truthward.ledger import Run, is_done, plan
from truthward.models import TINY
from truthward.reasons import missing_reasons
from truthward.recipe import load_recipe

RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.toml"))
CLUSTERS = [name for name in RECIPES if name.startswith("cluster")]
STAY = {  # what decides which code runs
    "sft": ("parent", "tune", "schedule", "packing", "lora_rank", "learning_rate"),
    "reward": ("parent", "tune", "preferences", "center_coef", "learning_rate"),
    "dpo": ("parent", "tune", "preferences", "sft_coef", "beta", "loss", "replay", "replay_coef", "replay_share"),
    "ppo": (
        "parent",
        "tune",
        "rewards",
        "advantage",
        "reduction",
        "ratio",
        "kl_form",
        "sampler",
        "truncation",
        "group_size",
    ),
    "constitution": ("parent", "ways", "rounds", "samples", "principles"),
    "launch": ("zero", "offload", "deepspeed", "gradient_checkpointing", "restarts"),
    "judge": ("methods", "bank"),
    "evals": ("sets", "models"),
}

pytestmark = pytest.mark.usefixtures("at_root")


def shrunk(name, tmp_path, *overrides, ranks=2):
    whole = load_recipe(f"recipes/{name}.toml", [f"runs={tmp_path}", *overrides])
    return whole, load_recipe(shrink.write(whole, ranks))


@pytest.mark.parametrize("name", RECIPES)
def test_what_decides_which_code_runs_stays_and_sizes_are_cut(tmp_path, name):
    whole, small = shrunk(name, tmp_path)
    assert small.stages == whole.stages
    for table, keys in STAY.items():
        for key in keys:
            assert getattr(getattr(small, table), key) == getattr(getattr(whole, table), key), f"{table}.{key}"
    assert (small.model.base, small.launch.hosts, small.launch.ranks) == (TINY, 1, min(2, whole.launch.world))
    assert small.ppo.iterations == 2
    for stage in ("sft", "reward", "dpo"):
        assert 1 <= Facts(small, "").steps(stage) <= 6
    assert (small.name, small.runs) == (f"{whole.name}-shrunk", str(tmp_path))


@pytest.mark.parametrize("name", RECIPES)
def test_a_shrunk_recipe_is_in_order_and_gives_a_reason_for_all_that_was_cut(tmp_path, name, monkeypatch):
    laptop = Machine(cores=4, memory=16 * GB, gpus=0, gpu_memory=0)
    monkeypatch.setattr(Machine, "here", classmethod(lambda _: laptop))
    monkeypatch.setattr(hardware, "measure_dtypes", lambda: {"float32": 100.0, "bfloat16": 10.0})
    _, small = shrunk(name, tmp_path)
    facts = Facts(small, small.origin.path, launching=True)
    assert [str(f) for f in examine(facts) if f.level == "error"] == []
    if name != "tiny":  # which gives no reasons
        assert missing_reasons(small) == []
        assert small.model.why["base"].startswith("shrunk from ")
    assert "shrunk by truthward" in Path(small.origin.path).read_text().splitlines()[0]


def test_more_than_one_micro_batch_and_minibatch_stay_more_than_one(tmp_path):
    whole, small = shrunk("cluster-8b", tmp_path)
    for stage in ("sft", "reward", "dpo"):
        assert (Facts(whole, "").loader(stage)[1] > 1) == (Facts(small, "").loader(stage)[1] > 1)
    assert (whole.ppo.minibatches, small.ppo.minibatches) == (4, 2)


@pytest.mark.parametrize("advantage", ["rloo", "gae"])
def test_answers_to_a_prompt_stay_together(tmp_path, advantage):
    group = ["ppo.group_size=8", f"ppo.advantage={advantage}", "unexplained=warn"]
    _, small = shrunk("cluster-8b", tmp_path, *group)
    assert small.ppo.rollouts % 8 == 0


@pytest.mark.parametrize(("ranks", "kept"), [(1, 1), (2, 2), (64, 8)])
def test_ranks_are_cut_to_what_is_asked_for(tmp_path, ranks, kept):
    assert shrunk("cluster-8b", tmp_path, ranks=ranks)[1].launch.ranks == kept


def test_no_ranks_are_refused(tmp_path):
    with pytest.raises(UserError, match="it cannot run on 0 ranks"):
        shrunk("cluster-8b", tmp_path, ranks=0)


def test_a_judge_behind_a_server_is_not_asked(tmp_path):
    served = ['judge.base_url="http://127.0.0.1:1"', 'judge.model="big"', "unexplained=warn"]
    _, small = shrunk("cluster-8b", tmp_path, *served, 'judge.methods=["choice"]')
    assert (small.judge.base_url, small.judge.model, small.judge.methods) == ("", "", ["choice"])


@pytest.mark.parametrize(
    ("base", "family"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", "llama"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "mistral"),
        ("Qwen/Qwen2.5-7B-Instruct", "qwen2"),
        ("Qwen/Qwen3-8B", "qwen3"),
        ("smollm2-135m-instruct", "llama"),
        (TINY, "llama"),
    ],
)
def test_a_base_is_of_the_family_that_its_name_says(base, family):
    assert shrink.family(base) == family


def test_a_config_tells_the_family_and_another_family_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    assert shrink.family(str(tmp_path)) == "qwen3"
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    for base in (str(tmp_path), "some-org/model-70b"):
        with pytest.raises(UserError, match="of which family is"):
            shrink.family(base)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_a_model_of_another_family_is_tiny_and_of_its_class(tmp_path, family):
    from transformers import AutoConfig

    from truthward.models import fetch_base

    _, small = shrunk("cluster-8b", tmp_path, f"model.base=org/{family.replace('qwen2', 'qwen2.5')}-7b", "unexplained=warn")
    assert AutoConfig.from_pretrained(small.model.base).model_type == family
    model, _ = fetch_base(small.model.base, 0)
    assert sum(p.numel() for p in model.parameters()) < 200_000


def test_a_row_of_any_length_fits(tmp_path):
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "because " * 500}]
    write(tmp_path / "long.jsonl", [{"id": f"d{i}", "messages": turns} for i in range(8)])
    _, small = shrunk("cluster-8b", tmp_path, f'sft.data=["{tmp_path}/long.jsonl"]', "unexplained=warn")
    facts = Facts(small, "")
    assert small.sft.max_length == max(facts.tokens("sft")) > 2048
    assert (
        json.loads((Path(small.model.base) / "config.json").read_text())["max_position_embeddings"] >= small.sft.max_length
    )
    assert facts.folder == Path(small.model.base)


@pytest.mark.slow
def test_the_largest_recipe_runs_to_its_end(tmp_path):
    """Every stage by the one command that a cluster is given: all weights, ZeRO-3, layers computed again, on two ranks."""
    words = [sys.executable, "-m", "truthward", "run", "recipes/cluster-70b.toml", f"runs={tmp_path}", "--shrink"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    recipe = load_recipe(tmp_path / "cluster-70b-shrunk" / "recipe.toml")
    assert all(is_done(this.path) for this in plan(recipe).values())
    launch = Run.load(plan(recipe)["ppo"].path).manifest["recipe"]["launch"]
    assert (launch["zero"], launch["ranks"], launch["gradient_checkpointing"]) == (3, 2, True)
    assert "shrunk from" in (tmp_path / "cluster-70b-shrunk" / "report.html").read_text(encoding="utf-8")
