"""``python -m reward RECIPE``: train the preference model and measure it on held-out topics."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from datasets import Dataset

from reward.trainer import SoftRewardTrainer, collate
from truthward import hardware, models, ranks, stats, zero
from truthward.branches import Item, attend_by_tree, plant
from truthward.console import say
from truthward.errors import UserError
from truthward.ledger import Run
from truthward.records import (
    Margin,
    Pair,
    Preference,
    Question,
    by_prompt,
    draw,
    read_pairs,
    read_preferences,
    read_rows,
    truth_preferences,
    write_rows,
)
from truthward.stage import main
from truthward.tables import Recipe
from truthward.tracking import tracked
from truthward.trainers import fit, refuse_long, to_row, trainer_arguments


def run(recipe: Recipe, this: Run) -> None:
    """Train, score the validation pairs, and write adapter and head."""
    from trl import RewardConfig

    table, parent = recipe.reward, this.parent("model")
    tokenizer = models.load_tokenizer(parent)
    constitution = this.parent("preferences").path if "preferences" in this.manifest["parents"] else None
    preferences = read_preferences(table.preferences, constitution, cross=True)
    groups = by_prompt([p for p in preferences if not set(p.principle) & set(table.without)])
    groups = draw(groups, table.max_prompts, recipe.seed)
    refuse_pad(tokenizer, groups)
    rows = [to_row(tokenizer, group) for group in groups]
    refuse_long([longest(row) for row in rows], table.max_length, "prompts with an answer", "reward.max_length")
    validation = by_prompt(truth_preferences(read_rows(table.validation, Question), table.validation))
    held_out = [to_row(tokenizer, group) for group in validation]
    dtype, compute = hardware.set_up(recipe.model, this)
    pairs = sum(len(row["pairs"]) for row in rows)
    say(f"  {pairs} pairs on {len(rows)} prompts, {len(held_out)} for validation; {compute}")
    trainer = SoftRewardTrainer(
        model=position_scorer(models.load_cut(parent, dtype, recipe.launch), recipe.seed),
        args=RewardConfig(
            **trainer_arguments(table, recipe.launch, dtype, this, recipe.seed), center_rewards_coefficient=table.center_coef
        ),
        data_collator=partial(collate, dtype=dtype),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=models.lora_config(table.lora_rank, table.lora_alpha, "SEQ_CLS") if table.tune == "lora" else None,
    )
    with tracked(recipe, this) as tracker:
        steps = fit(trainer, tracker, "reward", recipe.guard)
        scores = score_answers(trainer.model, held_out)
        right = [float(s[w] > s[loser]) for s, row in zip(scores, held_out, strict=True) for w, loser in row["pairs"]]
        questions = [p.source for group in validation for p in group]  # a question's pairs are one cluster
        accuracy = stats.mean_interval(right, clusters=questions, resamples=recipe.evals.resamples, seed=recipe.seed)
        made = trainer.model if table.tune == "lora" else sequence_classifier(trainer.model)
        models.save(this, made, head=zero.whole(head_of(trainer.model)))
        say(f"  validation accuracy {accuracy}")
        self_check(scores)
        metrics = {"pairs": pairs, "prompts": len(rows), "steps": steps, "validation_accuracy": accuracy.as_dict()}
        labelled = read_pairs(table.principle_bank, table.principle_pairs)
        margins = measure(trainer.model, tokenizer, labelled)
        ranks.lead(lambda: write_rows(this.path / "margins.jsonl", margins))
        flat = [pair for pairs in labelled.values() for pair in pairs]
        this.finish(metrics=metrics | by_principle(margins, flat, recipe.evals.resamples, recipe.seed))


def measure(model: Any, tokenizer: Any, labelled: dict[str, list[Pair]]) -> list[Margin]:
    """Score both answers of every labelled pair."""
    flat = [pair for pairs in labelled.values() for pair in pairs]
    rows = [to_row(tokenizer, [Preference(prompt=p.prompt, chosen=p.better, rejected=p.worse)]) for p in flat]
    scores = score_answers(model, rows, batch=16)
    return [Margin(id=p.id, principle=p.principle, margin=a - b) for p, (a, b) in zip(flat, scores, strict=True)]


def by_principle(margins: list[Margin], pairs: list[Pair], resamples: int, seed: int) -> dict[str, Any]:
    """How the preference model ranks labelled pairs of which one answer keeps a principle and the other breaks it.

    It never saw them; the judge that labelled the constitution's rows was chosen on them.

    Returns:
        ``principles``: accuracy of each; ``principle_accuracy`` over all; ``calibration`` (Brier score and expected error of
        ``sigmoid(r_better - r_worse)``); ``longer``: how often it takes the longer answer.
    """
    values, names = [m.margin for m in margins], dict.fromkeys(m.principle for m in margins)
    by = {name: [m.margin for m in margins if m.principle == name] for name in names}
    found = {name: stats.accuracy(own, resamples, seed).as_dict() for name, own in by.items()}
    whole = stats.accuracy(values, resamples, seed)
    longer = stats.takes_longer([(len(p.better), len(p.worse)) for p in pairs], values, resamples, seed)
    say(f"  accuracy by principle {whole}")
    return {
        "principles": found,
        "principle_accuracy": whole.as_dict(),
        "calibration": stats.calibration(values),
        "longer": longer.as_dict() if longer else None,
    }


def refuse_pad(tokenizer: Any, groups: list[list[Preference]]) -> None:
    """A Hugging Face sequence classifier reads its score at the last token that is not padding, which text must not hold.

    Raises:
        UserError: some text holds the pad token.
    """
    for preference in (p for group in groups for p in group):
        texts = (preference.prompt, preference.chosen, preference.rejected)
        if any(tokenizer.pad_token in text for text in texts):
            raise UserError(f"the text holds {tokenizer.pad_token}", where=preference.source, fix="take the pad token out")


def longest(row: dict[str, Any]) -> int:
    """Tokens of a prompt with the longest of its answers."""
    return len(row["prompt_ids"]) + max(map(len, row["answer_ids"]))


def position_scorer(model: Any, seed: int) -> Any:
    """The decoder of a chat model under a fresh scalar head ~ N(0, 1/(d+1)) (Huang et al. 2024, arXiv 2403.17031).

    As Hugging Face's token classifier it scores every position, so that many answers can stand in one row.
    """
    from transformers import AutoModelForTokenClassification

    head = torch.nn.Linear(model.config.hidden_size, 1, bias=False, dtype=model.dtype)
    generator = torch.Generator().manual_seed(seed)
    head.weight.data.copy_(torch.randn(head.weight.shape, generator=generator) / (model.config.hidden_size + 1) ** 0.5)
    return attend_by_tree(_under(AutoModelForTokenClassification, model, head, classifier_dropout=0.0))


def sequence_classifier(scorer: Any) -> Any:
    """The same decoder and head as the sequence classifier that users load: one score, at a row's last token."""
    from transformers import AutoModelForSequenceClassification

    return _under(AutoModelForSequenceClassification, scorer, scorer.score)


def _under(kind: Any, model: Any, head: torch.nn.Linear, **settings: Any) -> Any:
    config = model.config.__class__.from_dict({**model.config.to_dict(), "num_labels": 1, **settings})
    with torch.device("meta"):
        classifier = kind.from_config(config)
    setattr(classifier, classifier.base_model_prefix, model.get_decoder())
    classifier.score = head
    return classifier


def head_of(model: Any) -> torch.nn.Parameter:
    """The trained scalar head's weight ``[1, hidden]``, under LoRA or not."""
    score = getattr(model, "base_model", model)
    score = score.model.score if hasattr(score, "model") and hasattr(score.model, "score") else model.score
    return score.modules_to_save["default"].weight if hasattr(score, "modules_to_save") else score.weight


@torch.inference_mode()
def score_answers(model: Any, rows: list[dict[str, Any]], batch: int = 4) -> list[list[float]]:
    """Scores of every answer of every prompt, ``batch`` prompts in a forward pass."""
    model.eval()
    scores: list[list[float]] = []
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        forest = plant([Item(row["prompt_ids"], row["answer_ids"]) for row in part]).to(model.device)
        logits = model(**forest.inputs(model.dtype), use_cache=False).logits
        flat = iter(logits[0, forest.tip, 0].float().tolist())
        scores += [[next(flat) for _ in row["answer_ids"]] for row in part]
    return scores


def self_check(scores: list[list[float]]) -> None:
    """Warn when every score is the same: the head is dead and PPO would climb nothing."""
    values = [value for row in scores for value in row]
    if max(values) - min(values) < 1e-6:
        say("  [yellow]warning[/]: the preference model gives every answer the same score")


if __name__ == "__main__":
    main("reward", run)
