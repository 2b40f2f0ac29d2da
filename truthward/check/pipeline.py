"""Rules on the rest of the recipe: the constitution and its judge, distillation, what is measured, and the launch."""

from __future__ import annotations

import difflib
import json
import os
from pathlib import Path
from typing import Any

from truthward.check.facts import Facts
from truthward.check.findings import Found, as_finding, error, note, rule, warning
from truthward.errors import UserError
from truthward.examples import read_examples
from truthward.principles import Principle, read_principles
from truthward.reasons import require_reasons
from truthward.recipe import most_of
from truthward.records import Pair
from truthward.tables import HEARD, MODEL_STAGES, VOICE_METRICS, Recipe

DECIDES = 20  # rows from which a gate of a set can tell large damage from chance
JUDGED = 10  # labelled pairs of a principle from which a judge can clear chance at all: 0.5^n, and a few wrong ones


@rule("reason-missing")
def reasons(facts: Facts) -> Found:
    """Values that say nothing of why they are what they are."""
    try:
        missing = require_reasons(facts.recipe, facts.where)
    except UserError as fault:
        yield as_finding("reason-missing", fault)
        return
    if missing:
        yield note("reason-missing", facts.where, f"no reason is given for {', '.join(missing)}")


@rule("constitution-unreadable")
def written(facts: Facts) -> Found:
    """Principles and examples that cannot be read."""
    reads: list[tuple[Any, tuple[str, ...]]] = []
    for _, table in facts.uses("constitution"):
        reads += [(read_principles, tuple(table.principles)), (read_examples, (table.examples,))]
    for _, table in facts.uses("distill"):
        reads.append((read_principles, tuple(table.principles)))
    for read, paths in dict.fromkeys(reads):
        try:
            read(*paths)
        except UserError as fault:
            yield as_finding("constitution-unreadable", fault)


def principles(paths: list[str]) -> list[Principle]:
    """Those of some files; none where they cannot be read, which is found elsewhere."""
    try:
        return read_principles(*paths)
    except UserError:
        return []


@rule("revisions-none", "labels-none", "shots-many")
def making(facts: Facts) -> Found:
    """Settings under which the constitution makes no rows."""
    judge = facts.recipe.judge
    for _, table in facts.uses("constitution"):
        if "revisions" in table.ways and table.rounds == 0:
            text = "revisions are wanted and no round is made"
            fix = 'set constitution.rounds = 1, or take "revisions" out of constitution.ways'
            yield error("revisions-none", "constitution.rounds", text, why="there would be none", fix=fix)
        if judge.clamp and table.min_confidence > 1 - judge.clamp:
            text = f"pairs must be {table.min_confidence:g} sure, and judge.clamp holds labels within {1 - judge.clamp:g}"
            fix = "lower one of the two"
            yield error("labels-none", "constitution.min_confidence", text, why="no pair would be left", fix=fix)
        shown = _examples(table.examples)
        if shown and table.shots > shown:
            text = f"{table.shots} examples are to stand before a request, and the file has {shown}"
            yield warning("shots-many", "constitution.shots", text, why="fewer would be shown", fix=f"set it to {shown}")


def _examples(path: str) -> int:
    try:
        return len(read_examples(path))
    except UserError:
        return 0


@rule("judge-unlabelled", "judge-pairs-few", "judge-unqualified", "judge-key")
def judging(facts: Facts) -> Found:
    """Whether the judge can qualify, and did where it was measured."""
    judge = facts.recipe.judge
    for _, table in facts.uses("constitution"):
        counts: dict[str, int] = {}
        for pair in facts.rows(judge.bank, Pair):
            counts[pair.principle] = counts.get(pair.principle, 0) + 1
        known = [p.id for p in principles(table.principles)]
        without = [name for name in known if name not in counts]
        if known and len(without) == len(known):
            tell = error if judge.gate == "block" else warning
            text = f"{judge.bank} has no labelled pair of any of these principles"
            fix = "label some pairs of answers of each (data/README.md)"
            yield tell("judge-unlabelled", "judge.bank", text, why="no judge can qualify by them", fix=fix)
        most = max((min(judge.pairs, counts.get(name, 0)) for name in known), default=JUDGED)
        if most < JUDGED and without != known and not facts.toy:
            text = f"at most {most} labelled pairs of a principle"
            why = "so few cannot tell a judge from chance, however good it is"
            yield warning(
                "judge-pairs-few", "judge.pairs", text, why=why, fix=f"{JUDGED} at the very least; 100 tell 0.6 from 0.5"
            )
        record = facts.run("constitution").manifest.get("judge")
        if record and not record["chosen"]:
            tell = error if judge.gate == "block" else warning
            text = "measured in this very run, no judge clears chance by any principle"
            why = "its labels would be noise"
            yield tell("judge-unqualified", "judge.model", text, why=why, fix="use a stronger judge")
        if judge.base_url and judge.key_env and not os.environ.get(judge.key_env):
            text = f"the environment variable {judge.key_env} holds no key for {judge.base_url}"
            fix = f'export {judge.key_env}, or set judge.key_env = "" where the server needs none'
            yield error("judge-key", "judge.key_env", text, why="the server would refuse", fix=fix)


@rule("principle-unknown")
def named_principles(facts: Facts) -> Found:
    """Words that name no principle."""
    recipe = facts.recipe
    asked: list[tuple[str, list[str], set[str]]] = []
    for _, table in facts.uses("distill"):
        known = {word for p in principles(table.principles) for word in (p.id, *p.tags)}
        asked.append(("distill.use", table.use, known))
    if {"reward", "constitution"} <= set(recipe.stages):
        asked.append(("reward.without", recipe.reward.without, {p.id for p in principles(recipe.constitution.principles)}))
    for key, words, known in asked:
        for word in (w for w in words if known and w not in known):
            near = next(iter(difflib.get_close_matches(word, sorted(known), n=1)), "")
            fix = f"did you mean {near}?" if near else f"they are {', '.join(sorted(known))}"
            text = f"no principle is called {word!r}"
            yield error("principle-unknown", key, text, why="rows would be chosen by a name that none has", fix=fix)


# --------------------------------------------------------------------------------------------------------------- evals


@rule("stage-unscored", "gate-off", "gate-undecided", "margin-wide", "style-bank-tested", "file-missing")
def measured(facts: Facts) -> Found:
    """What is not measured, or could not stop a run."""
    recipe, evals = facts.recipe, facts.recipe.evals
    for stage in (s for s in recipe.stages if s in MODEL_STAGES and s not in evals.models):
        why = (
            "whether it made the model more truthful would not be known"
            if stage != "base"
            else "others are compared with it"
        )
        text = f"{stage} is run and not scored"
        yield warning("stage-unscored", "evals.models", text, why=why, fix=f'add "{stage}" to evals.models')
    gate = evals.gate.get("truth", "block") if isinstance(evals.gate, dict) else evals.gate
    if gate == "off":
        why = "a stage that makes the model less truthful goes on to the next"
        yield warning("gate-off", "evals.gate", "the gate of truth is off", why=why, fix='set it to "block", or "warn"')
    word, named = (evals.gate, {}) if isinstance(evals.gate, str) else ("block", evals.gate)
    blocking = [n for n, mode in {**named, **{n: word for n in VOICE_METRICS if n not in named}}.items() if mode == "block"]
    for name in (n for n in blocking if n.partition(".")[0] in {*evals.sets} - {"truth"}):
        asked = HEARD if name.startswith("fluency") else [name.partition(".")[0]]
        most = [most_of(recipe, n) for n in asked if n in evals.sets]
        if 0 in most or sum(most) >= DECIDES:
            continue
        text = f"{name} may stop the run on {sum(most)} rows"
        why = "an interval over so few is wider than any damage that one would stop for"
        yield warning("gate-undecided", "evals.most", text, why=why, fix=f'{DECIDES} or more, or gate.{name} = "warn"')
    margins = evals.margin if isinstance(evals.margin, dict) else {"all": evals.margin}
    for name, margin in margins.items():
        if margin > 0.05:
            text = f"a loss of up to {margin:g} passes ({name})"
            why = "that is more than a stage of this pipeline usually gains"
            yield warning("margin-wide", "evals.margin", text, why=why, fix="0.01 is usual")
    if Path(evals.style_bank) == Path(evals.truth):
        text = "the style baselines learn from the questions on which they are measured"
        fix = "name the training bank"
        yield error("style-bank-tested", "evals.style_bank", text, why="style would look like knowledge", fix=fix)
    files = [*((f"evals.files.{name}", path) for name, path in evals.files.items()), ("evals.primer", evals.primer)]
    for key, path in files:
        if path and not (Path(path).is_file() and Path(path).stat().st_size):
            text = f"{path} is not there, or is empty"
            yield error("file-missing", key, text, why="the evals come last and would stop at it", fix="mend the path")


# -------------------------------------------------------------------------------------------------------------- launch


@rule("deepspeed-unreadable", "deepspeed-differs")
def launch(facts: Facts) -> Found:
    """The configuration of DeepSpeed beside the recipe."""
    path = facts.recipe.launch.deepspeed
    if path is None:
        return
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not an object")
    except (OSError, ValueError) as fault:
        text = f"{path} cannot be read as JSON: {fault}"
        why = "every trained stage would stop at it"
        yield error("deepspeed-unreadable", "launch.deepspeed", text, why=why, fix="mend the file, or take the key out")
        return
    yield from _differences(facts.recipe, path, config)


def _differences(recipe: Recipe, path: str, config: dict[str, Any]) -> Found:
    why = "the two would be at odds; DeepSpeed's would hold"
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"):
        if config.get(key, "auto") != "auto":
            text = f"it sets {key} = {config[key]!r}, which the recipe sets too"
            yield error("deepspeed-differs", path, text, why=why, fix=f'write "{key}": "auto"')
    stage = (config.get("zero_optimization") or {}).get("stage", recipe.launch.zero)
    if stage != recipe.launch.zero:
        text = f"it sets stage {stage} of ZeRO, and launch.zero = {recipe.launch.zero}"
        yield error("deepspeed-differs", path, text, why=why, fix="take it out, or set launch.zero to it")
    for key in ("optimizer", "scheduler"):
        if key in config:
            text = f"it brings its own {key}"
            yield error(
                "deepspeed-differs", path, text, why="rate and schedule would not be the recipe's", fix="take it out"
            )
    half = next((k for k in ("bf16", "fp16") if (config.get(k) or {}).get("enabled") is True), "")
    if half and (half == "fp16" or recipe.model.dtype == "float32"):
        text = f"it computes in {half}, and model.dtype = {recipe.model.dtype}"
        yield error("deepspeed-differs", path, text, why=why, fix='write "bf16": {"enabled": "auto"} and no fp16')
