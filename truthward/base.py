"""The first stage: fetch the base model and keep it as plain safetensors. ``python -m truthward.base RECIPE``."""

from __future__ import annotations

from truthward.ledger import Run
from truthward.tables import Recipe


def run(recipe: Recipe, this: Run) -> None:
    """Write the base model and its tokenizer."""
    from truthward import models

    models.write_base(this, recipe.model.base, recipe.seed)
    this.finish(metrics={})


if __name__ == "__main__":
    from truthward.stage import main

    main("base", run)
