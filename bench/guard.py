"""What the guard costs: seconds of a step with and without it, alternating, and the guard's own time in a step.

``python bench/guard.py [repeats] [steps]``. Runs SFT of recipes/tiny.toml, whose model is so small that no step is
shorter, in a folder of its own; then judges PPO's rows, an iteration's worth at a time.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

import sft.__main__ as stage
from truthward import base, hardware, trainers
from truthward.guard import rules
from truthward.guard.detectors import repeated_share
from truthward.guard.trainer import Guarding
from truthward.guard.watch import Guard
from truthward.ledger import Run
from truthward.recipe import load_recipe
from truthward.stage import run_stage
from truthward.tables import Guard as Table

HOOKS = ("on_step_begin", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end", "on_log")
OPTIONS = ("model.threads=1", "sft.packing=false", "sft.batch_size=4", "sft.micro_batch_size=4", "sft.checkpoint_every=1000")


class Without(TrainerCallback):
    """Stands where the guard stands, and does nothing."""

    act = None

    def __init__(self, *args: Any) -> None:
        pass


class Clock(TrainerCallback):
    """When each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())


def timed(spent: list[float]) -> type[Guarding]:
    """The guard with a clock around each of its hooks; ``spent`` takes the seconds of each call."""

    def wrap(name: str) -> Any:
        def hook(self: Any, *args: Any, **kwargs: Any) -> None:
            start = time.perf_counter()
            getattr(Guarding, name)(self, *args, **kwargs)
            spent.append(time.perf_counter() - start)

        return hook

    return type("TimedGuarding", (Guarding,), {name: wrap(name) for name in HOOKS})


def train(folder: Path, steps: int, guarding: type) -> list[float]:
    """Seconds of each step of one SFT run but the first three."""
    clock, kept = Clock(), trainers.Guarding
    report = trainers._Report

    class Report(report):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.on_step_end = clock.on_step_end  # type: ignore[method-assign]

    trainers.Guarding, trainers._Report = guarding, Report  # type: ignore[misc, assignment]
    try:
        recipe = load_recipe("recipes/tiny.toml", [f"runs={folder}", f"sft.epochs={steps * 4 / 328:.4f}", *OPTIONS])
        run_stage(recipe, "base", base.run)
        run_stage(recipe, "sft", stage.run)
    finally:
        trainers.Guarding, trainers._Report = kept, report  # type: ignore[misc]
    return [b - a for a, b in zip(clock.ends[2:], clock.ends[3:], strict=False)]


def ppo_seconds(iterations: int = 200, answers: int = 32, tokens: int = 48) -> float:
    """Median seconds of judging one iteration: its row, and the repetition in its answers."""
    row = dict.fromkeys((key for rule in rules.PPO for key in rule.needs), 1.0) | {"skipped": 0, "sampler_gap": 0.0}
    del row["probe/truth"]
    texts, spent = [[(7 * i * k) % 50 for i in range(tokens)] for k in range(answers)], []
    with tempfile.TemporaryDirectory() as folder:
        guard = Guard(Table(), Run(Path(folder)), rules.PPO)
        for step in range(1, iterations + 1):
            start = time.perf_counter()
            statistics.fmean(repeated_share(ids) for ids in texts)
            guard.observe({"step": step, **row})
            spent.append(time.perf_counter() - start)
    return statistics.median(spent)


def main(repeats: int = 3, steps: int = 60) -> None:
    """Print medians over the steps of all repeats, the ratio, and the guard's own share."""
    hardware.use_threads(1)
    seconds: dict[str, list[float]] = {"with": [], "without": []}
    spent: list[float] = []
    for repeat in range(repeats):
        for name, guarding in (("with", timed(spent)), ("without", Without)):
            with tempfile.TemporaryDirectory() as folder:
                seconds[name] += train(Path(folder), steps, guarding)
            print(f"{repeat + 1}/{repeats} {name}: {1e3 * statistics.median(seconds[name]):.2f} ms a step", flush=True)
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    own = sum(spent) / (repeats * steps)
    print(f"step with the guard {1e3 * middle['with']:.2f} ms, without {1e3 * middle['without']:.2f} ms")
    print(f"the guard's own time {1e6 * own:.0f} us a step: {own / middle['without']:.2%}")
    print(f"PPO: {1e3 * ppo_seconds():.2f} ms an iteration of 32 answers with 48 tokens")


if __name__ == "__main__":
    main(*(int(word) for word in sys.argv[1:]))
