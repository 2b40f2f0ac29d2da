"""Rules on what PPO climbs: whether its rewards are there, can score, differ, and like known-good answers better."""

from __future__ import annotations

import ast
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

from truthward.check.facts import Facts
from truthward.check.findings import Found, error, note, rule, warning
from truthward.errors import UserError
from truthward.records import Margin, Question, read_rows

PAIRS = 32  # known-good and known-bad answers that a reward function is asked for
PATIENCE = 20  # seconds that it may take
PREFERS = 0.75  # share of pairs, of those scored apart, in which the false answer wins: 24 of 32 by chance in 0.4 %


@rule("reward-missing")
def missing(facts: Facts) -> Found:
    """Rewards that are not there: a function in its file, a classifier in its folder. Hub ids and modules can't be known."""
    why = "PPO comes last and would stop at it"
    for _, ppo in facts.uses("ppo"):
        for name in ppo.rewards:
            path, _, function = name.rpartition(":")
            if path.endswith(".py"):
                names = functions(Path(path))
                if function not in names:
                    fix = f"it has {', '.join(sorted(names)) or 'no functions'}" if Path(path).is_file() else "mend the path"
                    text = f"there is no function {function} in {path}"
                    yield error("reward-missing", "ppo.rewards", text, why=why, fix=fix)
            elif Path(name).is_dir() and name != "reward" and not (Path(name) / "config.json").is_file():
                fix = "give the folder of a sequence classifier as save_pretrained writes it"
                yield error("reward-missing", "ppo.rewards", f"{name} holds no config.json", why=why, fix=fix)
            elif name.endswith(".py"):
                text = f"{name} names no function"
                yield error("reward-missing", "ppo.rewards", text, why=why, fix=f"write {name}:function")


def functions(path: Path) -> set[str]:
    """Names of what a Python file defines or imports at its top level; none if it is not there or not Python."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError):
        return set()
    bound = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    for node in tree.body:
        if isinstance(node, ast.ImportFrom | ast.Import):
            bound += [alias.asname or alias.name for alias in node.names]
        elif isinstance(node, ast.Assign):
            bound += [target.id for target in node.targets if isinstance(target, ast.Name)]
    return set(bound)


@rule("reward-faulty", "reward-flat", "reward-sign", "reward-slow")
def python_rewards(facts: Facts) -> Found:
    """Scores that a reward function gives to true and false answers of the validation questions."""
    for _, ppo in facts.uses("ppo"):
        questions = facts.rows(facts.recipe.reward.validation, Question)[:PAIRS]
        weights = dict(zip(ppo.rewards, ppo.reward_weights or [1.0] * len(ppo.rewards), strict=False))
        for name in (n for n in ppo.rewards if ".py:" in n and questions and weights[n]):
            path, _, function = name.rpartition(":")
            if function not in functions(Path(path)):
                continue
            try:
                scores = _ask(facts, name, questions)
            except subprocess.TimeoutExpired:
                text = f"{name} took over {PATIENCE} s for {2 * len(questions)} answers"
                yield note("reward-slow", "ppo.rewards", text, why=f"an iteration asks it for {ppo.rollouts}")
                continue
            except ValueError as fault:
                fix = "it gets prompts, completions and completion_ids, and returns a finite number for each answer"
                yield error(
                    "reward-faulty", "ppo.rewards", f"{name}: {fault}", why="PPO would stop at its first scores", fix=fix
                )
                continue
            yield from _judge(name, scores, alone=len(ppo.rewards) == 1, sign=math.copysign(1, weights[name]))


def _ask(facts: Facts, name: str, questions: list[Question]) -> list[float]:
    """Scores of the first true answers, then of the first false ones.

    Raises:
        ValueError: the function failed, or gave something else than a finite number for each.
    """
    answers = [q.true[0] for q in questions] + [q.false[0] for q in questions]
    ids = [list(text.encode()) for text in answers]
    if facts.tokenizer is not None:
        ids = facts.tokenizer(answers, add_special_tokens=False)["input_ids"]
    asked = {"prompts": [q.question for q in questions] * 2, "completions": answers, "completion_ids": ids}
    done = subprocess.run(
        [sys.executable, "-m", "truthward.check.probe", name],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    if done.returncode:
        raise ValueError(next(iter(done.stderr.strip().splitlines()[::-1]), "it failed without a message"))
    scores = json.loads(done.stdout.strip().splitlines()[-1])
    if len(scores) != len(answers):
        raise ValueError(f"{len(scores)} scores for {len(answers)} answers")
    if bad := [s for s in scores if not math.isfinite(s)]:
        raise ValueError(f"it gave {bad[0]}")
    return list(scores)


def _judge(name: str, scores: list[float], *, alone: bool, sign: float) -> Found:
    if max(scores) - min(scores) < 1e-6:
        tell = error if alone else warning
        text = f"{name} gives {scores[0]:g} to each of {len(scores)} answers, true and false"
        why = "without differences there is nothing to climb"
        yield tell("reward-flat", "ppo.rewards", text, why=why, fix="see whether it reads the completions")
        return
    half = len(scores) // 2
    apart = [sign * (good - bad) for good, bad in zip(scores[:half], scores[half:], strict=True) if good != bad]
    worse = sum(d < 0 for d in apart)
    if len(apart) >= 12 and worse >= PREFERS * len(apart):
        text = f"{name} scores the false answer higher in {worse} of {len(apart)} pairs of a true and a false one"
        yield warning("reward-sign", "ppo.rewards", text, why="PPO would climb it", fix="turn the sign, or its weight's")


@rule("reward-inverted", "reward-at-chance", "reward-scale")
def preference_model(facts: Facts) -> Found:
    """The recipe's own preference model, once it has been trained and measured."""
    run = facts.run("reward")
    used = [ppo for _, ppo in facts.uses("ppo") if "reward" in ppo.rewards]
    if facts.toy or not used or not run.done:
        return
    found = run.manifest["metrics"]["validation_accuracy"]
    text = f"right in {found['mean']:.3f} [{found['low']:.3f}, {found['high']:.3f}] of {found['n']} held-out questions"
    if found["high"] < 0.5:
        why = "it likes false answers better, and PPO would climb that"
        yield error("reward-inverted", str(run.path), text, why=why, fix="see which side of its pairs is called chosen")
    elif found["low"] <= 0.5:
        why = "its scores do not tell true from false, so that PPO climbs something else"
        yield warning("reward-at-chance", str(run.path), text, why=why, fix="more pairs, or a higher reward.learning_rate")
    try:
        margins = [m.margin for m in read_rows(run.path / "margins.jsonl", Margin)]
    except UserError:
        return
    if len(margins) > 1 and statistics.stdev(margins) < 0.01:
        text = f"its margins have a spread of {statistics.stdev(margins):.1e}"
        why = "scores are divided by their spread: rounding would be what is climbed"
        yield warning("reward-scale", str(run.path), text, why=why, fix="train it longer, or at a higher rate")
