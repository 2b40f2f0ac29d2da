"""``python -m evals.score RECIPE --run DIR [--run DIR ...] [key=value ...]``: evals of models that are there.

``python -m evals`` measures the models that the recipe would make now; one that was made with other settings or by earlier
code has another name and is not found. Here a run is named by its directory, and the recipe says only how it is measured.
Name the base first: others are compared with it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from evals.__main__ import run
from truthward.console import plain, say
from truthward.errors import GateFailed
from truthward.ledger import Run, complete, entered, plan_evals
from truthward.reasons import require_reasons
from truthward.recipe import load_recipe
from truthward.stage import arguments, guarded
from truthward.tables import Recipe


def score(recipe: Recipe, folder: str) -> Path:
    """Measure one model unless these very evals of it are there; a gate that shuts is told, and stops nothing.

    Returns:
        the evals' run directory, beside the model's.
    """
    model = complete(Path(folder))
    home = model.path.resolve().parent
    recipe = recipe.model_copy(update={"runs": str(home.parent), "name": home.name})
    planned = plan_evals(recipe, Run(home / model.path.name, model.manifest))
    with entered(recipe, planned) as this:
        say(f"[bold]evals of {plain(model.path.name)}[/] {'up to date' if this.done else 'run'} in {plain(planned.path)}")
        if not this.done:
            try:
                run(recipe, this)
            except GateFailed as failure:
                say(f"  [yellow]the gate would stop[/]: {plain(failure)}")
    return planned.path


def main() -> None:
    parser = arguments("evals of models that are there")
    parser.add_argument("--run", action="append", required=True, help="run directory of a model; the base's first")
    options = parser.parse_intermixed_args()

    def begin() -> None:
        recipe = load_recipe(options.recipe, options.overrides, options.why)
        require_reasons(recipe, options.recipe)
        for folder in options.run:
            score(recipe, folder)

    sys.path[:0] = [] if str(Path.cwd()) in sys.path else [str(Path.cwd())]
    sys.exit(guarded(begin))


if __name__ == "__main__":
    main()
