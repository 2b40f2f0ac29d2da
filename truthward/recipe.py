"""The recipe: one TOML file, one table a stage, checked before anything runs.

Unknown keys are errors at any depth and name the nearest right key. Values that differ from the default need a reason
in the table's ``why`` (see :func:`missing_reasons`); the reasons are saved with every result.
"""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from truthward.errors import UserError

MODEL_STAGES = ("base", "sft", "dpo", "ppo")  # stages whose result is a chat model that the evals score
Stage = Literal["base", "sft", "constitution", "reward", "dpo", "ppo"]
ModelStage = Literal["base", "sft", "dpo", "ppo"]


class Table(BaseModel):
    """A table of the recipe; ``why`` holds the reason for each value that was set."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
    why: dict[str, str] = Field(default={}, description="reason for each key of this table")


class Model(Table):
    base: str = Field("smollm2-135m-instruct", description="the wheel's model, a local folder, a hub id, or tiny-random")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="compute type; auto times both")
    threads: int = Field(0, ge=0, description="CPU threads; 0 takes all cores")


class Training(Table):
    """What every stage trained by a TRL trainer shares. Batch sizes count sequences (or pairs)."""

    parent: ModelStage = Field("sft", description="the stage whose model this one starts from")
    tune: Literal["lora", "full"] = Field("lora", description="train LoRA adapters, or every weight")
    lora_rank: int = Field(16, ge=1, description="rank of the LoRA matrices")
    lora_alpha: int = Field(32, ge=1, description="LoRA scale: delta W = alpha/rank * B A")
    learning_rate: float = Field(1e-4, gt=0, lt=1, description="peak learning rate of AdamW")
    schedule: Literal["linear", "cosine", "constant"] = Field("linear", description="decay after warm-up")
    warmup_ratio: float = Field(0.1, ge=0, lt=1, description="share of the steps that the rate climbs")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this global norm")
    epochs: float = Field(1.0, gt=0, description="passes over the data")
    batch_size: int = Field(16, ge=1, description="rows an optimizer step, over all ranks")
    micro_batch_size: int = Field(8, ge=1, description="rows a forward pass, on each rank")
    max_length: int = Field(512, ge=8, description="longest row in tokens; longer rows are an error, never cut")
    checkpoint_every: int = Field(20, ge=1, description="optimizer steps between checkpoints")


class Sft(Training):
    parent: ModelStage = "base"
    data: list[str] = Field(["data/demonstrations.jsonl"], min_length=1, description="demonstrations or revisions (JSONL)")
    packing: bool = Field(
        True, description="fill sequences of max_length with rows, attention kept apart; batch_size counts them"
    )


class Constitution(Table):
    parent: ModelStage = Field("sft", description="the model that answers, criticises and judges")
    principles: str = Field("constitution/principles.toml", description="the written constitution")
    prompts: str = Field("data/prompts.jsonl", description="prompts to answer (JSONL)")
    judge_bank: str = Field("data/truth/dev", description="labelled questions that the judge must qualify on")
    max_prompts: int = Field(240, ge=1, description="use at most this many prompts, drawn by seed")
    rounds: int = Field(1, ge=0, description="critique and revision rounds for each prompt")
    samples: int = Field(2, ge=2, description="answers a prompt, from which preference pairs are made")
    judge_questions: int = Field(200, ge=1, description="at most this many of them, drawn by seed")
    judge_gate: Literal["block", "warn"] = Field("block", description="what happens when no judge clears chance")
    judge_principles: int = Field(2, ge=1, description="principles averaged in one judgement")
    judge_temperature: float = Field(4.0, gt=0, description="label = sigmoid(10 * difference of scores a token / this)")
    min_confidence: float = Field(0.6, ge=0.5, lt=1, description="pairs whose label is nearer to 0.5 are left out")
    max_new_tokens: int = Field(64, ge=1, description="longest generated text in tokens")
    temperature: float = Field(0.8, gt=0, description="sampling temperature of answers and revisions")
    batch_size: int = Field(32, ge=1, description="rows generated together")


class Reward(Training):
    preferences: list[str] = Field(
        ["data/truth/train", "constitution"], min_length=1, description="truth banks, preference files or constitution"
    )
    max_pairs: int = Field(2000, ge=2, description="use at most this many pairs, drawn by seed")
    validation: str = Field("data/truth/dev", description="labelled questions for the validation accuracy")
    center_coef: float = Field(0.01, ge=0, description="weight of (r_chosen + r_rejected)^2, which keeps rewards near 0")


class Dpo(Training):
    preferences: list[str] = Field(
        ["data/truth/train", "constitution"], min_length=1, description="truth banks, preference files or constitution"
    )
    max_prompts: int = Field(2000, ge=1, description="use at most this many prompts, each with all its pairs, drawn by seed")
    beta: float = Field(0.1, gt=0, description="strength of the pull to the reference model")
    sft_coef: float = Field(0.0, ge=0, description="weight of the chosen answer's negative log-likelihood a token")


class Ppo(Table):
    parent: ModelStage = Field("sft", description="where the policy starts; it is also the reference for the KL")
    reward: Literal["reward"] = Field("reward", description="the stage whose preference model scores the answers")
    prompts: str = Field("data/prompts.jsonl", description="prompts to answer (JSONL)")
    iterations: int = Field(4, ge=1, description="rollout, score, advantages, update; this many times")
    rollouts: int = Field(32, ge=2, description="answers sampled an iteration, over all ranks")
    epochs: int = Field(2, ge=1, description="passes over the rollouts of an iteration")
    minibatches: int = Field(2, ge=1, description="optimizer steps a pass")
    micro_batch_size: int = Field(8, ge=1, description="rows a forward pass, on each rank")
    max_new_tokens: int = Field(48, ge=1, description="longest answer in tokens")
    max_prompt_tokens: int = Field(256, ge=1, description="longest prompt in tokens; longer ones are an error")
    temperature: float = Field(1.0, gt=0, description="sampling temperature; log-probabilities are scaled alike")
    learning_rate: float = Field(1e-5, gt=0, lt=1, description="peak rate of AdamW for policy and value")
    kl_coef: float = Field(0.05, ge=0, description="beta: reward - beta * KL(policy || reference), a token")
    clip_range: float = Field(0.2, gt=0, lt=1, description="PPO's epsilon for the ratio")
    value_clip_range: float = Field(0.2, gt=0, description="the same for the value")
    value_coef: float = Field(0.1, ge=0, description="weight of the value loss")
    gae_lambda: float = Field(0.95, ge=0, le=1, description="GAE's lambda")
    gamma: float = Field(1.0, gt=0, le=1, description="discount a token")
    truncation_penalty: float = Field(1.0, ge=0, description="taken off the score of an answer that does not end")
    target_kl: float = Field(0.1, gt=0, description="stop an iteration's passes when KL(old || new) a token passes it")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this global norm")
    lora_rank: int = Field(16, ge=1, description="rank of new policy adapters")
    lora_alpha: int = Field(32, ge=1, description="LoRA scale of new policy adapters")


class Evals(Table):
    truth: str = Field("data/truth/test", description="questions of held-out topics")
    style_bank: str = Field("data/truth/train", description="labelled questions that the style baselines learn from")
    models: list[ModelStage] = Field(["base", "sft", "dpo", "ppo"], min_length=1, description="stages that are scored")
    resamples: int = Field(4000, ge=100, description="bootstrap resamples behind each interval")
    gate: Literal["block", "warn", "off"] = Field("block", description="what happens when a stage is less truthful")
    samples: int = Field(8, ge=0, description="prompts whose answers are shown side by side in the report")
    sample_prompts: str = Field("data/prompts.jsonl", description="where those prompts come from")
    tokens_a_batch: int = Field(2048, ge=64, description="tokens scored in one forward pass")


class Launch(Table):
    ranks: int = Field(1, ge=1, description="processes on this host")
    deepspeed: str | None = Field(None, description="DeepSpeed configuration (JSON)")


class Recipe(Table):
    name: str = Field("", description="runs go to runs/<name>; the file's name if empty")
    seed: int = Field(17, ge=0, lt=2**32, description="every random draw derives from it")
    runs: str = Field("runs", description="where run directories are kept")
    stages: list[Stage] = Field(["base", "sft", "constitution", "reward", "dpo", "ppo"], min_length=1)
    unexplained: Literal["stop", "warn"] = Field("stop", description="what a value without a reason does")
    model: Model = Model()
    sft: Sft = Sft()
    constitution: Constitution = Constitution()
    reward: Reward = Reward()
    dpo: Dpo = Dpo()
    ppo: Ppo = Ppo()
    evals: Evals = Evals()
    launch: Launch = Launch()


DATA_KEYS = {
    "data",
    "prompts",
    "principles",
    "preferences",
    "judge_bank",
    "validation",
    "truth",
    "style_bank",
    "sample_prompts",
}


def load_recipe(path: str | Path, overrides: list[str] | None = None, why: str = "") -> Recipe:
    """Read, override and check a recipe.

    Args:
        path: the TOML file.
        overrides: ``key=value`` with dotted keys, e.g. ``ppo.kl_coef=0.02``; values are TOML (a bare word is a string).
        why: the reason recorded for every override.

    Raises:
        UserError: the file is missing, is not TOML, or a key or value is wrong; names the file, key and a remedy.
    """
    path = Path(path)
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.toml")], n=1)
        fix = f"did you mean {path.parent / near[0]}?" if near else "give the path of a recipe, e.g. recipes/laptop.toml"
        raise UserError("there is no such recipe", where=str(path), fix=fix)
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"not valid TOML: {error}", where=str(path), fix="mend the line it names") from error
    for override in overrides or []:
        _apply(tree, override, why)
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        raise UserError("\n".join(_explain(e) for e in error.errors()), where=str(path)) from error
    if not recipe.name:
        recipe = recipe.model_copy(update={"name": path.stem})
    _check_values(recipe, str(path))
    return recipe


def settings(recipe: Recipe, table: str) -> dict[str, Any]:
    """The resolved values of one table, without its reasons (these do not change a result)."""
    return getattr(recipe, table).model_dump(mode="json", exclude={"why"})


def missing_reasons(recipe: Recipe) -> list[str]:
    """Dotted keys that were set to something other than the default, or name data, and carry no reason."""
    missing = []
    for prefix, table in _prefixed(recipe):
        for key in sorted(table.model_fields_set - {"why", "name", "runs", *_tables()}):
            changed = getattr(table, key) != type(table).model_fields[key].default
            if (changed or key in DATA_KEYS) and not table.why.get(key, "").strip():
                missing.append(prefix + key)
    return missing


def require_reasons(recipe: Recipe, where: str) -> list[str]:
    """Stop when a value lacks its reason, or return the list when the recipe only warns.

    Raises:
        UserError: ``unexplained = "stop"`` and a value has no reason.
    """
    missing = missing_reasons(recipe)
    if missing and recipe.unexplained == "stop":
        table, _, key = missing[0].rpartition(".")
        header = f"[{table}.why]" if table else "[why]"
        raise UserError(
            "no reason is given for " + ", ".join(missing),
            where=where,
            fix=f'write why, e.g. under {header}: {key} = "…"; for overrides pass --why "…"; '
            'unexplained = "warn" relaxes this',
        )
    return missing


def _tables() -> list[str]:
    return [n for n, f in Recipe.model_fields.items() if isinstance(f.default, Table)]


def _prefixed(recipe: Recipe) -> list[tuple[str, Table]]:
    """The recipe and its tables, each with what stands before a key of it in a dotted name."""
    return [("", recipe), *((f"{name}.", getattr(recipe, name)) for name in _tables())]


def _nearest(key: str, table: type[Table]) -> str:
    return next(iter(difflib.get_close_matches(key, list(table.model_fields), n=1, cutoff=0.5)), "")


def _apply(tree: dict[str, Any], override: str, why: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UserError("an override is key=value", where=override, fix="for example ppo.kl_coef=0.02")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *tables, last = key.strip().split(".")
    for name in tables:
        tree = tree.setdefault(name, {})
        if not isinstance(tree, dict):
            raise UserError(f"{name} is a value, not a table", where=override, fix="name a key of a table")
    tree[last] = value
    reasons = tree.setdefault("why", {}) if why and last != "why" else None
    if isinstance(reasons, dict):  # anything else is refused when the recipe is checked
        reasons[last] = why


def _explain(error: Any) -> str:
    path = [str(part) for part in error["loc"]]
    table: type[Table] = Recipe
    for part in path[:-1]:
        field = table.model_fields.get(part)
        table = type(field.default) if field and isinstance(field.default, Table) else table
    if error["type"] == "extra_forbidden":
        near = _nearest(path[-1], table)
        hint = f"did you mean {'.'.join([*path[:-1], near])}?" if near else f"keys are: {', '.join(table.model_fields)}"
        return f"unknown key {'.'.join(path)}\n  to do: {hint}"
    field = table.model_fields.get(path[-1])
    about = f" ({field.description})" if field and field.description else ""
    return f"{'.'.join(path)} = {error['input']!r}: {error['msg']}{about}"


def exact_div(total: int, part: int, what: str) -> int:
    """``total / part`` when it divides exactly.

    Raises:
        UserError: it does not; ``what`` names the two recipe keys.
    """
    if total % part:
        raise UserError(f"{total} is not a multiple of {part}", where=what, fix="make the first a multiple of the second")
    return total // part


def _check_reasons(recipe: Recipe, where: str) -> None:
    for prefix, table in _prefixed(recipe):
        for key in table.why.keys() - type(table).model_fields.keys():
            near = _nearest(key, type(table))
            fix = f"did you mean {prefix}why.{near}?" if near else "give reasons for keys of this table"
            raise UserError(f"unknown key {prefix}why.{key}", where=where, fix=fix)


def _check_values(recipe: Recipe, where: str) -> None:
    ranks = recipe.launch.ranks
    _check_reasons(recipe, where)
    for name in ("sft", "reward", "dpo"):
        table = getattr(recipe, name)
        packed = name == "sft" and table.packing  # a packed sequence is a micro-batch of its own
        micro = (1 if packed else min(table.micro_batch_size, table.batch_size)) * ranks
        exact_div(table.batch_size, micro, f"{where}: {name}.batch_size, {name}.micro_batch_size * launch.ranks")
    minibatch = exact_div(recipe.ppo.rollouts, recipe.ppo.minibatches, f"{where}: ppo.rollouts, ppo.minibatches")
    micro = min(recipe.ppo.micro_batch_size, minibatch) * ranks
    exact_div(minibatch, micro, f"{where}: ppo.rollouts / ppo.minibatches, ppo.micro_batch_size * launch.ranks")
    start = recipe.ppo.parent
    if "ppo" in recipe.stages and start != recipe.reward.parent:
        table = getattr(recipe, start, None)
        if not isinstance(table, Training) or table.tune != "lora" or table.parent != recipe.reward.parent:
            raise UserError(
                f"ppo.parent = {start} and reward.parent = {recipe.reward.parent} differ in their base",
                where=where,
                fix='start PPO from reward.parent, or from a stage with tune = "lora" whose parent is reward.parent',
            )
    for index, stage in enumerate(recipe.stages):
        needs = [] if stage == "base" else [getattr(recipe, stage).parent]
        needs += ["reward"] if stage == "ppo" else []
        needs += (
            ["constitution"] if stage in ("reward", "dpo") and "constitution" in getattr(recipe, stage).preferences else []
        )
        for need in needs:
            if need not in recipe.stages[:index]:
                raise UserError(
                    f"stage {stage} needs {need}, which does not come before it",
                    where=f"{where}: stages",
                    fix=f"put {need} before {stage}, or change {stage}.parent or {stage}.preferences",
                )
