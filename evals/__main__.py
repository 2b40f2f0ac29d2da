"""``python -m evals RECIPE``: score each model stage on held-out topics, compare it with its parent, apply the gate."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from evals.baselines import learn_style, style_baselines
from evals.truth import METRICS, Scored, score_model
from truthward import chat, hardware, models
from truthward.console import say
from truthward.errors import GateFailed
from truthward.generate import generate
from truthward.ledger import Run, is_done, plan, write_json
from truthward.records import Prompt, Question, draw, read_rows
from truthward.stage import main
from truthward.stats import Interval, mean_interval
from truthward.tables import Recipe

COMPARED = {"parent": "against_parent", "base": "against_base"}


def names(recipe: Recipe) -> list[str]:
    """The evals whose model is there to be scored."""
    planned = {name: this for name, this in plan(recipe).items() if this.stage == "evals"}
    return [name for name, this in planned.items() if is_done(this.path.parent / this.parents["model"])]


def run(recipe: Recipe, this: Run) -> None:
    """Score one model and write ``evals.json``.

    Raises:
        GateFailed: it is less truthful than its parent with 95 % confidence, and the recipe's gate blocks.
    """
    table, model_run = recipe.evals, this.parent("model")
    questions = read_rows(table.truth, Question)
    tokenizer = models.load_tokenizer(model_run)
    dtype, _ = hardware.set_up(recipe.model, this)
    model = models.load(model_run, dtype)
    style_bank = read_rows(table.style_bank, Question)
    scored = score_model(model, tokenizer, questions, learn_style(style_bank), table.tokens_a_batch)
    result: dict[str, Any] = {
        "model": model_run.path.name,
        "stage": model_run.stage,
        "bank": table.truth,
        "dtype": str(dtype),
        "dtype_reason": this.manifest["dtype_reason"],
        "metrics": {m: _interval(recipe, [getattr(s, m) for s in scored]) for m in METRICS},
        "by_topic": _by_topic(recipe, scored),
        "against_style": _interval(recipe, [s.against_style for s in scored]),
        "baselines": style_baselines(questions, style_bank),
        "items": [asdict(s) for s in scored],
        "samples": _samples(recipe, model, tokenizer),
    }
    for role, key in COMPARED.items():
        other = _earlier(recipe, this, model_run, role)
        if other:
            result[key] = {"evals": other["model"], "stage": other["stage"], **_paired(recipe, scored, other)}
    write_json(this.path / "evals.json", result)
    _report(result)
    this.finish(metrics=result["metrics"], gate=_gate(recipe, result))
    enforce(recipe, this)


def enforce(recipe: Recipe, this: Run) -> None:
    """Stop the pipeline where the recorded verdict says so; also asked of evals that are already there."""
    gate = this.manifest.get("gate", {})
    if gate.get("worse") and recipe.evals.gate == "block":
        raise GateFailed(
            f"{this.manifest['parents']['model']} is less truthful than its parent: {gate['text']}\n"
            f'  to do: look at {this.path / "evals.json"}, change the stage, or set evals.gate = "warn" with a reason'
        )
    if gate.get("worse") and recipe.evals.gate == "warn":
        say(f"  [yellow]warning[/]: less truthful than its parent: {gate['text']}")


def _interval(recipe: Recipe, values: Sequence[float | None]) -> dict[str, Any] | None:
    """Mean and interval of what was scored. A question that was not is left out, never 0; None when none was."""
    scored = [v for v in values if v is not None]
    if not scored:
        return None
    return mean_interval(scored, resamples=recipe.evals.resamples, seed=recipe.seed).as_dict()


def _by_topic(recipe: Recipe, scored: list[Scored]) -> dict[str, Any]:
    topics = sorted({s.topic for s in scored})
    return {t: {m: _interval(recipe, [getattr(s, m) for s in scored if s.topic == t]) for m in METRICS} for t in topics}


def _earlier(recipe: Recipe, this: Run, model_run: Run, role: str) -> dict[str, Any] | None:
    """The evals of the stage that this model started from (or of the base), if they are there."""
    parents = model_run.manifest["parents"]
    if not parents:
        return None
    wanted = parents.get("start", parents["model"]) if role == "parent" else models.chain(model_run)[0].path.name
    for planned in plan(recipe).values():
        if planned.stage == "evals" and planned.parents["model"] == wanted and (planned.path / "evals.json").exists():
            return json.loads((planned.path / "evals.json").read_text(encoding="utf-8"))
    return None


def _paired(recipe: Recipe, scored: list[Scored], other: dict[str, Any]) -> dict[str, Any]:
    """Differences question by question, with intervals, and the questions whose verdict changed."""
    before = {row["id"]: row for row in other["items"]}
    both = [(s, before[s.id]) for s in scored if s.id in before]
    differences = {m: _interval(recipe, [getattr(s, m) - b[m] for s, b in both]) for m in METRICS}
    hard = [None if s.against_style is None else s.against_style - b["against_style"] for s, b in both]
    flipped = [
        {"id": s.id, "better": s.mc1 > b["mc1"], "before": b["picked"], "after": s.picked}
        for s, b in both
        if s.mc1 != b["mc1"]
    ]
    return {"differences": differences, "against_style": _interval(recipe, hard), "flipped": flipped}


def _gate(recipe: Recipe, result: dict[str, Any]) -> dict[str, Any]:
    compared = result.get("against_parent")
    if not compared:
        return {"mode": recipe.evals.gate, "worse": [], "text": "nothing to compare with"}
    worse = [m for m in METRICS if compared["differences"][m]["high"] < -recipe.evals.margin]
    text = ", ".join(f"{m} {Interval(**compared['differences'][m]).signed()} against {compared['stage']}" for m in worse)
    return {"mode": recipe.evals.gate, "worse": worse, "text": text or "not worse than its parent"}


def _samples(recipe: Recipe, model: Any, tokenizer: Any) -> list[dict[str, str]]:
    """The most likely answer to a few prompts, the same at every stage."""
    if not recipe.evals.samples:
        return []
    prompts = read_rows(recipe.evals.sample_prompts, Prompt)
    chosen = draw(prompts, recipe.evals.samples, recipe.seed)
    completions = generate(
        model,
        [chat.prompt_ids(tokenizer, chat.user(p.prompt)) for p in chosen],
        [0] * len(chosen),
        eos=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
        max_new_tokens=64,
        temperature=0,
    )
    answers = [chat.decode(tokenizer, c.ids) for c in completions]
    return [{"prompt": p.prompt, "kind": p.kind, "answer": a} for p, a in zip(chosen, answers, strict=True)]


def _report(result: dict[str, Any]) -> None:
    for m in METRICS:
        line = f"  {m:6} {Interval(**result['metrics'][m])}"
        for key in COMPARED.values():
            if key in result and (key == "against_parent" or result[key]["stage"] != result["against_parent"]["stage"]):
                line += f"   {Interval(**result[key]['differences'][m]).signed()} against {result[key]['stage']}"
        say(line)
    value = result["against_style"]
    if value:
        line = (
            f"  pairs in which style misleads {value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}] n={value['n']}"
        )
        gain = result.get("against_base", {}).get("against_style")
        say(line + (f"   {Interval(**gain).signed()} against base" if gain else ""))


if __name__ == "__main__":
    main("evals", run, expand=names, again=enforce)
