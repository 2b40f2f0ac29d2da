"""Two ranks beside one: seconds of an optimizer step of SFT on the same cores, plainly and under each stage of ZeRO.

``python bench/ranks.py RECIPE [STEPS]``. One rank has two threads, two ranks have one each, so that all have two cores,
but one rank on a single core; the rows of a step are the same. Medians over the steps but the first, and the largest rank's
peak of memory. Each way is a start of its own; everything is written to a folder that is gone afterwards.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

import sft.__main__ as stage
from truthward import base, ranks, trainers, zero
from truthward.ledger import peak_memory_gb
from truthward.recipe import load_recipe
from truthward.stage import guarded, run_stage
from truthward.tables import Recipe

ONE_CORE = "one rank, one core"
WAYS = {
    ONE_CORE: ("launch.ranks=1", "launch.zero=0"),
    "one rank, two threads": ("launch.ranks=1", "launch.zero=0"),
    "two ranks": ("launch.ranks=2", "launch.zero=0"),
    "two ranks, ZeRO-1": ("launch.ranks=2", "launch.zero=1"),
    "two ranks, ZeRO-2": ("launch.ranks=2", "launch.zero=2"),
    "two ranks, ZeRO-3": ("launch.ranks=2", "launch.zero=3"),
}
SIZES = ("model.threads=0", "sft.batch_size=4", "sft.packing=false", "sft.micro_batch_size=2", "sft.checkpoint_every=1000")


class Clock(TrainerCallback):
    """When each step ended; ends training after so many."""

    def __init__(self, steps: int) -> None:
        self.steps, self.ends = steps, list[float]()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())
        control.should_training_stop |= len(self.ends) >= self.steps


def recipe_of(path: str, folder: str, *settings: str) -> Recipe:
    return load_recipe(path, [*SIZES, *settings, f"runs={folder}", 'stages=["base","sft"]', 'unexplained="warn"'])


def work(path: str, folder: str, steps: int, *settings: str) -> None:
    """On each rank: some steps; the first says what they took."""
    recipe, clock, begin = recipe_of(path, folder, *settings), Clock(steps), trainers.Guarding.on_train_begin
    ranks.join(recipe.launch, 600)

    def with_clock(self: Any, *args: Any, **kwargs: Any) -> None:
        self.trainer.add_callback(clock)
        begin(self, *args, **kwargs)

    trainers.Guarding.on_train_begin = with_clock  # type: ignore[method-assign]
    zero.enter(recipe.launch)
    run_stage(recipe, "sft", stage.run)
    seconds = [b - a for a, b in zip(clock.ends, clock.ends[1:], strict=False)]
    peak = max(ranks.gather(peak_memory_gb()))
    if ranks.first():
        print("MEASURED", json.dumps([statistics.median(seconds), peak]))
    ranks.leave()


def main() -> None:
    """Each way in turn, then a table."""
    path, steps = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 6
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for way, settings in WAYS.items():
            folder = f"{scratch}/{len(found)}"
            if found:
                shutil.copytree(f"{scratch}/base", folder)
            else:
                run_stage(recipe_of(path, folder), "base", base.run)
                shutil.copytree(folder, f"{scratch}/base")
            count = int(settings[0].partition("=")[2])
            words = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", __file__, "--work"]
            environment = {
                **os.environ,
                "OMP_NUM_THREADS": str(2 // count),
                "WANDB_MODE": "disabled",
                "PYTHONPATH": os.getcwd(),
            }
            words += [path, folder, str(steps), *settings]
            pinned = ["taskset", "-c", str(min(os.sched_getaffinity(0)))] if way == ONE_CORE else []
            done = subprocess.run(
                [*pinned, sys.executable, *words], env=environment, stdout=subprocess.PIPE, text=True, check=True
            )
            (line,) = [line for line in done.stdout.splitlines() if line.startswith("MEASURED")]
            found[way] = json.loads(line.removeprefix("MEASURED"))
    first = found["one rank, two threads"][0]
    print(f"| SFT, {Path(path).stem}, 4 rows a step, {steps - 1} steps | s a step | against one rank | peak GB a rank |")
    print("|---|---|---|---|")
    for way, (seconds, peak) in found.items():
        print(f"| {way} | {seconds:.2f} | {first / seconds:.2f}x | {peak:.2f} |")


if __name__ == "__main__":
    if sys.argv[1] == "--work":
        sys.exit(guarded(lambda: work(sys.argv[2], sys.argv[3], int(sys.argv[4]), *sys.argv[5:])))
    main()
