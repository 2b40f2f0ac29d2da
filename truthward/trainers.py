"""What SFT, reward and DPO share around a TRL trainer: rows, the LM head, arguments from the recipe, metrics, the guard,
exact resume.

Shapes: N tokens, H hidden, V words.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import TrainerCallback

from truthward import chat
from truthward.branches import Forest, Item, plant
from truthward.console import progress
from truthward.errors import UserError
from truthward.guard import check_finite
from truthward.ledger import Run
from truthward.recipe import exact_div
from truthward.records import Preference
from truthward.tables import Launch, Training
from truthward.tracking import Tracker

datasets.disable_progress_bars()

HEAD_TOKENS = 256  # tokens whose logits are held at once: 50 MB in fp32 at 49,152 words


def trainer_arguments(table: Training, launch: Launch, run: Run, seed: int) -> dict[str, Any]:
    """Keyword arguments for TRL's config classes. Batch words: rows a step = micro batch * ranks * accumulation."""
    micro = min(table.micro_batch_size, table.batch_size)
    return {
        "output_dir": str(run.path / "checkpoints"),
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": exact_div(table.batch_size, micro * launch.ranks, "batch_size, micro_batch_size"),
        "learning_rate": table.learning_rate,
        "lr_scheduler_type": table.schedule if table.schedule != "constant" else "constant_with_warmup",
        "warmup_steps": table.warmup_ratio,
        "weight_decay": table.weight_decay,
        "max_grad_norm": table.max_grad_norm,
        "num_train_epochs": table.epochs,
        "max_length": table.max_length,
        "seed": seed,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": table.checkpoint_every,
        "save_total_limit": 2,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": False,  # the weights already have the measured compute type; adapters stay fp32
        "gradient_checkpointing": False,
        "dataloader_drop_last": True,  # a smaller last micro-batch would count for more; other rows are left out each pass
        "disable_tqdm": True,
        "report_to": [],
        "deepspeed": launch.deepspeed,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }


def fit(trainer: Any, tracker: Tracker, description: str) -> int:
    """Train to the end, from the last whole checkpoint if there is one.

    Returns:
        the number of optimizer steps of the whole run.

    Raises:
        UserError: there are fewer rows than a micro-batch.
        TrainingFault: a loss or gradient is not finite.
    """
    rows, micro = len(trainer.train_dataset), trainer.args.per_device_train_batch_size
    if rows < micro * trainer.args.world_size:
        raise UserError(
            f"{rows} rows do not fill one micro-batch of {micro} on each rank",
            where=f"{description}.micro_batch_size",
            fix="give more rows, or lower micro_batch_size and batch_size",
        )
    checkpoint = last_checkpoint(Path(trainer.args.output_dir))
    tracker.resume_at(_step(checkpoint) if checkpoint else 0)
    for callback in ("PrinterCallback", "ProgressCallback"):
        for held in [c for c in trainer.callback_handler.callbacks if type(c).__name__ == callback]:
            trainer.remove_callback(held)
    trainer.add_callback(_Report(tracker, description))
    trainer.create_model_card = lambda *args, **kwargs: None  # the record is ours, at export
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return trainer.state.global_step


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end (the trainer's state is its last file)."""
    return max((p for p in folder.glob("checkpoint-*") if _readable(p)), key=_step, default=None)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def _readable(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    return True


def refuse_long(lengths: list[int], limit: int, what: str, key: str) -> None:
    """Rows over the limit are an error: cutting them would train on answers that never end.

    Raises:
        UserError: some row is longer than ``limit`` tokens.
    """
    long = [i for i, n in enumerate(lengths) if n > limit]
    if long:
        raise UserError(
            f"{len(long)} of {len(lengths)} {what} are longer than {limit} tokens (longest {max(lengths)}, first is row "
            f"{long[0] + 1})",
            where=key,
            fix=f"raise {key} to {max(lengths)}, or shorten or drop these rows",
        )


# ----------------------------------------------------------------------------------------------- prompts with their pairs


def to_row(tokenizer: Any, preferences: list[Preference]) -> dict[str, Any]:
    """One prompt's preferences: its answers once each, and which of them make a pair."""
    answers = list(dict.fromkeys(text for p in preferences for text in (p.chosen, p.rejected)))
    return {
        "prompt_ids": chat.prompt_ids(tokenizer, chat.user(preferences[0].prompt)),
        "answer_ids": [chat.answer_ids(tokenizer, text) for text in answers],
        "pairs": [[answers.index(p.chosen), answers.index(p.rejected)] for p in preferences],
        "probability": [p.probability for p in preferences],
    }


def plant_pairs(rows: list[dict[str, Any]]) -> tuple[Forest, dict[str, Tensor]]:
    """A micro-batch of prompts as one row of trees, with their ``pairs`` ``[P, 2]``, ``probability`` and ``weight`` ``[P]``.

    A pair names its answers, chosen and rejected, counted over the row. ``weight`` is 1 / (prompts * pairs of the prompt),
    so that every prompt counts alike; it sums to 1.
    """
    forest = plant([[Item(r["prompt_ids"], r["answer_ids"]) for r in rows]])
    pairs, weight, first = [], [], 0
    for r in rows:
        pairs += [[first + chosen, first + rejected] for chosen, rejected in r["pairs"]]
        weight += [1 / (len(rows) * len(r["pairs"]))] * len(r["pairs"])
        first += len(r["answer_ids"])
    probability = torch.tensor([p for r in rows for p in r["probability"]])
    return forest, {"pairs": torch.tensor(pairs), "probability": probability, "weight": torch.tensor(weight)}


# ------------------------------------------------------------------------------------------------------------ the LM head


@contextmanager
def scoring_head(model: Any, target_N: Tensor, keep_BT: Tensor | None = None) -> Iterator[None]:
    """Within, a model's LM head gives log p of targets instead of logits, without ever holding all of them.

    The model is still called as a whole, so that whatever wraps it (adapters, DDP, DeepSpeed) does its part; what it returns
    as ``logits`` is ``[2, N]``: log-probabilities (nats, fp32), and 1 where the target is the likeliest word, else 0.

    Args:
        target_N: the words, one for each position that reaches the head.
        keep_BT: bool, which of these positions have a target; None: all.
    """
    head = model.get_output_embeddings()

    def forward(hidden: Tensor) -> Tensor:
        hidden_NH = hidden.flatten(0, -2) if keep_BT is None else hidden[keep_BT]
        return torch.stack(TokenLogprobs.apply(hidden_NH, head.weight, head.bias, target_N))

    head.forward = forward  # on the instance, over the class's own
    try:
        yield
    finally:
        del head.forward


class TokenLogprobs(torch.autograd.Function):
    """``log p_n = z_n[t_n] - logsumexp(z_n)``, ``z = h W^T + b``, by chunks of ``HEAD_TOKENS`` tokens.

    A token's log-probability depends on its own hidden state alone, so the forward pass can leave its gradient by that
    state, ``d_n = W[t_n] - softmax(z_n) W``: ``[N, H]`` in place of logits ``[N, V]``. The backward pass is ``g_n d_n``.
    Only where the head itself is trained are the logits made again.
    """

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, target_N: Tensor) -> Any:
        logprobs, likeliest, slopes = [], [], []
        for h, t in zip(hidden_NH.split(HEAD_TOKENS), target_N.split(HEAD_TOKENS), strict=True):
            z = F.linear(h, weight_VH, bias_V).float()
            top, z_t = z.amax(1, keepdim=True), z.gather(1, t.unsqueeze(1))
            e = z.sub_(top).exp_()
            total = e.sum(1, keepdim=True)
            logprobs.append((z_t - top - total.log()).squeeze(1))
            likeliest.append((z_t >= top).squeeze(1).float())
            slopes.append(weight_VH[t] - e.div_(total).to(weight_VH.dtype) @ weight_VH)
        ctx.save_for_backward(torch.cat(slopes), hidden_NH, weight_VH, bias_V, target_N)
        flags = torch.cat(likeliest)
        ctx.mark_non_differentiable(flags)
        return torch.cat(logprobs), flags

    @staticmethod
    def backward(ctx: Any, g_N: Tensor, _: Tensor) -> Any:
        slope_NH, hidden_NH, weight_VH, bias_V, target_N = ctx.saved_tensors
        by_hidden = g_N.unsqueeze(1) * slope_NH
        by_weight = torch.zeros_like(weight_VH) if ctx.needs_input_grad[1] else None
        by_bias = torch.zeros_like(bias_V) if ctx.needs_input_grad[2] else None
        if by_weight is None and by_bias is None:
            return by_hidden.to(hidden_NH.dtype), None, None, None
        pieces = (x.split(HEAD_TOKENS) for x in (hidden_NH, target_N, g_N))
        for h, t, g in zip(*pieces, strict=True):
            by_z = F.linear(h, weight_VH, bias_V).float().softmax(1).mul_(-g.unsqueeze(1))
            by_z = by_z.scatter_add_(1, t.unsqueeze(1), g.unsqueeze(1)).to(weight_VH.dtype)
            if by_weight is not None:
                by_weight.addmm_(by_z.T, h)
            if by_bias is not None:
                by_bias += by_z.sum(0)
        return by_hidden.to(hidden_NH.dtype), by_weight, by_bias, None


# ------------------------------------------------------------------------------------------------------------ while it runs


class _Report(TrainerCallback):
    """Writes each step's metrics, moves the bar, and stops the run on a loss that is not finite."""

    def __init__(self, tracker: Tracker, description: str) -> None:
        self.tracker, self.description = tracker, description
        self.bar = progress()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.start()
        self.task = self.bar.add_task(self.description, total=state.max_steps, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return
        for name in ("loss", "grad_norm"):
            check_finite(name, float(logs.get(name, 0.0)), state.global_step, self.tracker.run)
        numbers = {k: float(v) for k, v in logs.items() if isinstance(v, int | float) and math.isfinite(float(v))}
        self.tracker.log(state.global_step, numbers)
        self.bar.update(self.task, completed=state.global_step, description=f"{self.description} loss {logs['loss']:.3f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.stop()
