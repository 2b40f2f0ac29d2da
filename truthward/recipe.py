"""The recipe: one TOML file, one table a stage, checked before anything runs.

Unknown keys are errors at any depth and name the nearest right key. Values that differ from the default need a reason
in the table's ``why`` (see :mod:`truthward.reasons`); the reasons are saved with every result.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from truthward.errors import UserError
from truthward.fingerprint import named_path
from truthward.reading import read_toml, require_plain
from truthward.tables import (
    BANK_OF,
    BANKLESS,
    HEARD,
    VOICE,
    Benchmark,
    EvalSet,
    Guard,
    Origin,
    Recipe,
    Server,
    Table,
    Training,
    Watch,
)

LONGEST = 100  # bytes in the name of a folder
NAME = re.compile(r"\w(?:[\w.+ -]*[\w+-])?")
DATA_KEYS = {
    "data",
    "prompts",
    "principles",
    "preferences",
    "examples",
    "bank",
    "principle_bank",
    "validation",
    "truth",
    "style_bank",
    "first_questions",
    "ptx_data",
    "replay",
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
    if not os.path.isfile(path):
        near = difflib.get_close_matches(path.name, _recipes_in(path.parent), n=1)
        fix = f"did you mean {path.parent / near[0]}?" if near else "give the path of a recipe, e.g. recipes/laptop.toml"
        raise UserError("there is no such recipe", where=str(path), fix=fix)
    tree = read_toml(path)
    for override in overrides or []:
        _apply(tree, override, why)
    require_plain(tree, str(path), written=True)
    try:
        recipe = Recipe.model_validate(_at_home(tree))
    except ValidationError as error:
        raise UserError("\n".join(_explain(e) for e in error.errors()), where=str(path)) from error
    if not recipe.name:
        recipe = recipe.model_copy(update={"name": path.stem})
    recipe._origin = Origin(str(path), tuple(overrides or ()), why)
    _check_place(recipe, str(path))
    _check_values(recipe, str(path))
    return recipe


def _recipes_in(folder: Path) -> list[str]:
    return [p.name for p in folder.glob("*.toml")] if os.path.isdir(folder) else []


def settings(recipe: Recipe, table: str) -> dict[str, Any]:
    """The resolved values of one table, without its reasons (these do not change a result)."""
    return getattr(recipe, table).model_dump(mode="json", exclude={"why"})


def judge_settings(recipe: Recipe) -> dict[str, Any]:
    """What of ``[judge]`` can change a verdict: all but how fast a server may be asked, and what it costs."""
    values = settings(recipe, "judge")
    return {k: v for k, v in values.items() if k == "base_url" or k not in Server.model_fields}


def guard_settings(recipe: Recipe, stage: str) -> dict[str, Any]:
    """What of ``[guard]`` can change a stage's result: not when a step counts as hung, and what only PPO has only there."""
    kept = Watch.model_fields.keys() if stage != "ppo" else Guard.model_fields.keys() - {"hang_factor", "hang_seconds"}
    return {k: v for k, v in settings(recipe, "guard").items() if k in kept}


def probed(recipe: Recipe) -> bool:
    """Whether PPO runs long enough to be asked held-out questions on the way."""
    return 0 < recipe.guard.probe_every <= recipe.ppo.iterations


def sets_of(recipe: Recipe, stage: str) -> list[str]:
    """What a stage's model is measured on: all sets, or where the recipe is brief truth and how the model speaks."""
    sets = recipe.evals.sets
    return ["truth", *(name for name in sets if name in VOICE)] if stage in recipe.evals.brief else list(sets)


def banked(sets: Iterable[str]) -> list[str]:
    """Of some sets, those that read a bank."""
    return [name for name in sets if name not in BANKLESS]


def most_of(recipe: Recipe, name: str) -> int:
    """At most how many rows of a set (or of a benchmark) are asked; 0 takes all."""
    most = recipe.evals.most
    if isinstance(most, int):
        return 0 if name == "truth" else most
    return most.get(name, 0 if name == "truth" else most.get("default", 0))


def bank_path(recipe: Recipe, name: str) -> str:
    """Where the rows of an eval set lie; several sets may read one bank."""
    bank = BANK_OF.get(name, name)
    return recipe.evals.truth if bank == "truth" else str(Path(recipe.evals.banks) / bank / recipe.evals.split)


def labels_path(recipe: Recipe) -> str:
    """Where the labelled answers lie by which the judge of open answers is measured."""
    return str(Path(recipe.evals.banks) / "open" / "dev")


def eval_paths(recipe: Recipe, stage: str) -> list[str]:
    """What is read beside the evals' own keys to measure a stage's model, each once.

    Fluency knows the words of all banks that the recipe names, the same at every stage.
    """
    sets, table = sets_of(recipe, stage), recipe.evals
    known = table.sets if "fluency" in sets else sets
    banks = [bank_path(recipe, n) for n in banked(known)] + [labels_path(recipe)] * ("open" in sets)
    return list(dict.fromkeys(p for p in (*banks, *table.files.values(), table.primer) if p))


def ppo_paths(recipe: Recipe) -> list[str]:
    """What PPO reads beside its own keys: a function's file, a classifier's folder (no hub id), the probe's questions."""
    named = [path for source in recipe.ppo.rewards if source != "reward" and (path := named_path(source))]
    return named + [recipe.reward.validation] * probed(recipe)


def table_names() -> list[str]:
    return [n for n, f in Recipe.model_fields.items() if isinstance(f.default, Table)]


def prefixed(recipe: Recipe) -> list[tuple[str, Table]]:
    """The recipe and its tables, each with what stands before a key of it in a dotted name."""
    return [("", recipe), *((f"{name}.", getattr(recipe, name)) for name in table_names())]


def _nearest(key: str, table: type[Table]) -> str:
    return next(iter(difflib.get_close_matches(key, list(table.model_fields), n=1, cutoff=0.5)), "")


def _apply(tree: dict[str, Any], override: str, why: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UserError("an override is key=value", where=override, fix="for example ppo.kl_coef=0.02")
    try:
        values = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        values = {"value": text}
    except (ValueError, RecursionError) as error:
        raise UserError(f"not a value: {error}", where=_cut(override), fix="give a smaller one") from error
    if values.keys() != {"value"}:
        raise UserError("an override sets one key", where=_cut(override), fix="give each key=value as a word of its own")
    *tables, last = key.strip().split(".")
    for name in tables:
        tree = tree.setdefault(name, {})
        if not isinstance(tree, dict):
            raise UserError(f"{name} is a value, not a table", where=override, fix="name a key of a table")
    tree[last] = values["value"]
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
    return f"{'.'.join(path)} = {_cut(repr(error['input']))}: {error['msg']}{about}"


def _cut(text: str) -> str:
    """So much of a text as fits into a message."""
    return text if len(text) <= 120 else f"{text[:100]} … ({len(text)} characters)"


def _at_home(value: Any) -> Any:
    """A recipe's values with ``~/`` written out, which records have in place of a home; reasons stay as they are."""
    if isinstance(value, dict):
        return {k: v if k == "why" else _at_home(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_at_home(one) for one in value]
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value


def _check_place(recipe: Recipe, where: str) -> None:
    """The name becomes a folder; it must stay in the one for runs."""
    if not NAME.fullmatch(recipe.name) or len(recipe.name.encode()) > LONGEST:
        fix = f"letters, digits, blanks and . _ + -, at most {LONGEST}, the first a letter or digit; set name to one"
        raise UserError(f"{_cut(repr(recipe.name))} cannot be the name of a folder", where=f"{where}: name", fix=fix)
    if any(len(part.encode()) > LONGEST for part in Path(recipe.runs).parts) or len(recipe.runs) > 10 * LONGEST:
        raise UserError(f"no folder can be called {_cut(recipe.runs)!r}", where=f"{where}: runs", fix="take a shorter path")


def exact_div(total: int, part: int, what: str) -> int:
    """``total / part`` when it divides exactly.

    Raises:
        UserError: it does not; ``what`` names the two recipe keys.
    """
    if total % part:
        raise UserError(f"{total} is not a multiple of {part}", where=what, fix="make the first a multiple of the second")
    return total // part


def _check_reasons(recipe: Recipe, where: str) -> None:
    for prefix, table in prefixed(recipe):
        for key in table.why.keys() - type(table).model_fields.keys():
            near = _nearest(key, type(table))
            fix = f"did you mean {prefix}why.{near}?" if near else "give reasons for keys of this table"
            raise UserError(f"unknown key {prefix}why.{key}", where=where, fix=fix)


def _check_values(recipe: Recipe, where: str) -> None:
    world = recipe.launch.world
    _check_reasons(recipe, where)
    if recipe.judge.base_url and "choice" not in recipe.judge.methods:
        fix = 'add "choice" to judge.methods'
        raise UserError("a judge behind a server can only choose between answers", where=f"{where}: judge.methods", fix=fix)
    if recipe.judge.base_url and not recipe.judge.model:
        raise UserError("which of the server's models judges?", where=f"{where}: judge.model", fix="write its name there")
    for name in (n for n in ("sft", "distill", "reward", "dpo") if n in recipe.stages):
        table = getattr(recipe, name)
        packed = name == "sft" and table.packing  # a packed sequence is a micro-batch of its own
        micro = (1 if packed else min(table.micro_batch_size, table.batch_size)) * world
        exact_div(
            table.batch_size, micro, f"{where}: {name}.batch_size, {name}.micro_batch_size * launch.ranks * launch.hosts"
        )
    _check_launch(recipe, where)
    _check_ppo(recipe, where)
    _check_evals(recipe, where)
    for index, stage in enumerate(recipe.stages):
        needs = [] if stage == "base" else [getattr(recipe, stage).parent]
        needs += ["reward"] if stage == "ppo" and "reward" in recipe.ppo.rewards else []
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


def _check_evals(recipe: Recipe, where: str) -> None:
    known = [*get_args(EvalSet), *get_args(Benchmark), "lm_eval"]
    for key in ("gate", "margin", "most"):
        named = getattr(recipe.evals, key)
        for name in named if isinstance(named, dict) else []:
            whole = name if key == "most" else name.partition(".")[0]
            if whole not in known and (key, name) != ("most", "default"):
                what = 'a set, or "default"' if key == "most" else "a set, or set.metric"
                fix = f"name {what}; sets are {', '.join(known)}"
                raise UserError(f"unknown eval set {name}", where=f"{where}: evals.{key}", fix=fix)
    most = recipe.evals.most
    for value in most.values() if isinstance(most, dict) else [most]:
        if value < 0:
            raise UserError(f"there are no {value} rows", where=f"{where}: evals.most", fix="0 takes all")
    if "fluency" in recipe.evals.sets and not set(recipe.evals.sets) & set(HEARD):
        fix = f"add one of {', '.join(HEARD)}"
        raise UserError("fluency looks at the answers of other sets", where=f"{where}: evals.sets", fix=fix)


def _check_launch(recipe: Recipe, where: str) -> None:
    table = recipe.launch
    if table.offload != "none" and not table.zero:
        fix = "set launch.zero to 2, or to 3 to shift weights as well"
        raise UserError("only ZeRO keeps something in the host's memory", where=f"{where}: launch.offload", fix=fix)
    if table.offload == "all" and table.zero < 3:
        fix = 'set launch.zero = 3, or launch.offload = "optimizer"'
        raise UserError("weights stay where they are below stage 3", where=f"{where}: launch.offload", fix=fix)
    if table.hosts > 1 and not table.rendezvous:
        fix = 'write the first host and a free port there, e.g. "node0:29500"'
        raise UserError("where do the hosts meet?", where=f"{where}: launch.rendezvous", fix=fix)


def _check_ppo(recipe: Recipe, where: str) -> None:
    table, world = recipe.ppo, recipe.launch.world
    minibatch = exact_div(table.rollouts, table.minibatches, f"{where}: ppo.rollouts, ppo.minibatches")
    micro = min(table.micro_batch_size, minibatch) * world
    exact_div(
        minibatch, micro, f"{where}: ppo.rollouts / ppo.minibatches, ppo.micro_batch_size * launch.ranks * launch.hosts"
    )
    exact_div(table.rollouts, table.group_size, f"{where}: ppo.rollouts, ppo.group_size")
    if (table.engine != "local") != bool(table.engine_url):
        fix = 'give the server\'s address, e.g. "http://node0:8000/v1", or take ppo.engine = "local"'
        raise UserError("a server and its address go together", where=f"{where}: ppo.engine_url", fix=fix)
    if table.engine != "local" and not table.tis_cap:
        fix = "2 is usual"
        raise UserError("a server's log-probabilities are not the trainer's", where=f"{where}: ppo.tis_cap", fix=fix)
    if table.engine == "openai" and table.tune != "lora":
        fix = 'set ppo.tune = "lora", or ppo.engine = "vllm"'
        raise UserError("only adapters are handed over by disk", where=f"{where}: ppo.engine", fix=fix)
    if table.advantage != "gae" and table.group_size < 2:
        raise UserError(
            f"{table.advantage} compares the answers to a prompt, and group_size is 1",
            where=f"{where}: ppo.group_size",
            fix="sample at least two answers a prompt, e.g. ppo.group_size = 4",
        )
    if table.reward_weights and len(table.reward_weights) != len(table.rewards):
        raise UserError(
            f"{len(table.rewards)} rewards have {len(table.reward_weights)} weights",
            where=f"{where}: ppo.reward_weights",
            fix="give one weight for each of ppo.rewards, or none",
        )
    if len(set(table.rewards)) < len(table.rewards):
        raise UserError("a reward is named twice", where=f"{where}: ppo.rewards", fix="name it once, with a weight")
    if 0 < table.dual_clip <= 1:
        raise UserError("it bounds ratios above 1", where=f"{where}: ppo.dual_clip", fix="3 is usual; 0 sets no bound")
    if (table.ptx_coef > 0) != bool(table.ptx_data):
        raise UserError("ptx_coef and ptx_data go together", where=f"{where}: ppo.ptx_coef", fix="give both, or neither")
    if "ppo" in recipe.stages and "reward" in table.rewards and recipe.reward.tune != "lora":
        raise UserError(
            "PPO shares its base with the preference model, which must be an adapter for that",
            where=f"{where}: reward.tune",
            fix='set reward.tune = "lora", or name a folder with a sequence classifier in ppo.rewards',
        )
    start = table.parent
    if "ppo" in recipe.stages and ppo_base(recipe) != start:
        stage = getattr(recipe, start, None)
        if not isinstance(stage, Training) or stage.tune != "lora" or stage.parent != ppo_base(recipe):
            raise UserError(
                f"ppo.parent = {start} and reward.parent = {recipe.reward.parent} differ in their base",
                where=where,
                fix='start PPO from reward.parent, or from a stage with tune = "lora" whose parent is reward.parent',
            )


def ppo_base(recipe: Recipe) -> str:
    """The stage whose frozen weights PPO's adapters share: the preference model's parent, if that scores."""
    return recipe.reward.parent if "reward" in recipe.ppo.rewards else recipe.ppo.parent
