"""Peak memory of each trained stage, as the check predicts it and as it was measured: ``python bench/memory.py RECIPE ...``.

Every stage of the recipe is run (what is done already is not run again); give overrides to make them short, e.g.
``python bench/memory.py recipes/laptop.toml reward.max_prompts=100 dpo.max_prompts=100 ppo.iterations=1 --why bench``.
"""

from __future__ import annotations

import os
import subprocess
import sys

from truthward import stage
from truthward.check.facts import TRAINED, Facts
from truthward.check.machine import chosen_width
from truthward.check.memory import GB, predict
from truthward.ledger import CODE, is_done, plan
from truthward.recipe import load_recipe


def main() -> None:
    """Run what is not there, then print a table."""
    options = stage.arguments("memory: predicted and measured").parse_args()
    recipe = load_recipe(options.recipe, options.overrides, options.why)
    os.environ[stage.CHECKED] = stage.plan_digest(recipe)
    for planned in plan(recipe).values():
        if planned.stage != "evals" and not is_done(planned.path):
            words = [options.recipe, *options.overrides, *(["--why", options.why] if options.why else [])]
            module = CODE.get(planned.stage, planned.stage)
            subprocess.run([sys.executable, "-m", module, *words], check=True)
    facts = Facts(recipe, options.recipe)
    print("| stage | predicted GB | measured GB | predicted / measured | of it: runtime, weights, activations, logits |")
    print("|---|---|---|---|---|")
    for name, _ in facts.uses(*TRAINED):
        run = facts.run(name)
        width = {"torch.float32": 4, "torch.bfloat16": 2}.get(run.manifest.get("dtype", ""), 0) or chosen_width(facts)
        predicted = predict(facts, name, "cpu", width)
        if predicted and run.done:
            measured, total = run.manifest["peak_memory_gb"], predicted.total / GB
            parts = ", ".join(
                f"{v / GB:.2f}" for v in (predicted.runtime, predicted.weights, predicted.activations, predicted.logits)
            )
            print(f"| {name} | {total:.2f} | {measured:.2f} | {total / measured:.2f} | {parts} |")


if __name__ == "__main__":
    main()
