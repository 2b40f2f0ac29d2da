"""``python -m rl.dpo RECIPE``: direct preference optimisation with soft labels, on TRL's trainer.

One row is a prompt with all its pairs, as in Ouyang et al. 2022, section 3.5: each answer goes through the model once,
however many pairs it is in, the prompt once for all answers, without padding, and only positions that predict an answer
pass through the LM head (:mod:`truthward.branches`). The reference is the parent model; its log-probabilities are computed
once, before training, and the first loss is asserted to be ln 2.

Beside prompts with pairs stand the parent's own answers to ordinary prompts (:mod:`truthward.replay`); at each of their
tokens the policy is held to the parent's distribution, ``+ replay_coef * KL(parent || policy)``.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from trl import DPOConfig, DPOTrainer

from rl.losses import DpoLoss, dpo_loss, dpo_positive_loss
from truthward import hardware, interpolation, models, ranks, replay, zero
from truthward.branches import Item
from truthward.console import progress, say
from truthward.guard import check_start
from truthward.head import scoring_head
from truthward.ledger import Run
from truthward.records import by_prompt, draw, read_preferences
from truthward.replay import Replay
from truthward.score import answer_sums
from truthward.stage import main
from truthward.tables import Dpo, Recipe
from truthward.tracking import tracked
from truthward.trainers import fit, plant_pairs, refuse_long, to_row, trainer_arguments


class SoftDpoTrainer(DPOTrainer):
    """The loss of :mod:`rl.losses` on TRL's loop, for rows that already hold tokens and reference log-probabilities."""

    run: Run
    table: Dpo
    replay: Replay | None = None
    model: Any
    _signature_columns: Any

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["prompt_ids", "answer_ids", "ref_logprobs", "pairs", "probability", "replies"]

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        ref, pairs, probability, weight = (inputs.pop(k) for k in ("ref_logprobs", "pairs", "probability", "weight"))
        target, branch, replied = (inputs.pop(k) for k in ("target", "branch", "replies"))
        anchor = self.replay.anchor(replied) if self.replay and replied else None
        with scoring_head(self.model, target, anchor=anchor):
            outputs = model(**inputs, use_cache=False)
        logprobs, divergence = outputs.logits[0].split([len(target), outputs.logits.shape[1] - len(target)])
        sums, tokens = torch.zeros_like(ref).index_add(0, branch, logprobs), torch.bincount(branch)
        loss = pair_loss(self.table, sums, ref, tokens, pairs, probability)
        chosen = pairs[:, 0]
        nll = -sums[chosen] / tokens[chosen]  # a token (Pang et al. 2024, arXiv 2404.19733)
        margins = loss.chosen_rewards - loss.rejected_rewards
        drift = self._replayed(divergence, replied)
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, value in (
            ("rewards/chosen", (loss.chosen_rewards * weight).sum()),
            ("rewards/rejected", (loss.rejected_rewards * weight).sum()),
            ("rewards/margins", (margins * weight).sum()),
            ("rewards/accuracies", ((margins > 0).float() * weight).sum()),
            ("nll/chosen", (nll.detach() * weight).sum()),
            *([("replay/kl", drift.detach())] if self.replay else []),
        ):
            metrics[name].append(self.accelerator.gather(value).mean().item())
        preference = (loss.losses * weight).sum()
        if self.state.global_step == 0 and self.table.loss != "length_normalised":
            exact = self.model.dtype == torch.float32
            check_start("dpo loss", preference.item(), math.log(2), 1e-3 if exact else 0.05, self.run)
            check_start("divergence on replayed answers", drift.item(), 0.0, 1e-3 if exact else 0.05, self.run)
        total = preference + self.table.sft_coef * (nll * weight).sum() + self.table.replay_coef * drift
        return (total, outputs) if return_outputs else total

    def _replayed(self, divergence_M: Tensor, replied: list[int]) -> Tensor:
        """Mean KL(parent || policy) a token: of each answer, then over as many answers as a micro-batch has on average."""
        if not self.replay or not replied:
            return divergence_M.sum()
        lengths = [len(self.replay.items[n].answers[0]) for n in replied]
        expected = self.args.per_device_train_batch_size * self.table.replay_share
        return torch.stack([part.mean() for part in divergence_M.split(lengths)]).sum() / expected


def pair_loss(table: Dpo, sums: Tensor, ref: Tensor, tokens: Tensor, pairs: Tensor, probability: Tensor) -> DpoLoss:
    """The recipe's loss of every pair.

    Args:
        sums, ref: log p of each answer under policy and reference ``[A]``; ``tokens`` ``[A]`` their lengths.
        pairs: numbers of the chosen and the rejected answer ``[P, 2]``.
    """
    if table.loss == "length_normalised":  # Meng et al. 2024, arXiv 2405.14734, appendix; Lambert et al. 2024, 2411.15124
        sums, ref = sums / tokens, ref / tokens
    chosen, rejected = pairs.unbind(1)
    given = (sums[chosen], sums[rejected], ref[chosen], ref[rejected], probability)
    if table.loss == "positive":
        return dpo_positive_loss(*given, beta=table.beta, positive_coef=table.positive_coef)
    return dpo_loss(*given, beta=table.beta)


def collate(
    rows: list[dict[str, Any]], dtype: torch.dtype = torch.float32, replayed: Replay | None = None
) -> dict[str, Any]:
    """A micro-batch of prompts as one row of trees, for a model of this type; replayed answers stand behind them."""
    forest, paired = plant_pairs(rows)
    replied = [number for row in rows for number in row.get("replies", ())] if replayed else []
    whole = plant_pairs(rows, [replayed.items[n] for n in replied])[0] if replayed and replied else forest
    return (
        paired
        | whole.inputs(dtype)
        | {
            "logits_to_keep": whole.source,
            "target": forest.target,
            "branch": forest.branch,
            "replies": replied,
            "ref_logprobs": torch.tensor([value for r in rows for value in r["ref_logprobs"]]),
        }
    )


def reference(model: Any, items: list[Item], *, in_step: bool) -> list[list[float]]:
    """log p of each item's answers under the parent, each rank scoring its share.

    Args:
        in_step: ranks hold a share of the weights each, and make equally many passes.
    """
    count = ranks.count()
    share = [items[n % len(items)] for n in range(ranks.rank(), -(-len(items) // count) * count, count)]
    with progress() as bar, zero.used_whole(model):
        task = bar.add_task("dpo reference", total=len(share))
        batch = {"tokens_a_batch": 0} if in_step else {}
        shares = ranks.gather(answer_sums(model, share, tick=lambda n: bar.advance(task, n), **batch))
    return [shares[number % count][number // count] for number in range(len(items))]


def run(recipe: Recipe, this: Run) -> None:
    """Train the DPO policy and write its adapter (or weights)."""
    table, parent = recipe.dpo, this.parent("model")
    tokenizer = models.load_tokenizer(parent)
    constitution = this.parent("preferences").path if "preferences" in this.manifest["parents"] else None
    groups = by_prompt(read_preferences(table.preferences, constitution, cross=True))
    rows = [to_row(tokenizer, group) for group in draw(groups, table.max_prompts, recipe.seed)]
    items = [Item(row["prompt_ids"], row["answer_ids"]) for row in rows]
    refuse_long([i.length for i in items], table.max_length, "prompts with their answers", "dpo.max_length")
    dtype, compute = hardware.set_up(recipe.model, this)
    pairs = sum(len(row["pairs"]) for row in rows)
    say(f"  {pairs} pairs on {len(rows)} prompts; {compute}")
    replied = replay.replies(recipe, table, this, dtype) if table.replay else []
    model = models.load_cut(parent, dtype, recipe.launch)
    replayed = replay.anchored(replied, model, tokenizer, head_is_trained=table.tune == "full") if replied else None
    for row, numbers in zip(rows, replay.share_out(len(replied), len(rows), table.replay_share), strict=True):
        row["replies"] = numbers
    for row, sums in zip(rows, reference(model, items, in_step=recipe.launch.zero == 3), strict=True):
        row["ref_logprobs"] = sums
    trainer = SoftDpoTrainer(
        model=model,
        args=DPOConfig(
            **trainer_arguments(table, recipe.launch, dtype, this, recipe.seed),
            beta=table.beta,
            precompute_ref_log_probs=True,
        ),
        data_collator=partial(collate, dtype=dtype, replayed=replayed),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=models.lora_config(table.lora_rank, table.lora_alpha) if table.tune == "lora" else None,
    )
    trainer.run, trainer.table, trainer.replay = this, table, replayed
    with tracked(recipe, this) as tracker:
        steps = fit(trainer, tracker, "dpo", recipe.guard)
        models.save(this, trainer.model, change=interpolation.keep_share(this, table.scale))
        last = [h for h in trainer.state.log_history if "loss" in h][-1]
        this.finish(metrics={"pairs": pairs, "steps": steps, "loss": last["loss"], "accuracy": last["rewards/accuracies"]})


if __name__ == "__main__":
    main("dpo", run)
