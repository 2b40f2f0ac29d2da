"""A task whose truth is known: the answer's worth is a function that can be read, so what a policy learns can be checked.

The world: a tiny Llama over bytes that was taught to write random strings of 32 characters. Gold wants many different
letters of a-m and no character twice. A proxy is a preference model of the real ``reward`` stage, trained on pairs of the
tiny model's own answers with labels drawn from gold by Bradley and Terry's model. PPO is the real ``rl.ppo``.
"""

from __future__ import annotations

import importlib
import json
import math
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rl.ppo import PpoRun
from rl.rollout import draw_seed
from truthward import chat, models
from truthward.ledger import open_run
from truthward.recipe import load_recipe
from truthward.stage import run_stage

ALPHABET = "abcdefghijklmnopqrstuvwxyz012345"
WANTED = frozenset("abcdefghijklm")
LIMIT = 16  # tokens of an answer, the end token included
REPEAT = -0.5
GAIN = 8
CODE = {"base": "truthward.base", "reward": "reward.__main__"}
PROMPTS = [a + b for a in ALPHABET[:8] for b in ALPHABET[:8]]
LABEL_TEMPERATURE = 0.05  # gold's standard deviation over the first model's answers is 0.10
GOLD = f"{__file__}:gold"

RECIPE = """
unexplained = "warn"
name = "synthetic"
seed = {seed}
runs = "{runs}"
stages = {stages}
[model]
base = "{home}/model"
dtype = "float32"
threads = 1
[reward]
parent = "base"
preferences = ["{runs}/pairs.jsonl"]
validation = "{home}/bank"
learning_rate = 3e-3
batch_size = 16
micro_batch_size = 16
epochs = 4
checkpoint_every = 1000
[ppo]
parent = "base"
prompts = "{home}/prompts.jsonl"
max_new_tokens = {limit}
iterations = 40
rollouts = 64
group_size = 8
minibatches = 2
micro_batch_size = 32
learning_rate = 5e-3
truncation_penalty = 0.0
[guard]
probe_every = 0
"""


# ---------------------------------------------------------------------------------------------------------- the truth


def gold(completions: list[str]) -> list[float]:
    """The worth of answers, in [-0.5, 13/16].

    A character earns 1/16 if it is one of a-m and 0 if not; where it stood in the answer before it costs 1/32 instead.
    """
    return [sum(_worth(text[:LIMIT])) / LIMIT for text in completions]


def _worth(text: str) -> Iterator[float]:
    for i, character in enumerate(text):
        yield REPEAT if character in text[:i] else float(character in WANTED)


# ---------------------------------------------------------------------------------------------------------- the world


def strings(count: int, seed: int, low: int = LIMIT // 2, high: int = LIMIT - 1) -> list[str]:
    """Random strings of ``low`` to ``high`` characters."""
    draw = random.Random(seed)
    return ["".join(draw.choices(ALPHABET, k=draw.randint(low, high))) for _ in range(count)]


def build(home: Path, steps: int = 300, batch: int = 32, rate: float = 3e-3) -> None:
    """Write the model that every run starts from, the prompts, and pairs in gold's true order to validate proxies on."""
    model, tokenizer = models.fetch_base(models.TINY, seed=0)
    for matrix in (p.data for p in model.parameters() if p.dim() == 2):
        matrix.mul_(GAIN)  # at their usual size characters lie so near that no state tells them apart
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    texts, questions = strings(steps * batch, seed=0), strings(steps * batch, 1, 2, 2)
    for step in range(steps):
        part = slice(step * batch, (step + 1) * batch)
        answers = [chat.answer_ids(tokenizer, text) for text in texts[part]]
        prompts = [chat.prompt_ids(tokenizer, chat.user(question)) for question in questions[part]]  # all of one length
        padding = [LIMIT - len(answer) for answer in answers]
        rows = list(zip(prompts, answers, padding, strict=True))
        ids = torch.tensor([p + a + [0] * n for p, a, n in rows])
        labels = torch.tensor([[-100] * len(p) + a + [-100] * n for p, a, n in rows])
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        decay.step()
    model.save_pretrained(home / "model")
    tokenizer.save_pretrained(home / "model")
    _write(home / "prompts.jsonl", [{"id": q, "prompt": q} for q in PROMPTS])
    held_out = strings(512, seed=2)
    pairs = [sorted(pair, key=_gold_of) for pair in zip(held_out[::2], held_out[1::2], strict=True)]
    bank = [{"question": f"v{i}", "true": [t], "false": [f]} for i, (f, t) in enumerate(pairs) if _gold_of(f) < _gold_of(t)]
    _write(home / "bank" / "gold.jsonl", [{"id": q["question"], "topic": "gold", "kind": "fact", **q} for q in bank])


def label(path: Path, answers: list[str], count: int, seed: int) -> None:
    """Write ``count`` preferences between answers, each to a prompt of its own.

    The label is drawn: the first of a pair is preferred with probability ``sigmoid(difference of gold / temperature)``.

    Args:
        path: the file.
        answers: at least twice ``count``.
        count: of pairs.
        seed: of the labels.
    """
    draw, rows = random.Random(seed), []
    for k in range(count):
        first, second = answers[2 * k : 2 * k + 2]
        first_wins = draw.random() < 1 / (1 + math.exp((_gold_of(second) - _gold_of(first)) / LABEL_TEMPERATURE))
        chosen, rejected = (first, second) if first_wins else (second, first)
        prompt = ALPHABET[k // 32 % 32] + ALPHABET[k % 32]
        rows.append({"prompt": prompt * (1 + k // 1024), "chosen": chosen, "rejected": rejected, "source": "gold"})
    _write(path, rows)


def _gold_of(text: str) -> float:
    return gold([text])[0]


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------- the runs


@contextmanager
def opened(home: Path, seed: int, *overrides: str, labels: int = 0) -> Iterator[PpoRun]:
    """A PPO run that is set up and has not begun, in a folder of its own.

    Args:
        home: where :func:`build` wrote.
        seed: of everything the run draws.
        overrides: of the recipe.
        labels: pairs that a proxy is trained on, which then is the reward and gold only watches; 0: gold is the reward.
    """
    with tempfile.TemporaryDirectory(dir=home) as folder:
        runs = Path(folder)
        stages, rewards, weights = ["base", "ppo"], [GOLD], [1.0]
        if labels:
            stages, rewards, weights = ["base", "reward", "ppo"], ["reward", GOLD], [1.0, 0.0]
            label(runs / "pairs.jsonl", strings(2 * labels, seed=1000 + seed), labels, seed)
        path = runs / "synthetic.toml"
        path.write_text(
            RECIPE.format(home=home, runs=runs, seed=seed, limit=LIMIT, stages=json.dumps(stages)), encoding="utf-8"
        )
        given = (f"ppo.rewards={json.dumps(rewards)}", f"ppo.reward_weights={weights}")
        recipe = load_recipe(path, [*given, *overrides])
        for stage in stages[:-1]:
            run_stage(
                recipe, stage, importlib.import_module({"base": "truthward.base", "reward": "reward.__main__"}[stage]).run
            )
        with open_run(recipe, "ppo") as this:
            yield PpoRun(recipe, this)


class Curve(NamedTuple):
    """A run, one number an iteration: mean gold and proxy scores of the answers sampled, and their mean KL in nats."""

    gold: list[float]
    proxy: list[float]
    kl: list[float]


def climb(ppo: PpoRun) -> Curve:
    """All iterations of a run."""
    rows = [ppo.iterate(lambda n: None) for _ in range(ppo.table.iterations)]
    proxy = [row.get("score/reward", math.nan) for row in rows]
    return Curve([row[f"score/{GOLD}"] for row in rows], proxy, [row["kl/answer"] for row in rows])


def pool(ppo: PpoRun, count: int) -> tuple[list[float], list[float]]:
    """Proxy and gold scores of ``count`` answers of the model as it stands."""
    proxy: list[float] = []
    texts: list[str] = []
    ppo.sampler.refresh()
    for start in range(0, count, 512):
        prompts = [ppo.prompts[k % len(ppo.prompts)] for k in range(512)]
        prompts.sort()  # so that answers to one prompt share its forward pass
        seeds = [draw_seed(ppo.recipe.seed, "pool", start + k) for k in range(512)]
        batch = ppo.sampler.sample(prompts, seeds)
        with torch.no_grad():
            proxy += ppo.actor_critic("reward", batch.forest(list(range(512)))).tolist()
        texts += [chat.decode(ppo.tokenizer, ids) for ids in batch.answers]
    return proxy, gold(texts)
