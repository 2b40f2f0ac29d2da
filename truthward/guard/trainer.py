"""The guard around a trainer of transformers or TRL: it is asked before each optimizer step and told each step's metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from truthward import ranks
from truthward.guard.interruptions import Request, Watchdog
from truthward.guard.ranks import check_ranks
from truthward.guard.rules import Action
from truthward.guard.watch import Guard


class Guarding(TrainerCallback):
    """Skips batches, scales the rate, and ends ``train()`` when the run has to go back, to stop, or was asked to.

    Traps of the trainer that this minds: it replaces a loss of NaN by a made-up number before it logs it; when the norm is
    not finite, clipping has spread NaN over all gradients; its own stop does not keep it from writing a checkpoint.

    Args:
        trainer: with logging at every step.
        guard: of its run.
        request: whether SIGTERM came.
        dog: told when a step has ended.
    """

    def __init__(self, trainer: Any, guard: Guard, request: Request, dog: Watchdog) -> None:
        self.trainer, self.guard, self.request, self.dog = trainer, guard, request, dog
        self.act: Action | None = None
        self.norm = float("nan")
        self.skipped = False
        self._measure = trainer._get_grad_norm
        trainer._get_grad_norm = self._keep_norm

    def _keep_norm(self, *args: Any, **kwargs: Any) -> Any:
        """The trainer measures the norm before it clips; no callback is told."""
        norm = self._measure(*args, **kwargs)
        self.norm = float("nan") if norm is None else float(norm)
        return norm

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.act, self.rate = None, self.guard.rate
        first = Path(args.output_dir) / "checkpoint-0" / "trainer_state.json"
        if state.global_step == 0 and not ranks.lead(first.exists):  # so that there always is a checkpoint to go back to
            self.trainer._save_checkpoint(self.trainer.model_wrapped, None)

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Scale the rates for this step alone, so that no scheduler and no checkpoint has to know of it."""
        self.rates = [group["lr"] for group in optimizer.param_groups]
        if self.rate != 1.0:
            for group in optimizer.param_groups:
                group["lr"] *= self.rate

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        if self.trainer.is_deepspeed_enabled:
            return  # its engine has stepped already, behind the backward pass; what is broken by that is gone back from
        loss = self.trainer.accelerator.gather(self.trainer._tr_loss).mean().item()
        self.skipped = self.guard.refuses({"step": state.global_step + 1, "loss": loss, "grad_norm": self.norm})
        if self.skipped:  # AdamW leaves weights and moments of a parameter without a gradient as they are
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        for group, rate in zip(optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.dog.beat(state.global_step)
        self.request.asked = ranks.any_of(self.request.asked)
        if self.request.asked:
            control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Judge the step; comes before the checkpoint, which is written only when all is calm."""
        if not logs or "loss" not in logs:
            return
        if self.skipped and not self.norm < float("inf"):
            logs["loss"] = float("nan")  # what stands there was made up
        if "learning_rate" in logs:
            logs["learning_rate"] *= self.rate
        if self.skipped:
            logs["skipped"] = 1.0
        self.act = self.guard.observe({"step": state.global_step, **logs})
        if self.act:
            control.should_training_stop = True
        if not self.guard.calm:
            control.should_save = False
        elif control.should_save:
            trained = (p for p in self.trainer.model.parameters() if p.requires_grad and not hasattr(p, "ds_id"))
            check_ranks(state.global_step, trained, self.guard.run)
            self.guard.run.record()  # how long it took so far
