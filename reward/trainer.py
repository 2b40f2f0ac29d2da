"""TRL's RewardTrainer on prompts with all their pairs, with soft labels (TRL drops such columns).

One row is a prompt with all its answers, as in Ouyang et al. 2022, section 3.5: each answer goes through the model once,
however many pairs it is in, the prompt once for all answers, without padding (:mod:`truthward.branches`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from trl import RewardTrainer

from reward.losses import preference_loss
from truthward.trainers import plant_pairs


def collate(rows: list[dict[str, Any]], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A micro-batch of prompts as one row of trees, for a model of this type; ``tip``: where each answer's score is read."""
    forest, paired = plant_pairs(rows)
    return paired | forest.inputs(dtype) | {"tip": forest.tip}


class SoftRewardTrainer(RewardTrainer):
    """The preference loss of :mod:`reward.losses` on TRL's loop, for a model that scores every position."""

    model: Any
    args: Any
    _signature_columns: Any

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["prompt_ids", "answer_ids", "pairs", "probability"]

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        pairs, probability, weight, tip = (inputs.pop(k) for k in ("pairs", "probability", "weight", "tip"))
        outputs = model(**inputs, use_cache=False)
        chosen_rewards, rejected_rewards = outputs.logits[0, tip, 0].float()[pairs].unbind(1)
        center = self.args.center_rewards_coefficient or 0.0
        loss = preference_loss(chosen_rewards, rejected_rewards, probability, center_coef=center)
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, values in (("accuracy", loss.correct), ("margin", loss.margins), ("reward", chosen_rewards.detach())):
            metrics[name].append(self.accelerator.gather((values * weight).sum()).mean().item())
        total = (loss.losses * weight).sum()
        return (total, outputs) if return_outputs else total
