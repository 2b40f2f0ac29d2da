"""What SFT, reward and DPO share around a TRL trainer: rows, arguments from the recipe, metrics, the guard, exact resume."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor
from transformers import TrainerCallback

from truthward import chat, models, ranks, tables, zero
from truthward.branches import Forest, Item, plant
from truthward.console import progress
from truthward.errors import TrainingFault, UserError
from truthward.guard.interruptions import Watchdog, stop_on_request
from truthward.guard.rules import TRAINER
from truthward.guard.storage import newest_whole
from truthward.guard.trainer import Guarding
from truthward.guard.watch import Guard
from truthward.ledger import Run
from truthward.products import quicken
from truthward.reading import refused_pickles
from truthward.recipe import exact_div
from truthward.records import Preference
from truthward.tables import Launch, Training
from truthward.tracking import Tracker, read_metrics

datasets.disable_progress_bars()


def trainer_arguments(table: Training, launch: Launch, dtype: torch.dtype, run: Run, seed: int) -> dict[str, Any]:
    """Keyword arguments for TRL's config classes. Batch words: rows a step = micro batch * ranks * accumulation.

    Args:
        dtype: the type that the stage computes in, from :func:`truthward.hardware.set_up`.
    """
    micro = min(table.micro_batch_size, table.batch_size)
    return {
        "output_dir": str(run.path / "checkpoints"),
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": exact_div(table.batch_size, micro * launch.world, "batch_size, micro_batch_size"),
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
        "use_cpu": not torch.cuda.is_available() and not launch.zero,  # with it, DeepSpeed would be left out without a word
        "bf16": bool(launch.zero) and dtype == torch.bfloat16,  # else weights have the measured type, adapters fp32
        "gradient_checkpointing": launch.gradient_checkpointing,
        "gradient_checkpointing_kwargs": dict(models.CHECKPOINTING),
        "dataloader_drop_last": True,  # a smaller last micro-batch would count for more; other rows are left out each pass
        "disable_tqdm": True,
        "report_to": [],
        "deepspeed": zero.configuration(launch, dtype),
        "accelerator_config": zero.enter(launch),
        "ddp_find_unused_parameters": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }


def fit(trainer: Any, tracker: Tracker, description: str, table: tables.Guard) -> int:
    """Train to the end under the guard, from the last whole checkpoint if there is one.

    Args:
        trainer: of TRL or transformers, its arguments from :func:`trainer_arguments`.
        table: the recipe's ``[guard]``.

    Returns:
        the number of optimizer steps of the whole run.

    Raises:
        UserError: there are fewer rows than a micro-batch.
        TrainingFault: the guard stopped it.
        Interrupted: it was told to stop, and did so behind a checkpoint.
    """
    rows, micro = len(trainer.train_dataset), trainer.args.per_device_train_batch_size
    if rows < micro * trainer.args.world_size:
        raise UserError(
            f"{rows} rows do not fill one micro-batch of {micro} on each rank",
            where=f"{description}.micro_batch_size",
            fix="give more rows, or lower micro_batch_size and batch_size",
        )
    for callback in ("PrinterCallback", "ProgressCallback"):
        for held in [c for c in trainer.callback_handler.callbacks if type(c).__name__ == callback]:
            trainer.remove_callback(held)
    quicken(trainer.model)  # the adapters that the trainer added
    trainer.create_model_card = lambda *args, **kwargs: None  # the record is ours, at export
    if trainer.is_deepspeed_enabled:
        zero.of_one_type(trainer.model, trainer.args.deepspeed)
        zero.keep_types(trainer)
        zero.keep_own_checkpoints(trainer)
    guard = Guard(table, tracker.run, TRAINER)
    with stop_on_request() as request, Watchdog(guard, trainer.args.process_index) as dog:
        guarding = Guarding(trainer, guard, request, dog)
        trainer.add_callback(guarding)
        trainer.add_callback(_Report(tracker, description))
        while True:
            checkpoint = ranks.lead(lambda: newest_whole(_checkpoints(Path(trainer.args.output_dir)), tracker.run))
            tracker.resume_at(_step(checkpoint) if checkpoint else 0)
            guard.rebuild(ranks.lead(lambda: read_metrics(tracker.run)))
            try:
                with refused_pickles(str(checkpoint)):
                    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            except Exception:
                if ranks.first():
                    _drop_unfinished(Path(trainer.args.output_dir))  # on a full disk they hold the room that is needed
                raise
            request.obey(guard, trainer.state.global_step)
            if guarding.act == "stopped":
                raise guard.fault()
            if guarding.act is None:
                return trainer.state.global_step
            if trainer.is_deepspeed_enabled:  # its engine cannot be set up twice around one model
                raise TrainingFault(
                    f"{tracker.run.path} goes back to its last good checkpoint, at a lower rate\n"
                    "  to do: run the same command; with launch.restarts all ranks are started again by themselves"
                )


def _checkpoints(folder: Path) -> list[Path]:
    """Those that were written to their end, the oldest first: the trainer's state is a checkpoint's last file."""
    return sorted((p.parent for p in folder.glob("checkpoint-*/trainer_state.json")), key=_step)


def _drop_unfinished(folder: Path) -> None:
    whole = set(_checkpoints(folder))
    for checkpoint in set(folder.glob("checkpoint-*")) - whole:
        shutil.rmtree(checkpoint, ignore_errors=True)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


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


def plant_pairs(rows: list[dict[str, Any]], further: Sequence[Item] = ()) -> tuple[Forest, dict[str, Tensor]]:
    """A micro-batch of prompts as one row of trees, with their ``pairs`` ``[P, 2]``, ``probability`` and ``weight`` ``[P]``.
    Behind them stand ``further`` trees.

    A pair names its answers, chosen and rejected, counted over the row. ``weight`` is 1 / (prompts * pairs of the prompt),
    so that every prompt counts alike; it sums to 1.
    """
    forest = plant([*(Item(r["prompt_ids"], r["answer_ids"]) for r in rows), *further])
    pairs, weight, first = [], [], 0
    for r in rows:
        pairs += [[first + chosen, first + rejected] for chosen, rejected in r["pairs"]]
        weight += [1 / (len(rows) * len(r["pairs"]))] * len(r["pairs"])
        first += len(r["answer_ids"])
    probability = torch.tensor([p for r in rows for p in r["probability"]])
    return forest, {"pairs": torch.tensor(pairs), "probability": probability, "weight": torch.tensor(weight)}


# ------------------------------------------------------------------------------------------------------------ while it runs


class _Report(TrainerCallback):
    """Writes each step's metrics and moves the bar."""

    def __init__(self, tracker: Tracker, description: str) -> None:
        self.tracker, self.description = tracker, description

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar = progress()
        self.bar.start()
        self.task = self.bar.add_task(self.description, total=state.max_steps, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return
        self.tracker.log(state.global_step, {k: float(v) for k, v in logs.items() if isinstance(v, int | float)})
        self.bar.update(self.task, completed=state.global_step, description=f"{self.description} loss {logs['loss']:.3f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.stop()
