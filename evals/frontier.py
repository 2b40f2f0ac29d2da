"""``truthward evals frontier RUN``: truth against voice, as a stage's change of the weights is scaled from none to all.

Models between a run and the one that it started from are scored on the tuning topics alone: truthfulness by the probability
of given answers, voice by what is said. ``frontier.json`` is written beside the model, the report draws it, and the stage's
``scale`` is chosen by it (WiSE-FT, Wortsman et al. 2021, arXiv 2109.01903). It costs evals only.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError
from rich.table import Table

from evals import answers, comparison, fluency, listening, suite
from evals.asking import Scored
from evals.baselines import learn_style
from truthward import hardware, models
from truthward.banks import read_bank
from truthward.console import console, plain, say
from truthward.errors import UserError
from truthward.interpolation import between
from truthward.ledger import Run, write_json
from truthward.record.words import interval
from truthward.records import Question, read_rows
from truthward.stage import guarded
from truthward.tables import MODEL_STAGES, Recipe

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0)
SETS = ("truth", "short", "instructions", "text")
SHOWN = {
    "truth.mc2": "MC2",
    "truth.pairs": "pairs",
    "short.right": "short facts right",
    "instructions.followed": "instructions followed",
    "fluency.broken": "broken",
    "text.nats": "nats a byte",
}


def frontier(run: Run, scales: Sequence[float]) -> dict[str, Any]:
    """Score the models between a run and its start.

    Returns:
        what ``frontier.json`` holds: ``points``, each with its ``scale``, ``metrics`` with intervals, and ``differences`` to
        scale 0, paired.

    Raises:
        UserError: the run is no trained chat model, or its recipe is not of this version.
    """
    recipe = _recipe(run)
    by_name = suite.exams(learn_style(read_rows(recipe.evals.style_bank, Question)))
    rows = {name: read_bank(recipe, name) for name in SETS}
    tokenizer = models.load_tokenizer(run)
    dtype, _ = hardware.set_up(recipe.model, Run(run.path, {}))
    known = fluency.Vocabulary(tokenizer, suite.known_texts(recipe))
    points: list[dict[str, Any]] = []
    start: dict[str, Any] = {}
    for scale in scales:
        model = models.ready(between(run, scale), dtype)
        scored = _score(model, tokenizer, rows, by_name, known, recipe)
        measured = suite.measure(scored, by_name, recipe.evals.resamples, recipe.seed)
        point: dict[str, Any] = {"scale": scale, "metrics": {name: value for name, value in measured.items() if value}}
        if scale == 0:
            items = [{"set": s.set, "id": s.id, "values": s.values, "picked": s.picked} for s in scored]
            start = {"model": run.path.name, "stage": run.stage, "items": items}
        elif start:
            point["differences"] = comparison.compare(scored, start, by_name, recipe.evals, recipe.seed)["differences"]
        points.append(point)
        say("  " + ", ".join(f"{label} {interval(point['metrics'][m])}" for m, label in SHOWN.items()) + f" at {scale:g}")
    parents = run.manifest["parents"]
    return {"model": run.path.name, "parent": parents.get("start", parents["model"]), "split": "dev", "points": points}


def _score(
    model: Any, tokenizer: Any, rows: dict[str, list[Any]], by_name: Any, known: fluency.Vocabulary, recipe: Recipe
) -> list[Scored]:
    """What a model's evals would score, with greedy answers alone."""
    given = {name: rows[name] for name in ("truth", "text")}
    said = answers.answer_all(model, tokenizer, {n: rows[n] for n in ("short", "instructions")}, temperature=0.0, seed=0)
    return [
        *suite.score_model(model, tokenizer, given, by_name, recipe.evals.tokens_a_batch),
        *listening.score_short(rows["short"], said, None),
        *listening.score_instructions(rows["instructions"], said),
        *fluency.score_fluency(said, known, [None] * len(said), None),
    ]


def _recipe(run: Run) -> Recipe:
    """The recipe on record, with the evals on the tuning topics."""
    if run.stage not in MODEL_STAGES[1:] or not run.done:
        fix = f"name the complete run of one of {', '.join(MODEL_STAGES[1:])}"
        raise UserError("there is no change of weights to scale", where=str(run.path), fix=fix)
    try:
        recipe = Recipe.model_validate(run.manifest["recipe"])
    except ValidationError as error:
        fix = "make the run again with this version"
        raise UserError("its recipe is not of this version", where=str(run.path), fix=fix) from error
    tuning = recipe.evals.model_copy(update={"split": "dev", "truth": recipe.reward.validation, "sets": list(SETS)})
    return recipe.model_copy(update={"evals": tuning})


def show(found: dict[str, Any]) -> None:
    """A row a scale."""
    table = Table("scale", *SHOWN.values())
    for point in found["points"]:
        table.add_row(f"{point['scale']:g}", *[interval(point["metrics"][name]) for name in SHOWN])
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(prog="truthward evals frontier", description="truth against voice over scales")
    parser.add_argument("run", help="run directory of a trained chat model")
    parser.add_argument("--scales", type=float, nargs="+", default=list(SCALES), help="shares of the change of weights")
    options = parser.parse_args()

    def work() -> None:
        run = Run.load(options.run)
        found = frontier(run, sorted({0.0, *options.scales}))
        write_json(run.path / "frontier.json", found)
        show(found)
        say(f"wrote {plain(run.path / 'frontier.json')}; truthward report draws it")

    sys.exit(guarded(work))


if __name__ == "__main__":
    main()
