"""``python -m evals RECIPE``: measure each model stage, compare it with its parent and the base, apply the gate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from evals import answers, benchmarks, comparison, first, fluency, harness, listening, open_answers, suite
from evals.asking import Exam
from evals.baselines import learn_style, style_baselines
from evals.suite import Scored
from truthward import hardware, models
from truthward.banks import Labelled
from truthward.console import plain, say
from truthward.errors import GateFailed
from truthward.ledger import Run, is_done, plan, plan_evals, write_json
from truthward.reading import parse_json, read_text
from truthward.recipe import labels_path, most_of
from truthward.records import Prompt, Question, draw, read_rows
from truthward.stage import main
from truthward.stats import Interval
from truthward.tables import HEARD, Recipe
from truthward.tracking import tracked

UNTRAINED = 32  # questions of a set that a model of random weights is asked
COMPARED = {"parent": "against_parent", "base": "against_base"}


def names(recipe: Recipe) -> list[str]:
    """The evals whose model is there to be scored."""
    planned = {name: this for name, this in plan(recipe).items() if this.stage == "evals"}
    return [name for name, this in planned.items() if is_done(this.path.parent / this.parents["model"])]


def run(recipe: Recipe, this: Run) -> None:
    """Measure one model and write ``evals.json``.

    Raises:
        GateFailed: by a metric that the recipe gates it is surely worse than its parent.
    """
    table, model_run = recipe.evals, this.parent("model")
    style_bank = read_rows(table.style_bank, Question)
    by_name = {**suite.exams(learn_style(style_bank)), **benchmarks.EXAMS, "ifeval": harness.IFEVAL}
    comparison.require_known(table, by_name, recipe.name)
    rows = suite.questions(recipe, model_run.stage)
    brief = model_run.stage in table.brief
    if not brief:
        rows |= benchmarks.read({name: path for name, path in table.files.items() if name != "ifeval"}, table.primer)
        harness.require(table)
    tokenizer = models.load_tokenizer(model_run)
    dtype, _ = hardware.set_up(recipe.model, this)
    model = models.load(model_run, dtype)
    spoken, judge = _listen(recipe, model_run, model, tokenizer, {name: rows.pop(name) for name in HEARD if name in rows})
    scored = [*suite.score_model(model, tokenizer, rows, by_name, table.tokens_a_batch), *spoken]
    if "ifeval" in table.files and not brief:
        scored += harness.follow_instructions(model, tokenizer, table.files["ifeval"], most_of(recipe, "ifeval"))
    measured = suite.measure(scored, by_name, table.resamples, recipe.seed)
    if table.lm_eval and not brief:
        measured |= harness.run_tasks(model, tokenizer, table.lm_eval, most_of(recipe, "lm_eval"))
    baselines = style_baselines(rows, by_name, style_bank)
    if model_run.stage == "base":
        baselines["random weights"] = _untrained(recipe, model, tokenizer, rows, by_name)
    result: dict[str, Any] = {
        "model": model_run.path.name,
        "stage": model_run.stage,
        "bank": table.truth,
        "split": table.split,
        "dtype": str(dtype),
        "dtype_reason": this.manifest["dtype_reason"],
        "about": _about(by_name, measured),
        "metrics": measured,
        "by_topic": _by_topic(recipe, scored, by_name),
        "baselines": baselines,
        "open_judge": judge,
        "items": [asdict(s) for s in scored],
        "first_questions": first.answers(model, tokenizer, read_rows(table.first_questions, Prompt)),
    }
    for role, key in COMPARED.items():
        other = _earlier(recipe, model_run, role)
        if other:
            result[key] = comparison.compare(scored, other, by_name, table, recipe.seed)
    write_json(this.path / "evals.json", result)
    _report(result)
    gate = comparison.verdict(table, result.get("against_parent"), result.get("against_base"))
    with tracked(recipe, this):
        this.finish(metrics={n: i for n, i in result["metrics"].items() if i}, gate=gate)
    enforce(recipe, this)


def enforce(recipe: Recipe, this: Run) -> None:
    """Stop the pipeline where the recorded verdict says so and nobody overrode it; also asked of evals that are there."""
    gate = this.manifest.get("gate", {})
    if gate.get("override"):
        say(f"  [yellow]gate overridden[/] by {plain(gate['override']['who'])}: {plain(gate['override']['reason'])}")
    elif gate.get("mode") == "block":
        raise GateFailed(
            f"{this.manifest['parents']['model']} is worse than its parent: {gate['text']}\n"
            f'{_flipped(this)}  to do: look at {this.path / "evals.json"}, then change the stage; --override "reason" goes '
            "on and stays on record"
        )
    elif gate.get("mode") == "warn":
        say(f"  [yellow]warning[/]: worse than its parent: {gate['text']}")


def _flipped(this: Run, most: int = 5) -> str:
    """Items of the blocked sets whose verdict turned for the worse, as lines."""
    result = _read(this.path / "evals.json")
    sets = {name.partition(".")[0] for name in this.manifest["gate"]["worse"]}
    compared = [result[key] for key in COMPARED.values() if key in result]
    flipped: list[dict[str, Any]] = next((against["flipped"] for against in compared if against["flipped"]), [])
    worse = [f for f in flipped if f["set"] in sets and not f["better"]]
    lines = [f"  {f['set']}/{f['id']}: {f['before']!r} became {f['after']!r}\n" for f in worse[:most]]
    more = [f"  and {len(worse) - most} more\n"] if len(worse) > most else []
    return "".join(["  turned for the worse:\n", *lines, *more]) if worse else ""


def _listen(
    recipe: Recipe, model_run: Run, model: Any, tokenizer: Any, rows: Mapping[str, list[Any]]
) -> tuple[list[Scored], dict[str, Any] | None]:
    """What the model says in its own words, graded set by set; and what the judge of open answers was found to be worth.

    The base reads the answers, of open questions as their judge and of all sets for how likely it finds them; it is loaded
    once for both.
    """
    table, first = recipe.evals, models.chain(model_run)[0]
    temperature = 0.0 if model_run.stage in table.brief else table.temperature
    said = answers.answer_all(model, tokenizer, rows, temperature=temperature, seed=recipe.seed)
    fluent, is_base = "fluency" in table.sets, first.path == model_run.path
    earlier = None if is_base else _earlier(recipe, model_run, "base") or {"items": []}
    reader = model
    if not is_base and said and (fluent or "open" in rows):
        reader = models.load(first, next(model.parameters()).dtype)
    scored, record = [], None
    for name in [name for name in table.sets if rows.get(name) or (name == "fluency" and said)]:
        if name == "short":
            scored += listening.score_short(rows[name], said, listening.base_values(earlier, name))
        elif name == "instructions":
            scored += listening.score_instructions(rows[name], said)
        elif name == "open":
            record = (earlier or {}).get("open_judge") or _measure_judge(recipe, reader, tokenizer)
            scored += open_answers.score_open(said, rows[name], reader, tokenizer, record)
        else:
            nats = fluency.nats_a_token(reader, said, table.tokens_a_batch)
            known = fluency.Vocabulary(tokenizer, suite.known_texts(recipe))
            scored += fluency.score_fluency(said, known, nats, listening.base_values(earlier, name))
    return scored, record


def _measure_judge(recipe: Recipe, judge: Any, tokenizer: Any) -> dict[str, Any]:
    """What the base model is worth as the judge of open answers; measured once, at the base."""
    labelled = read_rows(labels_path(recipe), Labelled)
    record = open_answers.measure_judge(judge, tokenizer, labelled, recipe.evals.resamples, recipe.seed)
    for name, found in record.items():
        verdict = "qualified" if found["qualified"] else "at chance, gives no score"
        say(f"  judge of open answers, {name}: AUROC {Interval(**found['auroc'])} {verdict}")
    return record


def _untrained(
    recipe: Recipe, model: Any, tokenizer: Any, rows: Mapping[str, list[Any]], by_name: Mapping[str, Exam]
) -> dict[str, float]:
    """Questions of the sets that style can win put to random weights of the same shape, some of each."""
    some = {name: draw(r, UNTRAINED, recipe.seed) for name, r in rows.items() if by_name[name].style}
    noise = models.untrained(model.config, recipe.seed, next(model.parameters()).dtype)
    scored = suite.score_model(noise, tokenizer, some, by_name, recipe.evals.tokens_a_batch)
    own = {name: [s for s in scored if s.set == name] for name in some}
    return {key: value for name, s in own.items() for key, value in suite.means(s, by_name[name], name).items()}


def _about(by_name: Mapping[str, Exam], measured: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """What each metric is called and which way is better, for whoever reads the file."""
    found = {}
    for name in measured:
        own, _, key = name.partition(".")
        metric = by_name[own].metrics[key] if own in by_name else None
        found[name] = {"label": metric.label if metric else key, "better": metric.better if metric else ""}
    return found


def _by_topic(recipe: Recipe, scored: Sequence[Scored], by_name: Mapping[str, Exam]) -> dict[str, dict[str, Any]]:
    """Set -> topic -> every metric, over the topic's questions alone."""
    found: dict[str, dict[str, Any]] = {}
    for name, topic in dict.fromkeys((s.set, s.topic) for s in scored):
        own = [s for s in scored if (s.set, s.topic) == (name, topic)]
        found.setdefault(name, {})[topic] = suite.measure(own, by_name, recipe.evals.resamples, recipe.seed)
    return found


def _earlier(recipe: Recipe, model_run: Run, role: str) -> dict[str, Any] | None:
    """The evals of the stage that this model started from (or of the base), if they are there."""
    parents = model_run.manifest["parents"]
    if not parents:
        return None
    wanted = parents.get("start", parents["model"]) if role == "parent" else models.chain(model_run)[0].path.name
    other = Run.find(model_run.path.parent / wanted)
    path = plan_evals(recipe, other).path / "evals.json" if other.manifest else None
    return _read(path) if path and path.exists() else None


def _read(path: Path) -> dict[str, Any]:
    return parse_json(read_text(path), str(path))


def _report(result: dict[str, Any]) -> None:
    """A line for each metric of the truth set and the first of every other: interval, difference to parent and base."""
    shown: set[str] = set()
    compared = {against["stage"]: against["differences"] for key in COMPARED.values() if (against := result.get(key))}
    for name, interval in result["metrics"].items():
        own = name.partition(".")[0]
        if not interval or (own in shown and own not in ("truth", "lm_eval")):
            continue
        shown.add(own)
        line = f"  {name:26} {Interval(**interval)}"
        for stage, differences in compared.items():
            found = differences.get(name)
            line += f"   {comparison.signed(found)} against {stage}" if found else ""
        say(line)


if __name__ == "__main__":
    main("evals", run, expand=names, again=enforce)
