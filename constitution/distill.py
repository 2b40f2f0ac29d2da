"""``python -m constitution.distill RECIPE``: a model learns to keep principles untold, and without labels.

The parent answers prompts. At every token of its own answers, what it would say next when told to keep a principle and
when told to break it makes a target (:func:`constitution.losses.contrastive_target`), which the model learns to meet
without a system prompt. Answers are written once, before training; targets are made as they are needed.
"""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any

from peft import get_peft_model
from transformers import TrainingArguments, set_seed

from constitution.student import DistillTrainer, collate
from truthward import chat, hardware, models, ranks
from truthward.console import progress, say
from truthward.errors import UserError
from truthward.generate import generate
from truthward.ledger import Run, digest
from truthward.principles import Principle, read_principles
from truthward.records import Prompt, Question, Row, draw, read_rows, write_rows
from truthward.stage import main
from truthward.tables import Distill, Recipe
from truthward.tracking import tracked
from truthward.trainers import fit, refuse_long, trainer_arguments


class Sample(Row):
    """A prompt, the principle drawn for it, and the parent's own answers as text and as the tokens it drew."""

    prompt: str
    principle: str
    principle_version: int
    answers: list[str]
    answer_ids: list[list[int]]
    seeds: list[int]
    model: str


def run(recipe: Recipe, this: Run) -> None:
    """Let the parent answer, train the student, and write its adapter (or weights)."""
    table, parent = recipe.distill, this.parent("model")
    principles = {p.id: p for p in chosen(table)}
    tokenizer = models.load_tokenizer(parent)
    dtype, compute = hardware.set_up(recipe.model, this)
    model = models.load(parent, dtype)
    path = this.path / "samples.jsonl"

    def sample() -> None:
        if not path.exists():
            prompts = draw(read_prompts(table.prompts), table.max_prompts, recipe.seed)
            drawn = [draw_principle(list(principles.values()), recipe.seed, prompt) for prompt in prompts]
            write_rows(path, answered(recipe, model, tokenizer, prompts, drawn, parent.manifest["fingerprint"]))

    ranks.lead(sample)
    samples = read_rows(path, Sample)
    rows = [to_row(tokenizer, sample, principles[sample.principle]) for sample in samples]
    lengths = [max(map(len, row["prompts"])) + sum(map(len, row["answers"])) for row in rows]
    refuse_long(lengths, table.max_length, "prompts with system prompt and answers", "distill.max_length")
    tokens = sum(len(answer) for row in rows for answer in row["answers"])
    say(f"  {len(rows)} prompts, {tokens} tokens of answers, {len(principles)} principles; {compute}")
    arguments = trainer_arguments(table, recipe.launch, dtype, this, recipe.seed)
    del arguments["max_length"]  # a word of TRL's
    if table.tune == "lora":
        set_seed(recipe.seed)  # for the adapter's first weights
        model = get_peft_model(model, models.lora_config(table.lora_rank, table.lora_alpha))
    trainer = DistillTrainer(
        this,
        alpha=table.alpha,
        cutoff=table.cutoff,
        model=model,
        args=TrainingArguments(**arguments, remove_unused_columns=False),
        data_collator=partial(collate, dtype=dtype),
        train_dataset=rows,
    )
    with tracked(recipe, this) as tracker:
        steps = fit(trainer, tracker, "distill", recipe.guard)
        models.save(this, trainer.model)
        logged = [h for h in trainer.state.log_history if "loss" in h]
        last = {key: logged[-1][key] for key in ("loss", "shift")}
        this.finish(metrics={"prompts": len(rows), "tokens": tokens, "steps": steps, **last})


def chosen(table: Distill) -> list[Principle]:
    """The principles that take part.

    Raises:
        UserError: a word of ``use`` is neither the tag nor the id of any.
    """
    principles = read_principles(*table.principles)
    words = {p.id: {p.id, *p.tags} for p in principles}
    known = set().union(*words.values())
    if unknown := sorted(set(table.use) - known):
        fix = f"tags and ids are: {', '.join(sorted(known))}"
        raise UserError(f"no principle has the tag or id {unknown[0]}", where="distill.use", fix=fix)
    return [p for p in principles if not table.use or words[p.id] & set(table.use)]


def read_prompts(paths: list[str]) -> list[str]:
    """The prompts of files and the questions of truth banks (folders), each once; no answer is read."""
    texts = []
    for path in paths:
        if Path(path).is_dir():
            texts += [row.question for row in read_rows(path, Question)]
        else:
            texts += [row.prompt for row in read_rows(path, Prompt)]
    return list(dict.fromkeys(texts))


def draw_principle(principles: list[Principle], seed: int, prompt: str) -> Principle:
    """One principle for a prompt, by weight."""
    generator = random.Random(_seed(seed, prompt, "principle"))
    return generator.choices(principles, [p.weight for p in principles])[0]


def answered(
    recipe: Recipe, model: Any, tokenizer: Any, prompts: list[str], principles: list[Principle], fingerprint: str
) -> list[Sample]:
    """The model's own answers to prompts, without a system prompt."""
    table = recipe.distill
    asked = [(prompt, _seed(recipe.seed, prompt, f"answer {k}")) for prompt in prompts for k in range(table.samples)]
    with progress() as bar:
        task = bar.add_task("distill answers", total=len(asked))
        spoken = generate(
            model,
            [chat.prompt_ids(tokenizer, chat.user(prompt)) for prompt, _ in asked],
            [seed for _, seed in asked],
            eos=tokenizer.eos_token_id,
            pad_id=tokenizer.pad_token_id,
            max_new_tokens=table.max_new_tokens,
            temperature=table.temperature,
            tick=lambda n: bar.advance(task, n),
        )
    samples = []
    for i, (prompt, principle) in enumerate(zip(prompts, principles, strict=True)):
        part = slice(i * table.samples, (i + 1) * table.samples)
        samples.append(
            Sample(
                prompt=prompt,
                principle=principle.id,
                principle_version=principle.version,
                answers=[chat.decode(tokenizer, c.ids) for c in spoken[part]],
                answer_ids=[c.ids for c in spoken[part]],
                seeds=[seed for _, seed in asked[part]],
                model=fingerprint,
            )
        )
    return samples


def to_row(tokenizer: Any, sample: Sample, principle: Principle) -> dict[str, Any]:
    """A row as :func:`constitution.student.collate` takes it."""
    asked = [chat.user(sample.prompt, system) for system in ("", principle.follow, principle.violate)]
    return {"prompts": [chat.prompt_ids(tokenizer, messages) for messages in asked], "answers": sample.answer_ids}


def _seed(seed: int, prompt: str, purpose: str) -> int:
    return int(digest([seed, prompt, purpose])[:12], 16)


if __name__ == "__main__":
    main("distill", run)
