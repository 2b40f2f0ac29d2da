"""The benchmarks' own parts: that their scripts stand, and that the tables they print say what was measured."""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from lab import ROOT

from truthward import chat
from truthward.branches import Item
from truthward.ledger import Run
from truthward.principles import read_principles
from truthward.recipe import load_recipe
from truthward.records import Prompt

BENCH = Path(__file__).parent.parent / "bench"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
    assert spec
    assert spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def ppo() -> ModuleType:
    return load("ppo")


def tree(name: str) -> ast.Module:
    return ast.parse((BENCH / f"{name}.py").read_text(encoding="utf-8"))


def process(peak: float, *seconds: float) -> dict[str, Any]:
    return {
        "iterations": [{"seconds": s, "rollout": s / 4, "score": s / 4, "update": s / 2, "tokens": 20.0} for s in seconds],
        "peak_gb": peak,
    }


@pytest.mark.parametrize("script", sorted(BENCH.glob("*.py")), ids=lambda p: p.stem)
def test_every_script_parses_and_says_what_it_is(script: Path) -> None:
    assert ast.get_docstring(tree(script.stem))


def test_table_takes_medians_over_all_processes_and_ratios_to_the_first_side(ppo: ModuleType) -> None:
    text = ppo.table(
        {"truthward-lora": [process(2.0, 10.0, 60.0), process(1.5, 20.0)], "trl-lora": [process(7.0, 70.0, 90.0)]}
    )
    heading, ours, theirs = (line.split() for line in text.splitlines())
    assert heading[:2] == ["s/iteration", "ratio"]
    assert ours == ["truthward-lora", "20.0", "1.00", "5.0", "5.0", "10.0", "2.00", "1.00", "20.0", "3"]
    assert theirs == ["trl-lora", "80.0", "4.00", "20.0", "20.0", "40.0", "7.00", "3.50", "20.0", "2"]


def test_table_lines_are_as_wide_as_their_heading(ppo: ModuleType) -> None:
    lines = ppo.table({side: [process(12.5, 100.0)] for side in ppo.SIDES}).splitlines()
    assert {len(line) for line in lines} == {len(lines[0])}


def test_our_side_is_configured_by_keys_that_the_recipe_has(ppo: ModuleType) -> None:
    recipe = load_recipe(
        BENCH.parent / "recipes" / "laptop.toml", [f"ppo.{k}={json.dumps(v)}" for k, v in ppo.SETTINGS.items()]
    )
    assert {key: getattr(recipe.ppo, key) for key in ppo.SETTINGS} == ppo.SETTINGS


def test_trl_side_reads_only_settings_that_are_written(ppo: ModuleType) -> None:
    written = {*ppo.SETTINGS, "threads", "trl_forward_batch", "lora_modules", "prompts"}
    read = {
        node.slice.value
        for node in ast.walk(tree("trl_ppo"))
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == "settings"
        if isinstance(node.slice, ast.Constant)
    }
    assert read == written


def test_trl_side_imports_nothing_of_ours() -> None:
    roots = set()
    for node in ast.walk(tree("trl_ppo")):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            roots.add((node.module or "").split(".")[0])
    assert not roots & {"truthward", "sft", "reward", "constitution", "rl", "evals", "tests", "bench", ""}


def test_every_pin_of_trls_environment_is_exact() -> None:
    lines = (BENCH / "trl-ppo-constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert (pins["torch"], pins["trl"]) == ("2.13.0", "1.12.0")
    assert {"transformers", "peft", "accelerate", "datasets"} <= pins.keys()


def test_newest_takes_the_last_complete_preference_model_with_its_own_parents(ppo: ModuleType, tmp_path: Path) -> None:
    def run(name: str, finished: str = "2026-01-01", **parents: str) -> None:
        (tmp_path / name).mkdir()
        recipe = {"name": "x", "stages": ["sft"], "model": {"base": "x"}}
        end = {"status": "complete", "finished": finished} if finished else {"status": "running"}
        Run(tmp_path / name).record(stage=name.split("-")[0], parents=parents, recipe=recipe, **end)

    run("base-1")
    run("sft-1", model="base-1")
    run("sft-2", "2026-03-01", model="base-1")
    run("constitution-1", model="sft-1")
    run("reward-1", "2026-02-01", model="sft-2", preferences="constitution-1")
    run("reward-2", "2026-02-02", model="sft-1", preferences="constitution-1")
    run("reward-3", "", model="sft-2", preferences="constitution-1")
    found = {stage: each.path.name for stage, each in ppo.newest(tmp_path).items()}
    assert found == {"base": "base-1", "sft": "sft-1", "constitution": "constitution-1", "reward": "reward-2"}


def test_no_finished_demo_is_said_so(ppo: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="make demo first"):
        ppo.newest(tmp_path)


# -------------------------------------------------------------------------------------------------------- revisions


@pytest.fixture(scope="module")
def rows() -> ModuleType:
    return load("revisions")


@pytest.fixture
def task(rows: ModuleType, sharp: Any) -> Any:
    """Three prompts of different lengths, sampled so coldly that every side says the same."""
    prompts = [Prompt(id=str(i), prompt=text) for i, text in enumerate(("Is it?", "Why are there no more of them?", "So?"))]
    principles = read_principles(ROOT / "constitution/principles.toml")[:3]
    return rows.Task(sharp[1], prompts, principles, 12, 1e-4)


def test_a_row_is_as_many_seconds_as_its_writing_and_judging_and_ratios_are_to_the_plain_loop(rows: ModuleType) -> None:
    """4 prompts: the loop takes 16, 10 and 13 + 3 s, median 16, so 0.25 rows/s; ours 4 s, so 1 row/s, 4 times as many."""
    loop = [rows.Round(14.0, 2.0, 100, []), rows.Round(9.0, 1.0, 80, []), rows.Round(13.0, 3.0, 120, [])]
    text = rows.table({rows.LOOP: loop, "ours": [rows.Round(3.0, 1.0, 90, [])]}, 4)
    heading, *lines = text.splitlines()
    assert [line.split()[-5:] for line in lines] == [
        ["0.25", "1.00", "13.00", "2.00", "25.0"],
        ["1.00", "4.00", "3.00", "1.00", "22.5"],
    ]
    assert {len(line) for line in lines} == {len(heading)}


def test_a_margin_is_the_mean_under_follow_less_that_under_violate(rows: ModuleType) -> None:
    """Answers of 2 and 4 tokens: -2/2 + 6/2 = 2 and -8/4 + 4/4 = -1."""
    item = Item([1], [[1, 2], [1, 2, 3, 4]])
    assert rows.margins([item, item], [[-2.0, -8.0], [-6.0, -4.0]]) == [[2.0, -1.0]]


@pytest.mark.parametrize("batch", [1, 2, 32])
def test_the_peer_does_the_same_job(rows: ModuleType, task: Any, sharp: Any, batch: int) -> None:
    """Near temperature 0 all sides write the same rows, and score them alike, padded or not."""
    model, tokenizer = sharp
    ours, peer = rows.Ours(model), rows.Transformers(model, tokenizer.pad_token_id, batch)
    mine, other = (rows.work(side, task, 1) for side in (ours, peer))
    assert mine.items == other.items
    assert mine.tokens == other.tokens
    assert len(mine.items) == 2 * len(task.prompts)
    for a, b in zip(ours.judge(mine.items), peer.judge(mine.items), strict=True):
        assert a == pytest.approx(b, abs=1e-3)


def test_what_is_judged_is_answer_and_revision_under_both_prompts(rows: ModuleType, task: Any, sharp: Any) -> None:
    items = rows.work(rows.Ours(sharp[0]), task, 1).items
    for p, c, pair in zip(task.prompts, task.principles, zip(items[::2], items[1::2], strict=True), strict=True):
        assert [i.prompt for i in pair] == [
            chat.prompt_ids(task.tokenizer, chat.user(p.prompt, s)) for s in (c.follow, c.violate)
        ]
        assert pair[0].answers == pair[1].answers
        assert len(pair[0].answers) == 2
        assert pair[0].answers[0] != pair[0].answers[1]


def test_the_bench_takes_settings_prompts_and_model_of_the_latest_constitution(rows: ModuleType, lab: Any) -> None:
    task, parent = rows.set_up(next(lab.runs.iterdir()), 2)
    assert parent.manifest["stage"] == "sft"
    assert (len(task.prompts), len(task.principles), task.limit) == (2, 2, 6)


def test_the_bench_without_a_demo_says_so(rows: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="make demo first"):
        rows.newest(tmp_path)
