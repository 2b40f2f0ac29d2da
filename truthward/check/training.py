"""Rules on what every trained stage shares: the rate, its warm-up, steps, batches, adapters, checkpoints."""

from __future__ import annotations

import math
from typing import NamedTuple

from truthward.check.facts import TRAINED, Facts
from truthward.check.findings import Found, error, note, rule, warning

TRL = ("sft", "distill", "reward", "dpo")  # stages whose steps a TRL trainer counts
FEW_STEPS = 10


class Peak(NamedTuple):
    """Highest rate that is usual for LoRA on 135M and on 8B parameters; for all weights it is a tenth."""

    small: float
    large: float


# docs/check.md gives the source of each; between and beyond the two sizes a line in the logarithms
PEAKS = {
    "sft": Peak(1e-2, 1e-3),
    "distill": Peak(1e-2, 1e-3),
    "reward": Peak(5e-3, 5e-4),
    "dpo": Peak(5e-3, 2e-4),
    "ppo": Peak(2e-4, 5e-5),
}
SIZES = (135e6, 8e9)


def highest_rate(stage: str, parameters: int, tune: str) -> float:
    """The highest rate that is usual for a stage on a model of this size."""
    small, large = PEAKS[stage]
    slope = math.log(large / small) / math.log(SIZES[1] / SIZES[0])
    rate = small * (parameters / SIZES[0]) ** slope
    return rate if tune == "lora" else rate / 10


@rule("rate-high", "rate-low")
def rates(facts: Facts) -> Found:
    """The learning rate against the model's size, and LoRA or all weights."""
    if not facts.shape.parameters or facts.toy:
        return
    for stage, table in facts.uses(*TRAINED):
        high = highest_rate(stage, facts.shape.parameters, table.tune)
        kind = "LoRA" if table.tune == "lora" else "all weights"
        named = {"learning_rate": (table.learning_rate, high)}
        if stage == "ppo" and table.advantage == "gae" and table.value_learning_rate:
            named["value_learning_rate"] = (table.value_learning_rate, 10 * high)  # a critic stands a higher one
        for key, (rate, top) in named.items():
            size = f"{facts.shape.parameters / 1e6:,.0f}M parameters"
            usual = f"for {kind} on {size} {top / 200:.0e} to {top:.0e} is usual"
            if rate > top:
                tell = error if rate > 10 * top else warning
                text = f"{rate:g} is {rate / top:.1f} times the highest usual rate; {usual}"
                why = "the loss spikes or the model unlearns its language in the first steps"
                yield tell("rate-high", f"{stage}.{key}", text, why=why, fix=f"try {top / 5:.0e}")
            elif rate < top / 200:
                text = f"{rate:g} is very low; {usual}"
                why = "the run would end near where it began; LoRA needs about ten times the rate of all weights"
                yield warning("rate-low", f"{stage}.{key}", text, why=why, fix=f"try {top / 5:.0e}")


@rule("warmup-long")
def warmup(facts: Facts) -> Found:
    """The share of the run in which the rate only climbs."""
    for stage, table in facts.uses(*TRAINED):
        if table.warmup_ratio > 0.3:
            tell = error if table.warmup_ratio >= 0.9 else warning
            text = f"the rate climbs for {table.warmup_ratio:.0%} of the {facts.steps(stage) or 'run’s'} steps"
            why = "most of the data is spent below the rate that was chosen"
            yield tell("warmup-long", f"{stage}.warmup_ratio", text, why=why, fix="0.03 to 0.1 is usual")


@rule("run-short", "rows-too-few")
def length_of_run(facts: Facts) -> Found:
    """Whether there are rows and steps enough to learn anything."""
    for stage, table in facts.uses(*TRL):
        if stage == "distill" or not facts.tokens(stage):
            continue
        whole, _, _ = facts.loader(stage)
        rows, steps, key = facts.sequences(stage), facts.steps(stage), "data" if stage == "sft" else "preferences"
        if rows < whole:
            text = f"{rows} rows do not fill one micro-batch of {whole} over all ranks"
            fix = f"give more rows, or lower {stage}.micro_batch_size and {stage}.batch_size"
            yield error("rows-too-few", f"{stage}.{key}", text, why="the trainer drops what is not full: no step", fix=fix)
        elif steps < FEW_STEPS and not facts.toy:
            text = f"{rows} rows make {steps} optimizer step{'s' if steps > 1 else ''} of {table.batch_size} rows"
            why = "Adam's moments and the schedule have no time to settle; what is measured is the noise of a few batches"
            fix = f"lower {stage}.batch_size, or give more rows or epochs"
            yield warning("run-short", f"{stage}.{key}", text, why=why, fix=fix)


@rule("rows-dropped", "step-partial", "accumulation-deep")
def batches(facts: Facts) -> Found:
    """What the arithmetic of batches leaves out or weighs otherwise."""
    for stage, _ in facts.uses("sft", "reward", "dpo"):
        whole, accumulated, count = facts.loader(stage)
        rows, last = facts.sequences(stage), count % accumulated
        where = f"{stage}.batch_size"
        if facts.toy or not count:
            continue
        if rows % whole > 0.1 * rows:
            text = f"{rows % whole} of {rows} rows are left out of each pass, as they do not fill {whole} rows"
            fix = f"lower {stage}.micro_batch_size"
            yield warning("rows-dropped", where, text, why="a part of the data is paid for and unused", fix=fix)
        if last and count // accumulated < FEW_STEPS and last <= accumulated / 2:
            text = (
                f"the last step of a pass has {last} of {accumulated} micro-batches, and a pass only {count // accumulated}"
            )
            text += " whole steps"
            why = "its rows count for more than the others', at the end of the schedule"
            yield warning("step-partial", where, text, why=why, fix="choose a batch size that divides the rows")
        if accumulated > 64:
            text = f"a step gathers {accumulated} micro-batches of {whole} rows"
            fix = f"raise {stage}.micro_batch_size as far as memory goes"
            yield warning("accumulation-deep", where, text, why="a machine does best on full micro-batches", fix=fix)


@rule("epochs-many")
def epochs(facts: Facts) -> Found:
    """Passes over the same rows."""
    for stage, most in {"sft": 10, "distill": 10, "reward": 3, "dpo": 5}.items():
        for _, table in facts.uses(stage):
            if table.epochs > most:
                text = f"{table.epochs:g} passes over the same rows"
                why = (
                    "preference losses overfit in the second pass already"
                    if most < 10
                    else "the rows would be learnt by heart"
                )
                yield warning("epochs-many", f"{stage}.epochs", text, why=why, fix="1 to 3 is usual")


@rule("lora-scale", "lora-rank-high")
def adapters(facts: Facts) -> Found:
    """Rank and scale of LoRA."""
    for stage, table in facts.uses(*TRAINED):
        if table.tune != "lora":
            continue
        scale = table.lora_alpha / table.lora_rank
        if not 0.25 <= scale <= 8:
            text = f"alpha / rank = {scale:g}"
            why = "it multiplies the adapter's output, and so the rate: usual rates hold for 1 or 2"
            yield warning("lora-scale", f"{stage}.lora_alpha", text, why=why, fix=f"try {2 * table.lora_rank}")
        if facts.shape.hidden and table.lora_rank > facts.shape.hidden / 2:
            text = f"rank {table.lora_rank} on a model {facts.shape.hidden} wide"
            why = "an adapter of this rank has about as many parameters as what it adapts"
            fix = f'lower it, or set {stage}.tune = "full"'
            yield warning("lora-rank-high", f"{stage}.lora_rank", text, why=why, fix=fix)


@rule("checkpoint-none", "checkpoint-often")
def checkpoints(facts: Facts) -> Found:
    """How much a killed run would lose, and how much time goes into writing."""
    for stage, table in facts.uses(*TRL):
        steps, every = facts.steps(stage), table.checkpoint_every
        where = f"{stage}.checkpoint_every"
        if steps and every > steps and not facts.toy:
            tell = warning if steps >= 100 else note
            text = f"no checkpoint in the {steps} steps of the run"
            yield tell("checkpoint-none", where, text, why="a killed run starts over", fix=f"set it to {max(1, steps // 5)}")
        if steps > 100 and every < 5:
            text = f"{steps // every} checkpoints in {steps} steps"
            why = "each writes what is trained and both Adam moments"
            yield warning("checkpoint-often", where, text, why=why, fix=f"set it to {steps // 10}")


@rule("no-effect")
def without_effect(facts: Facts) -> Found:
    """Values that were set and do nothing beside the others."""
    recipe = facts.recipe
    pairs = []
    for stage, table in facts.uses(*TRAINED):
        pairs += [(stage, k, 'tune = "full" has no adapter') for k in ("lora_rank", "lora_alpha") if table.tune == "full"]
    if recipe.sft.packing:
        pairs.append(("sft", "micro_batch_size", "a packed sequence is a micro-batch of its own"))
    if recipe.ppo.advantage != "gae":
        keys = ("value_coef", "value_clip_range", "value_learning_rate", "gae_lambda", "gamma")
        pairs += [("ppo", k, f"{recipe.ppo.advantage} has no critic and no discount") for k in keys]
    if not recipe.ppo.kl_target:
        pairs.append(("ppo", "kl_horizon", "kl_coef is fixed while kl_target is 0"))
    if recipe.ppo.truncation == "mask":
        pairs.append(("ppo", "truncation_penalty", 'truncation = "mask" takes no penalty'))
    if recipe.ppo.hard_rewards:
        pairs.append(("ppo", "score_clip", "hard rewards are 0 or 1"))
    if recipe.ppo.sampler == "exact":
        pairs.append(("ppo", "tis_cap", "an exact sampler needs no correction"))
    if "revisions" not in recipe.constitution.ways:
        pairs += [("constitution", k, "no revisions are made") for k in ("rounds", "shots")]
    for stage, key, why in pairs:
        if stage in recipe.stages and key in getattr(recipe, stage).model_fields_set:
            text = f"it is set to {getattr(getattr(recipe, stage), key)!r} and does nothing: {why}"
            yield warning("no-effect", f"{stage}.{key}", text, why="somebody thinks it does", fix="take it out")
