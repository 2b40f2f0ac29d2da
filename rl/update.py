"""The update of PPO: passes of minibatches over a rollout, whatever estimated the advantages.

The loss of an optimizer step is a sum over tokens of weight x loss (see :mod:`rl.losses`), so that it does not depend on
how the step is cut into micro-batches; weights are made from the whole minibatch before it is cut.
"""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from rl.advantages import approximate_kl
from rl.losses import (
    answer_log_ratio,
    constant_mean,
    dual_clip,
    importance_weights,
    k2_loss,
    k3_loss,
    ppo_loss,
    sequence_mean,
    token_mean,
    value_loss,
)
from rl.rollout import Batch, draw_seed, my_share
from rl.state import Progress
from truthward import ranks
from truthward.branches import Forest, Item, plant
from truthward.guard import check_start
from truthward.guard.rules import NOT_FINITE

if TYPE_CHECKING:
    from rl.ppo import PpoRun


class Scores(NamedTuple):
    """What is said of a rollout, without gradients: each reward's scores of the B answers, and ``[B, C]`` the rest."""

    scores: list[list[float]]
    old_logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    entropy: Tensor


class Targets(NamedTuple):
    """What the update is to reach: ``[B, C]`` advantages and returns, and which tokens are trained on."""

    advantages: Tensor
    returns: Tensor
    mask: Tensor


class Piece(NamedTuple):
    """A micro-batch: which answers, laid out; and its tokens' weights in the loss, and in a mean over tokens ``[N]``."""

    rows: list[int]
    forest: Forest
    weights: Tensor
    shares: Tensor


class Learner:
    """The optimizer's side of a PPO run.

    Args:
        ppo: the run: its module, its stepper, its recipe and record.
        ptx: demonstrations, each a prompt with its answer, for ``ptx_coef``.
    """

    def __init__(self, ppo: PpoRun, ptx: list[Item]) -> None:
        self.actor_critic, self.stepper, self.device = ppo.actor_critic, ppo.stepper, ppo.device
        self.table, self.seed, self.run = ppo.table, ppo.recipe.seed, ppo.run
        self.ptx, self.exact, self.guard = ptx, ppo.dtype == torch.float32, ppo.guard

    def update(self, batch: Batch, scores: Scores, targets: Targets, progress: Progress) -> dict[str, float]:
        """Passes of minibatches; stops early when the policy has moved ``target_kl`` from where it sampled.

        Returns:
            means over the steps that were taken; ``ratio/max`` is the largest, ``skipped`` how many were not.
        """
        table, steps = self.table, []
        size = len(batch.answers) // table.minibatches
        for epoch in range(table.epochs):
            generator = torch.Generator().manual_seed(draw_seed(self.seed, "pass", progress.iteration, epoch))
            for rows in torch.randperm(len(batch.answers), generator=generator).split(size):
                self._set_rates(progress.step)
                step = self.minibatch(batch, scores, targets, sorted(rows.tolist()), progress)
                steps.append({**step, "grad_norm": self._step(progress)})
                if step["kl/old_new"] > table.target_kl:
                    return _summary(steps, table.epochs * table.minibatches)
        return _summary(steps, table.epochs * table.minibatches)

    def minibatch(
        self, batch: Batch, scores: Scores, targets: Targets, rows: list[int], progress: Progress
    ) -> dict[str, float]:
        """Leave this rank's share of the gradients of one optimizer step in the parameters; returns the metrics of all.

        Args:
            rows: which answers, over all ranks; in order, so that those to one prompt share its forward pass.
        """
        table, mask, metrics = self.table, targets.mask[rows], dict[str, float]()
        shares = token_mean(mask)
        weights = {"token": shares, "sequence": sequence_mean(mask), "dr_grpo": constant_mean(mask, table.max_new_tokens)}
        mine = my_share(len(rows))
        for start in range(mine.start, mine.stop, table.micro_batch_size):
            part = slice(start, min(start + table.micro_batch_size, mine.stop))
            where, device = batch.mask[rows[part]], self.device
            chosen = (w[part][where].to(device) for w in (weights[table.reduction], shares))
            piece = Piece(rows[part], batch.forest(rows[part]).to(device), *chosen)
            found = self._policy(batch, scores, targets, piece, progress)
            found |= self._critic(batch, scores, targets, piece) if table.advantage == "gae" else {}
            metrics = _together([metrics, found])
        metrics |= self._demonstrations(len(rows), progress.step) if self.ptx else {}
        return _together(ranks.gather(metrics))

    def _policy(self, batch: Batch, scores: Scores, targets: Targets, piece: Piece, progress: Progress) -> dict[str, float]:
        table = self.table
        old, ref, sampler, advantages = self._flat(
            batch, piece.rows, scores.old_logprobs, scores.ref_logprobs, batch.sampler_logprobs, targets.advantages
        )
        policy = self.actor_critic("policy", piece.forest, entropy=table.entropy_coef > 0)
        token_ratio = policy.logprobs - old
        log_ratio = answer_log_ratio(token_ratio, piece.forest.branch) if table.ratio == "sequence" else token_ratio
        loss = ppo_loss(log_ratio, advantages, clip_range=table.clip_range)
        losses = dual_clip(loss.losses, advantages, bound=table.dual_clip) if table.dual_clip else loss.losses
        correction = importance_weights(old, sampler, cap=table.tis_cap) if table.tis_cap else torch.ones_like(old)
        losses = losses * correction
        if table.kl_form != "reward":
            estimator = k2_loss if table.kl_form == "k2" else k3_loss
            losses = losses + progress.kl_coef * estimator(policy.logprobs, old, ref)
        if table.entropy_coef:
            losses = losses - table.entropy_coef * policy.entropy
        total = (piece.weights * losses).sum()
        self.stepper.backward(total)
        moved = token_ratio.detach()
        if progress.step == 0:
            off = (moved.exp() - 1).abs()  # the same answer stands beside other ones now, which bf16 rounds otherwise
            worst, rounding = (off.max(), 1e-3) if self.exact else (off.mean(), 0.05)
            check_start("PPO's ratio", 1 + max(ranks.gather(worst.item())), 1.0, rounding, self.run)
        return {
            "loss/policy": total.item(),
            "clipped": (piece.shares * loss.clipped).sum().item(),
            "kl/old_new": (piece.shares * approximate_kl(-moved)).sum().item(),
            "ratio/max": loss.ratio.max().item(),
            "tis/weight": (piece.shares * correction).sum().item(),
            "tis/capped": (piece.shares * (correction >= (table.tis_cap or math.inf))).sum().item(),
        }

    def _critic(self, batch: Batch, scores: Scores, targets: Targets, piece: Piece) -> dict[str, float]:
        old, returns = self._flat(batch, piece.rows, scores.values, targets.returns)
        loss = value_loss(self.actor_critic("value", piece.forest), old, returns, clip_range=self.table.value_clip_range)
        total = (piece.shares * loss.losses).sum()
        self.stepper.backward(self.table.value_coef * total)
        return {"loss/value": total.item(), "value/clipped": (piece.shares * loss.clipped).sum().item()}

    def _demonstrations(self, count: int, step: int) -> dict[str, float]:
        """``ptx_coef`` x the negative log-likelihood a token (Ouyang et al. 2022, arXiv 2203.02155, eq. 2).

        As many demonstrations as the step has answers, so that the gradient does not depend on micro-batches.
        """
        generator = torch.Generator().manual_seed(draw_seed(self.seed, "ptx", step))
        drawn = [self.ptx[i] for i in torch.randint(len(self.ptx), (count,), generator=generator).tolist()]
        tokens, total = sum(len(item.answers[0]) for item in drawn), 0.0
        mine = my_share(count)
        for start in range(mine.start, mine.stop, self.table.micro_batch_size):
            part = drawn[start : min(start + self.table.micro_batch_size, mine.stop)]
            forest = plant(part).to(self.device)
            nll = -self.actor_critic("policy", forest, temperature=1.0).logprobs.sum() / tokens
            self.stepper.backward(self.table.ptx_coef * nll)
            total += nll.item()
        return {"loss/ptx": total}

    def _step(self, progress: Progress) -> float:
        """Step on what :meth:`minibatch` left; a step that is not finite is left out, and goes on record."""
        norm = self.stepper.step()
        if not math.isfinite(norm):
            evidence = {"metric": "grad_norm", "value": str(norm), "optimizer_step": progress.step}
            self.guard.record(NOT_FINITE, progress.iteration + 1, "skipped", **evidence)
        progress.step += 1
        return norm

    def _set_rates(self, step: int) -> None:
        """Both rates climb in a line during warm-up, then fall in a line to 0."""
        table = self.table
        total = table.iterations * table.epochs * table.minibatches
        warm = table.warmup_ratio * total
        factor = (step + 1) / warm if step < warm else (total - step) / (total - warm)
        rates = (table.learning_rate, table.value_learning_rate or table.learning_rate)
        for group, rate in zip(self.stepper.optimizer.param_groups, rates, strict=False):
            group["lr"] = rate * min(1.0, factor) * self.guard.rate

    def _flat(self, batch: Batch, rows: list[int], *values: Tensor) -> list[Tensor]:
        """``[B, C]`` tensors as the forest of these rows has its tokens ``[N]``, on its device."""
        mask = batch.mask[rows]
        return [v[rows][mask].to(self.device) for v in values]


def _together(parts: list[dict[str, float]]) -> dict[str, float]:
    """Sums of metrics that are shares of a sum; of the largest ratio, the larger."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {n: (max if n == "ratio/max" else sum)([part[n] for part in parts if n in part]) for n in names}


def _summary(steps: list[dict[str, float]], planned: int) -> dict[str, float]:
    taken = [step for step in steps if math.isfinite(step["grad_norm"])]
    means = {n: (max if n == "ratio/max" else statistics.fmean)([s[n] for s in taken or steps]) for n in steps[0]}
    skipped = len(steps) - len(taken)
    return {**means, "steps": len(steps), "skipped": skipped, "stopped_early": float(len(steps) < planned)}
