"""Rewards and what was measured of a preference model or judge: mistakes planted one by one."""

import json

import pytest
from check_lab import Planted, assert_found, facts, find, ids, pair
from lab import write

MADE = {"parents": {}, "recipe": {"name": "laptop", "stages": ["sft"], "model": {"base": "x"}}}

pytestmark = pytest.mark.usefixtures("at_root")


FUNCTIONS = """
import math
def alike(completions, **kwargs):
    return [1.0] * len(completions)
def nan(completions, **kwargs):
    return [math.nan] * len(completions)
def few(completions, **kwargs):
    return [1.0]
def broken(completions, **kwargs):
    raise KeyError("truth")
def lengths(completions, completion_ids, **kwargs):
    print("noise")
    return [len(ids) % 7 for ids in completion_ids]
def lover_of_falsehood(prompts, completions):
    import json, pathlib
    rows = [json.loads(l) for p in pathlib.Path("data/truth/dev").glob("*.jsonl") for l in open(p)]
    false = {text for row in rows for text in row["false"]}
    return [float(text in false) for text in completions]
"""


def asks(name, *more):
    def change(folder):
        (folder / "mine.py").write_text(FUNCTIONS)
        return [f'ppo.rewards=["{folder / name}"]', *more]

    return change


PLANTED = [
    Planted("reward-missing", "error", "ppo.rewards", "alike", asks("mine.py:alik")),
    Planted("reward-missing", "error", "ppo.rewards", "mend the path", asks("other.py:alike")),
    Planted("reward-missing", "error", "ppo.rewards", "names no function", asks("mine.py")),
    Planted("reward-missing", "error", "ppo.rewards", "config.json", lambda folder: [f'ppo.rewards=["{folder}"]']),
    Planted("reward-flat", "error", "ppo.rewards", "nothing to climb", asks("mine.py:alike")),
    Planted("reward-faulty", "error", "ppo.rewards", "KeyError", asks("mine.py:broken")),
    Planted("reward-faulty", "error", "ppo.rewards", "nan", asks("mine.py:nan")),
    Planted("reward-faulty", "error", "ppo.rewards", "1 scores for 64 answers", asks("mine.py:few")),
    Planted("reward-sign", "warning", "ppo.rewards", "false answer higher in 32 of 32", asks("mine.py:lover_of_falsehood")),
]


@pytest.mark.parametrize("planted", PLANTED, ids=ids(PLANTED))
def test_a_reward_that_cannot_be_climbed_is_found(planted, tmp_path):
    assert_found(planted, tmp_path)


def test_a_reward_that_can_be_climbed_is_not_found_and_a_wrong_sign_is_mended_by_its_weight(tmp_path):
    for name, weight in (("lengths", 1.0), ("lover_of_falsehood", -1.0)):
        changes = asks(f"mine.py:{name}", f"ppo.reward_weights=[{weight}]")(tmp_path)
        assert [
            f for rule in ("reward-faulty", "reward-flat", "reward-sign") for f in find(rule, facts("laptop", changes))
        ] == []


def test_a_reward_function_that_takes_for_ever_is_noted(tmp_path, monkeypatch):
    from truthward.check import rewards

    (tmp_path / "slow.py").write_text("def slow(**kwargs):\n    import time\n    time.sleep(60)\n")
    monkeypatch.setattr(rewards, "PATIENCE", 2)
    named = [f'ppo.rewards=["{tmp_path / "slow.py"}:slow"]']
    assert [f.level for f in find("reward-slow", facts("laptop", named))] == ["note"]


def measured(low, mean, high, margins):
    """A recorded run of the preference model, where the check looks for it."""

    def plant(subject):
        run = subject.planned["reward"].path
        run.mkdir(parents=True)
        metrics = {"validation_accuracy": {"low": low, "mean": mean, "high": high, "n": 84}}
        manifest = {"stage": "reward", "status": "complete", **MADE, "metrics": metrics}
        (run / "manifest.json").write_text(json.dumps(manifest))
        write(run / "margins.jsonl", [{"id": str(i), "principle": "p", "margin": m} for i, m in enumerate(margins)])
        return run

    return plant


@pytest.mark.parametrize(
    ("accuracy", "margins", "rule", "level"),
    [
        ((0.62, 0.68, 0.74), [0.5, -0.1, 1.2], None, None),
        ((0.25, 0.31, 0.40), [0.5, -0.1, 1.2], "reward-inverted", "error"),
        ((0.47, 0.54, 0.60), [0.5, -0.1, 1.2], "reward-at-chance", "warning"),
        ((0.62, 0.68, 0.74), [1e-4, 2e-4, 0.0], "reward-scale", "warning"),
    ],
)
def test_a_preference_model_is_judged_by_what_was_measured_of_it(tmp_path, accuracy, margins, rule, level):
    subject = facts("laptop", [f"runs={tmp_path}"])
    run = measured(*accuracy, margins)(subject)
    found = [f for name in ("reward-inverted", "reward-at-chance", "reward-scale") for f in find(name, subject)]
    assert [(f.rule, f.level, f.where) for f in found] == ([(rule, level, str(run))] if rule else [])


@pytest.mark.parametrize(("gate", "level"), [("block", "error"), ("warn", "warning")])
def test_a_judge_that_was_measured_and_did_not_qualify_is_found(tmp_path, gate, level):
    subject = facts("laptop", [f"runs={tmp_path}", f"judge.gate={gate}"])
    run = subject.planned["constitution"].path
    run.mkdir(parents=True)
    for chosen, expected in (({"p": "contrast"}, []), ({}, [level])):
        judge = {"judge": {"methods": {}, "principles": {}, "chosen": chosen}}
        (run / "manifest.json").write_text(json.dumps({"stage": "constitution", "status": "running"} | MADE | judge))
        assert [f.level for f in find("judge-unqualified", subject)] == expected


def test_the_constitutions_own_pairs_are_looked_at_once_they_are_made(tmp_path):
    subject = facts("laptop", [f"runs={tmp_path}"])
    subject.planned["constitution"].path.mkdir(parents=True)
    write(subject.planned["constitution"].path / "preferences.jsonl", [pair("Why?", "So.", "So.")])
    assert [f.where for f in find("pair-equal", subject)] == ["constitution"]
