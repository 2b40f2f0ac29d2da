"""Peak memory of each trained stage, as the check predicts it and as it was measured: ``python bench/memory.py RECIPE ...``.

Every stage of the recipe is run (what is done already is not run again); give overrides to make them short, e.g.
``python bench/memory.py recipes/laptop.toml reward.max_prompts=100 dpo.max_prompts=100 ppo.iterations=1 --why bench``.
``--ranks 1 2 --zero 0 1 2 3`` measures every combination, each in a folder of its own below the recipe's runs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from truthward import stage
from truthward.check.facts import TRAINED, Facts
from truthward.check.machine import chosen_width
from truthward.check.memory import GB, predict
from truthward.ledger import CODE, is_done, plan
from truthward.recipe import load_recipe
from truthward.tables import Recipe

HEADING = "| ranks | ZeRO | stage | predicted GB | measured GB | predicted / measured | of it: runtime, weights, gradients, \
optimizer, activations, logits, buffers |"


def main() -> None:
    """Run what is not there, then print a table."""
    parser = argparse.ArgumentParser(description="memory: predicted and measured")
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--why", default="bench")
    parser.add_argument("--ranks", nargs="+", type=int, default=[])
    parser.add_argument("--zero", nargs="+", type=int, default=[0])
    options = parser.parse_intermixed_args()
    print(HEADING, "|---|---|---|---|---|---|---|", sep="\n", flush=True)
    for overrides in points(options):
        recipe = load_recipe(options.recipe, overrides, options.why)
        run(recipe, [options.recipe, *overrides, "--why", options.why])
        for line in compared(recipe, options.recipe):
            print(line, flush=True)


def points(options: argparse.Namespace) -> Iterator[list[str]]:
    """Overrides of each combination of ranks and ZeRO's stages; those of the command line alone where none was asked for."""
    if not options.ranks:
        yield options.overrides
    runs = load_recipe(options.recipe, options.overrides, options.why).runs
    for ranks in options.ranks:
        for zero in options.zero:
            where = f"{runs}/ranks-{ranks}-zero-{zero}"
            yield [*options.overrides, f"runs={json.dumps(where)}", f"launch.ranks={ranks}", f"launch.zero={zero}"]


def run(recipe: Recipe, words: list[str]) -> None:
    """Every stage that is not done; the base is taken from a run beside it, where there is one."""
    environment = {**os.environ, stage.CHECKED: stage.plan_digest(recipe)}
    launch = recipe.launch
    for planned in plan(recipe).values():
        if planned.stage == "evals" or is_done(planned.path):
            continue
        beside = [p for p in Path(recipe.runs).parent.glob(f"*/{recipe.name}/{planned.path.name}") if is_done(p)]
        if planned.stage == "base" and beside:
            shutil.copytree(beside[0], planned.path, copy_function=os.link)
            continue
        starter = [sys.executable, "-m"]
        if planned.stage in TRAINED and (launch.world > 1 or launch.zero):
            starter += ["torch.distributed.run", f"--nproc-per-node={launch.ranks}", "--master-port=29531", "-m"]
        words_of_it = [*starter, CODE.get(planned.stage, planned.stage), *words]
        subprocess.run(words_of_it, check=True, env=environment, stdout=subprocess.DEVNULL)


def compared(recipe: Recipe, where: str) -> Iterator[str]:
    """A line of the table for each stage that was trained."""
    facts = Facts(recipe, where)
    for name, _ in facts.uses(*TRAINED):
        done = facts.run(name)
        widths: dict[Any, int] = {"torch.float32": 4, "torch.bfloat16": 2}
        width = widths.get(done.manifest.get("dtype"), 0) or chosen_width(facts)
        predicted = predict(facts, name, "cpu", width)
        if predicted and done.done:
            measured, total = done.manifest["peak_memory_gb"], predicted.total / GB
            parts = ", ".join(f"{v / GB:.2f}" for v in predicted)
            start = f"| {recipe.launch.world} | {recipe.launch.zero} | {name} "
            yield f"{start}| {total:.2f} | {measured:.2f} | {total / measured:.2f} | {parts} |"


if __name__ == "__main__":
    main()
