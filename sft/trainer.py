"""TRL's SFTTrainer with the LM head applied only where a label counts.

TRL's fused head is made for GPUs and on a CPU costs more than plain logits at every position; a prompt's positions have
no label, so cutting them away first halves the head's work and gives the same loss.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F
from trl import SFTTrainer

from truthward.errors import UserError

IGNORE = -100


def require_labels(rows: list[dict[str, Any]]) -> None:
    """Every row has words to learn from. Asked before the trainer is made: it drops such rows without a word.

    Raises:
        UserError: some row is fully masked.
    """
    empty = [number for number, row in enumerate(rows, 1) if all(label == IGNORE for label in row["labels"])]
    if empty:
        first = f"{len(empty)} rows have no labelled token (the first is row {empty[0]})"
        raise UserError(first, where="sft.data", fix="give each an assistant's answer")


class LeanSftTrainer(SFTTrainer):
    """``loss = sum over labelled tokens of -log p / number of labelled tokens in the step, over ranks``."""

    model: Any

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")[:, 1:]
        keep = (labels != IGNORE).any(0).nonzero().squeeze(1)  # columns in which some row has a label
        outputs = model(**inputs, use_cache=False, logits_to_keep=keep)
        targets = labels[:, keep]
        total = F.cross_entropy(
            outputs.logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum"
        )
        count = (targets != IGNORE).sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        loss = total / count.clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        with torch.no_grad():
            right = (outputs.logits.argmax(-1) == targets).sum() / (targets != IGNORE).sum().clamp(min=1)
        self._metrics["train" if self.model.training else "eval"]["token_accuracy"].append(right.item())
        return (loss, outputs) if return_outputs else loss
