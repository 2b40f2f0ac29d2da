"""TRL's SFTTrainer with the LM head applied only where a label counts, and by chunks.

TRL's fused head does so on GPUs with Triton. Elsewhere it makes logits at every position, and makes them again for the
gradient; there is no setting for it. Packing without padding is TRL's own.
"""

from __future__ import annotations

from typing import Any

import torch
from trl import SFTTrainer

from truthward.errors import UserError
from truthward.head import scoring_head

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
        columns = (labels != IGNORE).any(0).nonzero().squeeze(1)  # in which some row has a label
        labels = labels[:, columns]
        counts = labels != IGNORE
        with scoring_head(self.model, labels[counts], counts):
            outputs = model(**inputs, use_cache=False, logits_to_keep=columns)
        logprobs, likeliest = outputs.logits
        count = counts.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        loss = -logprobs.sum() / count.clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        seen = torch.stack([likeliest.sum(), counts.sum()]).unsqueeze(0)
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["token_accuracy"].append(self.accelerator.gather(seen).sum(0).tolist())
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the share of all tokens since the last time that were the likeliest, however micro-batches cut them."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        if seen := metrics.get("token_accuracy"):
            right, count = map(sum, zip(*seen, strict=True))
            metrics["token_accuracy"] = [right / count]
        super().log(logs, start_time)
