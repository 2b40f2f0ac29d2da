"""A cluster's recipe at a size that a laptop does in minutes: the same stages and settings of training on a tiny model.

What decides which code runs (stages, tune, ZeRO, offload, estimator, losses, ways of making rows) stays; sizes, counts and
the machine are cut. The result is a recipe file of its own, with a reason for each value that was cut, so that its record
tells what it is: it shows that a recipe runs, and nothing about what it would learn.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from truthward import chat
from truthward.check.facts import Facts
from truthward.errors import UserError
from truthward.ledger import whole_directory, write_text
from truthward.models import TINY, fetch_base
from truthward.recipe import load_recipe, probed
from truthward.record.settings import recipe_toml
from truthward.records import Prompt
from truthward.tables import Recipe

RANKS = 2
FAMILIES = {"llama": "llama", "smollm": "llama", "mistral": "mistral", "qwen3": "qwen3", "qwen": "qwen2"}  # by name
WHY = "shrunk from {} to run in minutes"
STEPS = 3  # optimizer steps of a stage, about
POSITIONS = 2048  # of the tiny model
OWN = 512  # room for its own answers to a prompt, which are noise of a few bytes
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def shrink(recipe: Recipe, ranks: int = RANKS) -> dict[str, Any]:
    """The values of a recipe, cut.

    Args:
        recipe: as it was written.
        ranks: processes to keep at most, on one host.

    Returns:
        a dumped recipe, which :func:`write` makes a file of.

    Raises:
        UserError: the base is of a family of which no tiny model is made.
    """
    made: dict[str, Any] = recipe.model_dump(mode="json")
    _set(made, "", name=f"{recipe.name}-shrunk")
    _set(made, "model", base=TINY, dtype="float32", threads=0)
    _set(made, "launch", ranks=min(ranks, recipe.launch.world), hosts=1, rendezvous="")
    world = made["launch"]["ranks"]
    lengths = _lengths(recipe)
    for stage in [s for s in ("sft", "distill", "reward", "dpo") if s in recipe.stages]:
        _shrink_training(recipe, made, stage, world, lengths)
    _set(made, "constitution", max_prompts=6, max_new_tokens=8, batch_size=8)
    _set(made, "judge", base_url="", model="", gate="warn", pairs=2)
    _set(made, "reward", principle_pairs=2)
    if "ppo" in recipe.stages:
        _shrink_ppo(recipe, made, world, lengths)
    if probed(recipe):
        _set(made, "guard", probe_every=1, probe_questions=2)
    _set(made, "evals", most=3, resamples=200, gate="warn", files={}, lm_eval=[])
    brief = [stage for stage in recipe.evals.models if stage not in ("base", recipe.evals.models[-1])]
    _set(made, "evals", brief=brief)
    positions = max(lengths["sft"], lengths["reward"], lengths["ppo"] + made["ppo"]["max_new_tokens"])
    made["model"]["base"] = _base(recipe, made, positions)
    return made


def _set(made: dict[str, Any], table: str, **values: Any) -> None:
    """Change values, and put the reason beside each that is another than before."""
    into = made[table] if table else made
    for key, value in values.items():
        if into[key] != value:
            into["why"] = {**into["why"], key: WHY.format(json.dumps(into[key], ensure_ascii=False))}
            into[key] = value


def _lengths(recipe: Recipe) -> dict[str, int]:
    """The longest row of each trained stage, and PPO's longest prompt, in tokens of the tiny model: bytes."""
    draft = recipe.model_copy(update={"model": recipe.model.model_copy(update={"base": TINY})})
    facts = Facts(draft, "")

    def longest(*paths: str) -> int:
        prompts = [facts.render(chat.user(row.prompt)) for path in paths for row in facts.rows(path, Prompt)]
        return max(facts.lengths(prompts), default=0)

    found = {"sft": max(facts.tokens("sft"), default=0)}
    asked = longest(*recipe.constitution.prompts) if "constitution" in recipe.stages else 0
    for stage, together in (("reward", max), ("dpo", sum)):  # what each compares with its max_length
        rows = [prompt + together(answers) for prompt, answers in facts.lengths_of(stage)]
        found[stage] = max([*rows, asked + OWN])
    found["ppo"] = longest(recipe.ppo.prompts) if "ppo" in recipe.stages else 0
    return found


def _shrink_training(recipe: Recipe, made: dict[str, Any], stage: str, world: int, lengths: dict[str, int]) -> None:
    """Few short steps, with as many micro-batches in each as two where there were more than one."""
    table: Any = getattr(recipe, stage)
    packed = stage == "sft" and table.packing
    micro = min(table.micro_batch_size, table.batch_size, 2)
    before = table.batch_size // ((1 if packed else min(table.micro_batch_size, table.batch_size)) * recipe.launch.world)
    rows = (1 if packed else micro) * world * min(before, 2)
    _set(made, stage, batch_size=rows, checkpoint_every=2)
    if not packed:
        _set(made, stage, micro_batch_size=micro)
    if stage == "distill":
        _set(
            made,
            stage,
            max_length=POSITIONS,
            max_prompts=STEPS * rows,
            max_new_tokens=8,
            samples=min(table.samples, 2),
            epochs=min(table.epochs, 1.0),
        )
        return
    _set(made, stage, max_length=max(64, lengths[stage]))
    if stage in ("sft", "dpo") and table.replay:
        _set(made, stage, replay_prompts=min(table.replay_prompts, STEPS * rows), replay_tokens=8)
    if stage == "sft":
        count = Facts(Recipe.model_validate(made), "").sequences("sft")
        _set(made, stage, epochs=min(table.epochs, round(STEPS * rows / max(1, count), 4)))
    else:
        _set(made, stage, max_prompts=min(table.max_prompts, STEPS * rows), epochs=min(table.epochs, 1.0))


def _shrink_ppo(recipe: Recipe, made: dict[str, Any], world: int, lengths: dict[str, int]) -> None:
    """Two iterations, with as many minibatches as two where there were more than one."""
    table = recipe.ppo
    micro, minibatches = min(table.micro_batch_size, 2), min(table.minibatches, 2)
    rollouts = math.lcm(minibatches * micro * world, table.group_size)
    _set(made, "ppo", iterations=2, epochs=min(table.epochs, 2), minibatches=minibatches, micro_batch_size=micro)
    _set(made, "ppo", rollouts=max(rollouts, 2), max_new_tokens=12, max_prompt_tokens=max(64, lengths["ppo"]))
    _set(made, "ppo", engine="local", engine_url="")  # there is no GPU to serve from


# ---------------------------------------------------------------------------------------------------------------- model


def family(base: str) -> str:
    """The class of models that a base is of, as transformers calls it: from its ``config.json``, or its name.

    Raises:
        UserError: neither tells one of which a tiny model is made.
    """
    config = Path(base) / "config.json"
    if config.is_file():
        kind = json.loads(config.read_text(encoding="utf-8")).get("model_type", "")
        if kind in FAMILIES.values():
            return kind
    elif base == TINY:
        return "llama"
    named = next((kind for name, kind in FAMILIES.items() if name in base.casefold()), "")
    if config.is_file() or not named:
        fix = f"--shrink knows {', '.join(dict.fromkeys(FAMILIES.values()))}; name a folder with the config.json of one"
        raise UserError(f"of which family is {base}?", where="model.base", fix=fix)
    return named


def _base(recipe: Recipe, made: dict[str, Any], positions: int) -> str:
    """A tiny model of the base's class: the one that needs no folder, where it is of that class and long enough."""
    kind, positions = family(recipe.model.base), max(positions, POSITIONS)
    if (kind, positions) == ("llama", POSITIONS):
        return TINY
    folder = Path(recipe.runs) / made["name"] / f"tiny-{kind}-{positions}"
    if not folder.exists():
        _write_model(folder, kind, positions, recipe.seed)
    return str(folder)


def _write_model(folder: Path, kind: str, positions: int, seed: int) -> None:
    """A model of a class with the sizes and the tokenizer of ``tiny-random``."""
    tiny, tokenizer = fetch_base(TINY, seed)
    sizes = {key: getattr(tiny.config, key) for key in SIZES}
    config = AutoConfig.for_model(kind, **{**sizes, "max_position_embeddings": positions, "head_dim": 12})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
    with whole_directory(folder) as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)


# ----------------------------------------------------------------------------------------------------------------- file


def write(recipe: Recipe, ranks: int = RANKS) -> Path:
    """Write the shrunk recipe to ``runs/<name>-shrunk/recipe.toml``, which every stage then reads.

    Raises:
        UserError: as :func:`shrink`; or there is no rank to run on.
    """
    if ranks < 1:
        raise UserError(f"it cannot run on {ranks} ranks", where="--shrink", fix="give 1 or more, or no number for 2")
    made = shrink(recipe, ranks)
    path = Path(recipe.runs) / made["name"] / "recipe.toml"
    head = (
        f"# {recipe.origin.path}, shrunk by truthward: it shows that the recipe runs, and nothing of what it would learn.\n"
    )
    write_text(path, f"{head}runs = {json.dumps(recipe.runs)}\n{recipe_toml(made)}")
    load_recipe(path)  # what was cut must still divide
    return path
