"""TRL's RewardTrainer on rows that are already tokens, with soft labels (TRL drops such columns)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from trl import RewardTrainer

from reward.losses import preference_loss
from truthward.tensors import pad


@dataclass
class PairCollator:
    """Stacks chosen rows over rejected rows, padded on the right, so that a row's last real token is its end token.

    The score is read there: the pooling of Hugging Face's sequence classifiers takes the last token that is not padding,
    and no other token of a row equals the pad token (checked when the rows are made).
    """

    pad_id: int

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        ids, mask = pad([r["chosen_ids"] for r in rows] + [r["rejected_ids"] for r in rows], self.pad_id)
        probability = torch.tensor([r["probability"] for r in rows], dtype=torch.float32)
        return {"input_ids": ids, "attention_mask": mask.long(), "probability": probability}


class SoftRewardTrainer(RewardTrainer):
    """The preference loss of :mod:`reward.losses` on TRL's loop."""

    model: Any
    args: Any
    _signature_columns: Any

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["chosen_ids", "rejected_ids", "probability"]

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        probability = inputs.pop("probability")
        outputs = model(**inputs, use_cache=False)
        chosen_rewards, rejected_rewards = outputs.logits.squeeze(-1).float().chunk(2)
        center = self.args.center_rewards_coefficient or 0.0
        loss = preference_loss(chosen_rewards, rejected_rewards, probability, center_coef=center)
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, values in (("accuracy", loss.correct), ("margin", loss.margins), ("reward", chosen_rewards.detach())):
            metrics[name].append(self.accelerator.gather(values.float()).mean().item())
        mean = loss.losses.mean()
        return (mean, outputs) if return_outputs else mean
