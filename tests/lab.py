"""A small world to test in: a tiny model whose answers depend on every word, a little data, and a recipe over both."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from truthward import models
from truthward.ledger import CODE, Run, open_run, plan, write_text
from truthward.principles import Principle
from truthward.recipe import Recipe, load_recipe
from truthward.stage import run_stage

ROOT = Path(__file__).parent.parent
PARENTS = ("base", "sft", "constitution", "reward", "dpo")

RECIPE = """
unexplained = "warn"
seed = 3
runs = "{runs}"
[model]
base = "{home}/sharp"
dtype = "float32"
threads = 1
[sft]
data = ["{home}/demonstrations.jsonl"]
max_length = 96
batch_size = 2
learning_rate = 1e-2
lora_rank = 4
[constitution]
principles = ["{root}/constitution/principles.toml"]
prompts = ["{home}/prompts.jsonl"]
examples = "{root}/constitution/examples.toml"
max_prompts = 2
max_new_tokens = 6
[judge]
bank = "{home}/judge.jsonl"
methods = ["contrast", "likelihood"]
gate = "warn"
[reward]
preferences = ["{home}/bank", "constitution"]
validation = "{home}/bank"
principle_bank = "{home}/judge.jsonl"
batch_size = 4
micro_batch_size = 2
learning_rate = 1e-2
lora_rank = 4
epochs = 2
[dpo]
preferences = ["{home}/bank", "constitution"]
batch_size = 4
micro_batch_size = 2
learning_rate = 1e-2
lora_rank = 4
epochs = 2
[ppo]
parent = "dpo"
prompts = "{home}/prompts.jsonl"
iterations = 3
rollouts = 8
micro_batch_size = 2
max_new_tokens = 10
learning_rate = 1e-3
[check]
accept = ["leak-exact", "leak-validation"]
[evals]
truth = "{home}/bank"
resamples = 400
first_questions = "{home}/prompts.jsonl"
sets = ["truth"]
gate = "off"
"""


def sharpen(model: Any, eos: int) -> Any:
    """Scale random weights up: at their usual size logits hardly depend on the context, and a leak would not show."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(10)
        model.get_input_embeddings().weight[eos] *= 2.5  # answers of every length, some cut off
    return model.eval()


@dataclass(frozen=True)
class Lab:
    """Data and a recipe in one folder, run directories in another."""

    home: Path
    runs: Path

    def recipe(self, *overrides: str) -> Recipe:
        path = self.home / "lab.toml"
        write_text(path, RECIPE.format(home=self.home, runs=self.runs, root=ROOT))  # whole: other ranks read it
        return load_recipe(path, list(overrides))

    def run(self, stage: str, *overrides: str) -> Run:
        """Run a stage whose parents are there, as its script would, and return its record."""
        module = CODE.get(stage, stage)
        module = importlib.import_module(module if stage in CODE else f"{module}.__main__")
        recipe = self.recipe(*overrides)
        run_stage(recipe, stage, module.run)
        return Run.load(plan(recipe)[stage].path)

    @contextmanager
    def ppo(self, *overrides: str) -> Iterator[Any]:
        """A PPO run that is set up and has not begun."""
        from rl.ppo import PpoRun

        recipe = self.recipe(*overrides)
        with open_run(recipe, "ppo") as this:
            yield PpoRun(recipe, this)

    def copy(self, runs: Path) -> Lab:
        """The same world with its runs in another folder; they keep their names, as these don't depend on the place."""
        shutil.copytree(self.runs, runs, ignore=shutil.ignore_patterns("ppo-*"))
        return Lab(self.home, runs)


def furnish(home: Path) -> Lab:
    """Write model and data."""
    model, tokenizer = models.fetch_base(models.TINY, 1)
    sharpen(model, tokenizer.eos_token_id).save_pretrained(home / "sharp")
    tokenizer.save_pretrained(home / "sharp")
    subjects = ["tea", "a bee", "the moon", "iron", "salt water", "old age"]
    write(home / "prompts.jsonl", [{"id": f"p{i}", "prompt": f"Tell me of {s}."} for i, s in enumerate(subjects)])
    turns = [[("user", f"What is {s}?"), ("assistant", f"It is {'so ' * i}{s}.")] for i, s in enumerate(subjects)]
    rows = [[{"role": role, "content": text} for role, text in turn] for turn in turns]
    write(home / "demonstrations.jsonl", [{"id": f"d{i}", "messages": m} for i, m in enumerate(rows)])
    (home / "bank").mkdir()
    questions = [
        {
            "id": f"q{i}",
            "topic": "things",
            "kind": "fact",
            "question": f"Is {s} real?",
            "true": [f"Yes, {s} is."],
            "false": [f"Yes, {s} " + "is not " * (i % 3 + 1)],
        }
        for i, s in enumerate(subjects)
    ]
    write(home / "bank" / "things.jsonl", questions)
    names = ["short-and-plain", "facts-over-myths"]
    pairs = [
        {"id": f"{n}-{i}", "principle": n, "prompt": f"Is {s} real?", "better": f"{s} is.", "worse": f"{s} was."}
        for n in names
        for i, s in enumerate(subjects)
    ]
    write(home / "judge.jsonl", pairs)
    return Lab(home, home / "runs")


def distillation(lab: Lab, *more: str) -> list[str]:
    """Settings of a small distillation of the lab's sft."""
    bank, prompts, principles = lab.home / "bank", lab.home / "prompts.jsonl", ROOT / "constitution/principles.toml"
    table = {
        "use": ["truth"],
        "principles": [str(principles)],
        "prompts": [str(bank), str(prompts)],
        "max_prompts": 8,
        "samples": 2,
        "max_new_tokens": 6,
        "batch_size": 4,
        "micro_batch_size": 2,
        "learning_rate": 1e-2,
        "lora_rank": 4,
        "epochs": 2,
        "checkpoint_every": 1,
    }
    return [
        'stages=["base","sft","distill"]',
        *(f"distill.{key}={json.dumps(value)}" for key, value in table.items()),
        *more,
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def principle(name: str, weight: float = 1.0, tags: tuple[str, ...] = ()) -> Principle:
    """A principle all of whose texts say which they are."""
    texts = {key: f"{key} {name}" for key in ("title", "text", "critique", "revision", "why", "follow", "violate")}
    return Principle(id=name, version=2, weight=weight, tags=list(tags), **texts)
