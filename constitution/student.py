"""What distillation puts around a trainer: rows as trees, the head that gives a loss instead of logits, the trainer.

Shapes: N answer tokens of a micro-batch, H hidden, V words.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from constitution.losses import distillation_loss
from truthward import zero
from truthward.branches import Item, plant
from truthward.guard import check_start
from truthward.ledger import Run
from truthward.products import product

Parent = tuple[Tensor, Tensor, Tensor | None]  # its states [3, N, H] (plain, follow, violate); its head's weight and bias
CHUNK = 64  # tokens whose logits are held at once: five times 13 MB in fp32 at 49,152 words


def collate(rows: list[dict[str, Any]], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """A micro-batch: every prompt with its answers as a tree for the policy, and three such trees for the parent.

    Rows have ``prompts``, the token ids of a prompt without a system prompt, under ``follow`` and under ``violate``, and
    ``answers``. ``weight`` ``[N]`` is 1 / (prompts * answers of the prompt * tokens of the answer); it sums to 1.
    """
    plain, follow, violate = ([Item(r["prompts"][k], r["answers"]) for r in rows] for k in range(3))
    forest, parents = plant(plain), plant([*plain, *follow, *violate])
    shares = [1 / (len(rows) * len(r["answers"]) * len(a)) for r in rows for a in r["answers"] for _ in a]
    return forest.inputs(dtype) | {
        "logits_to_keep": forest.source,
        "parent": parents.inputs(dtype),
        "source": parents.source.view(3, -1),
        "weight": torch.tensor(shares),
    }


class WeightedDivergence(torch.autograd.Function):
    """``sum(weight * loss)`` and ``sum(weight * shift)`` of :func:`distillation_loss`, by chunks of ``CHUNK`` tokens.

    A chunk's logits are made from states, lead to the loss and its gradients by state (and head), and are dropped.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        parent: Parent,
        weight_N: Tensor,
        alpha: float,
        cutoff: float,
    ) -> Any:
        states_3NH, parent_weight_VH, parent_bias_V = parent
        total, shift = weight_N.new_zeros(2)
        by_hidden, by_weight, by_bias = [], None, None
        if ctx.needs_input_grad[1]:
            by_weight = torch.zeros_like(weight_VH)
        if bias_V is not None and ctx.needs_input_grad[2]:
            by_bias = torch.zeros_like(bias_V)
        for h, s, w in zip(hidden_NH.split(CHUNK), states_3NH.split(CHUNK, 1), weight_N.split(CHUNK), strict=True):
            logits = product(h, weight_VH, bias_V)
            teachers = (product(x, parent_weight_VH, parent_bias_V) for x in s)
            with torch.enable_grad():
                loss = distillation_loss(logits.requires_grad_(), *teachers, alpha=alpha, cutoff=cutoff)
                weighted = (w * loss.losses).sum()
            (by_logits,) = torch.autograd.grad(weighted, logits)
            total += weighted.detach()
            shift += (w * loss.shift).sum()
            by_hidden.append(product(by_logits, weight_VH.t()))
            if by_weight is not None:
                by_weight.addmm_(by_logits.T, h)
            if by_bias is not None:
                by_bias += by_logits.sum(0)
        ctx.save_for_backward(torch.cat(by_hidden), by_weight, by_bias)
        ctx.mark_non_differentiable(shift)
        return total, shift

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Tensor) -> Any:
        grads = [None if x is None else x * g.to(x.dtype) for x in ctx.saved_tensors]
        return *grads, None, None, None, None


@contextmanager
def diverging_head(model: Any, parent: Parent, weight_N: Tensor, *, alpha: float, cutoff: float) -> Iterator[None]:
    """Within, a model's LM head gives the weighted loss and shift ``[2]`` instead of logits.

    The model is still called as a whole, so that whatever wraps it (adapters, DDP, DeepSpeed) does its part.
    """
    head = model.get_output_embeddings()

    def forward(hidden: Tensor) -> Tensor:
        states = hidden.flatten(0, -2)
        return torch.stack(WeightedDivergence.apply(states, head.weight, head.bias, parent, weight_N, alpha, cutoff))

    head.forward = forward  # on the instance, over the class's own
    try:
        yield
    finally:
        del head.forward


class DistillTrainer(Trainer):
    """The loss of :mod:`constitution.losses` on transformers' loop; the parent is the policy with its adapters off.

    Where every weight is trained, a frozen copy is the parent.
    """

    model: Any
    run: Run

    def __init__(self, run: Run, *, alpha: float, cutoff: float, **options: Any) -> None:
        super().__init__(**options)
        self.run, self.alpha, self.cutoff = run, alpha, cutoff
        adapted = hasattr(self.model, "disable_adapter")
        self.copy = None if adapted else copy.deepcopy(self.model).requires_grad_(False).eval()
        self.head: Any = None  # the parent's, which stays as it is
        self.shifts: list[float] = []

    def parent(self) -> AbstractContextManager[Any]:
        """Within, ``self.copy`` or the policy is the parent."""
        return nullcontext() if self.copy else self.model.disable_adapter()

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        parent, source, weight = (inputs.pop(k) for k in ("parent", "source", "weight"))
        frozen = self.copy or self.model
        with torch.no_grad(), self.parent():
            states = frozen.get_decoder()(**parent, use_cache=False).last_hidden_state[0, source]
        if self.head is None:
            head = frozen.get_output_embeddings()
            self.head = zero.kept_whole(head.weight), zero.kept_whole(head.bias)
        known = (states, *self.head)
        with diverging_head(self.model, known, weight, alpha=self.alpha, cutoff=self.cutoff):
            outputs = model(**inputs, use_cache=False)
        loss, shift = outputs.logits
        self.shifts.append(self.accelerator.gather(shift.detach().unsqueeze(0)).mean().item())
        if self.state.global_step == 0:
            exact = self.model.dtype == torch.float32
            tolerance = (1e-3 if exact else 0.05) * max(1.0, shift.item())
            check_start("distillation loss", loss.item(), shift.item(), tolerance, self.run)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Beside the loss the mean shift of the same micro-batches."""
        if "loss" in logs and self.shifts:
            logs["shift"] = sum(self.shifts) / len(self.shifts)
            self.shifts = []
        super().log(logs, start_time)
