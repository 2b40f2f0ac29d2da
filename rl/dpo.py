"""``python -m rl.dpo RECIPE``: direct preference optimisation with soft labels, on TRL's trainer.

The reference is the parent model; its log-probabilities are computed once, before training, and the first loss is
asserted to be ln 2. A pair's prompt is computed once for both answers, rows carry no padding, and only positions that
predict an answer pass through the LM head (:mod:`truthward.branches`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from rl.losses import dpo_loss
from truthward import chat, hardware, models
from truthward.branches import Item, plant
from truthward.console import progress, say
from truthward.guard import check_start
from truthward.ledger import Run
from truthward.recipe import Recipe
from truthward.records import read_preferences
from truthward.score import answer_sums
from truthward.stage import main
from truthward.tensors import token_logprobs
from truthward.tracking import tracked
from truthward.trainers import fit, refuse_long, trainer_arguments


class SoftDpoTrainer(DPOTrainer):
    """The loss of :mod:`rl.losses` on TRL's loop, for rows that already hold tokens and reference log-probabilities."""

    run: Run
    model: Any
    _signature_columns: Any

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen", "ref_rejected", "probability"]

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        ref, probability = inputs.pop("ref_logprobs"), inputs.pop("probability")
        target, branch = inputs.pop("target"), inputs.pop("branch")
        inputs["attention_mask"] = inputs["attention_mask"].to(self.model.dtype)
        outputs = model(**inputs, use_cache=False)
        logprobs = token_logprobs(outputs.logits[0], target)
        sums = torch.zeros(ref.numel(), device=ref.device).index_add(0, branch, logprobs).view_as(ref)
        chosen, rejected = sums.unbind(1)
        ref_chosen, ref_rejected = ref.unbind(1)
        loss = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, probability, beta=self.beta)
        margins = loss.chosen_rewards - loss.rejected_rewards
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, values in (
            ("rewards/chosen", loss.chosen_rewards),
            ("rewards/rejected", loss.rejected_rewards),
            ("rewards/margins", margins),
            ("rewards/accuracies", (margins > 0).float()),
        ):
            metrics[name].append(self.accelerator.gather(values).mean().item())
        mean = loss.losses.mean()
        if self.state.global_step == 0:
            exact = self.model.dtype == torch.float32
            check_start("dpo loss", mean.item(), math.log(2), 1e-3 if exact else 0.05, self.run)
        return (mean, outputs) if return_outputs else mean


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A micro-batch of pairs as one row of trees."""
    forest = plant([[Item(r["prompt_ids"], [r["chosen_ids"], r["rejected_ids"]]) for r in rows]])
    return {
        "input_ids": forest.ids,
        "attention_mask": forest.additive(torch.float32),
        "position_ids": forest.positions,
        "logits_to_keep": forest.source,
        "target": forest.target,
        "branch": forest.branch,
        "ref_logprobs": torch.tensor([[r["ref_chosen"], r["ref_rejected"]] for r in rows]),
        "probability": torch.tensor([r["probability"] for r in rows]),
    }


def reference_sums(model: Any, items: list[Item]) -> list[tuple[float, float]]:
    """log p of chosen and rejected under the reference, each prompt computed once however many pairs it has."""
    answers: dict[tuple[int, ...], dict[tuple[int, ...], float]] = {}
    for item in items:
        answers.setdefault(tuple(item.prompt), {}).update({tuple(a): 0.0 for a in item.answers})
    merged = [Item(list(prompt), [list(a) for a in held]) for prompt, held in answers.items()]
    with progress() as bar:
        task = bar.add_task("dpo reference", total=len(merged))
        sums = answer_sums(model, merged, tick=lambda n: bar.advance(task, n))
    for held, row in zip(answers.values(), sums, strict=True):
        held.update(zip(list(held), row, strict=True))
    looked_up = [[answers[tuple(i.prompt)][tuple(a)] for a in i.answers] for i in items]
    return [(chosen, rejected) for chosen, rejected in looked_up]


def run(recipe: Recipe, this: Run) -> None:
    """Train the DPO policy and write its adapter (or weights)."""
    table, parent = recipe.dpo, this.parent("model")
    tokenizer = models.load_tokenizer(parent)
    constitution = this.parent("preferences").path if "preferences" in this.manifest["parents"] else None
    preferences = read_preferences(table.preferences, constitution, table.max_pairs, recipe.seed)
    items = [
        Item(
            chat.prompt_ids(tokenizer, chat.user(p.prompt)),
            [chat.answer_ids(tokenizer, p.chosen), chat.answer_ids(tokenizer, p.rejected)],
        )
        for p in preferences
    ]
    refuse_long([i.length for i in items], table.max_length, "pairs (prompt and both answers)", "dpo.max_length")
    hardware.use_threads(recipe.model.threads)
    dtype, reason = hardware.choose_dtype(recipe.model.dtype)
    say(f"  {len(items)} pairs; {str(dtype)[6:]} ({reason})")
    this.record(dtype=str(dtype), dtype_reason=reason)
    model = models.load(parent, dtype)
    reference = reference_sums(model, items)
    rows = [
        {
            "prompt_ids": item.prompt,
            "chosen_ids": item.answers[0],
            "rejected_ids": item.answers[1],
            "ref_chosen": chosen,
            "ref_rejected": rejected,
            "probability": preference.probability,
        }
        for item, (chosen, rejected), preference in zip(items, reference, preferences, strict=True)
    ]
    trainer = SoftDpoTrainer(
        model=model,
        args=DPOConfig(
            **trainer_arguments(table, recipe.launch, this, recipe.seed), beta=table.beta, precompute_ref_log_probs=True
        ),
        data_collator=collate,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=models.lora_config(table.lora_rank, table.lora_alpha) if table.tune == "lora" else None,
    )
    trainer.run = this
    with tracked(recipe, this) as tracker:
        steps = fit(trainer, tracker, "dpo")
    models.save(this, trainer.model)
    last = [h for h in trainer.state.log_history if "loss" in h][-1]
    this.finish(metrics={"pairs": len(rows), "steps": steps, "loss": last["loss"], "accuracy": last["rewards/accuracies"]})


if __name__ == "__main__":
    main("dpo", run)
