"""``python -m reward RECIPE``: train the preference model and measure it on held-out topics."""

from __future__ import annotations

import random
from typing import Any

import torch
from datasets import Dataset

from reward.trainer import PairCollator, SoftRewardTrainer
from truthward import chat, hardware, models, stats
from truthward.console import say
from truthward.errors import UserError
from truthward.ledger import Run, whole_directory
from truthward.records import Preference, Question, draw, read_preferences, read_rows, truth_preferences
from truthward.stage import main
from truthward.tables import Recipe
from truthward.tensors import pad
from truthward.tracking import tracked
from truthward.trainers import fit, refuse_long, trainer_arguments


def run(recipe: Recipe, this: Run) -> None:
    """Train, score the validation pairs, and write adapter and head."""
    from trl import RewardConfig

    table, parent = recipe.reward, this.parent("model")
    tokenizer = models.load_tokenizer(parent)
    constitution = this.parent("preferences").path if "preferences" in this.manifest["parents"] else None
    preferences = draw(read_preferences(table.preferences, constitution), table.max_pairs, recipe.seed)
    validation = truth_preferences(read_rows(table.validation, Question), table.validation)
    rows = [to_ids(tokenizer, p) for p in preferences]
    refuse_long(
        [max(len(r["chosen_ids"]), len(r["rejected_ids"])) for r in rows], table.max_length, "pairs", "reward.max_length"
    )
    dtype, compute = hardware.set_up(recipe.model, this)
    say(f"  {len(rows)} pairs, {len(validation)} for validation; {compute}")
    config = RewardConfig(
        **trainer_arguments(table, recipe.launch, this, recipe.seed), center_rewards_coefficient=table.center_coef
    )
    trainer = SoftRewardTrainer(
        model=sequence_classifier(models.load(parent, dtype), recipe.seed),
        args=config,
        data_collator=PairCollator(tokenizer.pad_token_id),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=models.lora_config(table.lora_rank, table.lora_alpha, "SEQ_CLS") if table.tune == "lora" else None,
    )
    with tracked(recipe, this) as tracker:
        steps = fit(trainer, tracker, "reward")
    scored = score_pairs(trainer.model, [to_ids(tokenizer, p) for p in validation], tokenizer.pad_token_id)
    right = [float(chosen > rejected) for chosen, rejected in scored]
    topics = [p.source.rsplit("/", 1)[-1] for p in validation]  # a question's pairs are one cluster
    accuracy = stats.mean_interval(right, clusters=topics, resamples=recipe.evals.resamples, seed=recipe.seed)
    with whole_directory(this.model_dir) as folder:
        trainer.model.save_pretrained(folder)
        models.save_head(folder, weight=head_of(trainer.model))
    say(f"  validation accuracy {accuracy}")
    self_check(scored)
    this.finish(metrics={"pairs": len(rows), "steps": steps, "validation_accuracy": accuracy.as_dict()})


def to_ids(tokenizer: Any, preference: Preference) -> dict[str, Any]:
    """A pair as token rows that end with the end token.

    Raises:
        UserError: the text holds the pad token, at which a score could be read by mistake.
    """
    prompt = chat.prompt_ids(tokenizer, chat.user(preference.prompt))
    rows = {f"{side}_ids": prompt + chat.answer_ids(tokenizer, getattr(preference, side)) for side in ("chosen", "rejected")}
    if any(tokenizer.pad_token_id in ids for ids in rows.values()):
        raise UserError(f"the text holds {tokenizer.pad_token}", where=preference.source, fix="take the pad token out")
    return {**rows, "probability": preference.probability}


def sequence_classifier(model: Any, seed: int) -> Any:
    """The decoder of a chat model under a fresh scalar head ~ N(0, 1/(d+1)) (Huang et al. 2024, arXiv 2403.17031)."""
    from transformers import AutoModelForSequenceClassification

    config = model.config.__class__.from_dict({**model.config.to_dict(), "num_labels": 1})
    with torch.device("meta"):
        classifier = AutoModelForSequenceClassification.from_config(config)
    setattr(classifier, classifier.base_model_prefix, model.get_decoder())
    head = torch.nn.Linear(config.hidden_size, 1, bias=False, dtype=model.dtype)
    generator = torch.Generator().manual_seed(seed)
    head.weight.data.copy_(torch.randn(head.weight.shape, generator=generator) / (config.hidden_size + 1) ** 0.5)
    classifier.score = head
    return classifier


def head_of(model: Any) -> torch.Tensor:
    """The trained scalar head's weight ``[1, hidden]``, under LoRA or not."""
    score = getattr(model, "base_model", model)
    score = score.model.score if hasattr(score, "model") and hasattr(score.model, "score") else model.score
    return score.modules_to_save["default"].weight if hasattr(score, "modules_to_save") else score.weight


@torch.inference_mode()
def score_pairs(model: Any, rows: list[dict[str, Any]], pad_id: int, batch: int = 32) -> list[tuple[float, float]]:
    """Scores of chosen and rejected for each pair."""
    model.eval()
    flat = [r[side] for r in rows for side in ("chosen_ids", "rejected_ids")]
    order = sorted(range(len(flat)), key=lambda i: len(flat[i]))
    scores = [0.0] * len(flat)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        ids, mask = pad([flat[i] for i in chosen], pad_id)
        logits = model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
        for i, value in zip(chosen, logits.squeeze(-1).float().tolist(), strict=True):
            scores[i] = value
    return list(zip(scores[::2], scores[1::2], strict=True))


def self_check(scored: list[tuple[float, float]]) -> None:
    """Warn when every score is the same: the head is dead and PPO would climb nothing."""
    values = [v for pair in random.Random(0).sample(scored, min(50, len(scored))) for v in pair]
    if max(values) - min(values) < 1e-6:
        say("  [yellow]warning[/]: the preference model gives every answer the same score")


if __name__ == "__main__":
    main("reward", run)
