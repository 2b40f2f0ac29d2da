"""Losses of DPO and PPO as pure functions: tensors in, unreduced losses and detached metrics out.

Shapes: B answers, T their tokens; N tokens of any shape, one after the other. Masks are bool, True counts. A reduction is
a weight for every token: the loss of an optimizer step is ``sum(weights * losses)``, however the step is cut into
micro-batches.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class DpoLoss(NamedTuple):
    """Unreduced losses ``[B]`` and detached rewards ``[B]``."""

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


class PpoLoss(NamedTuple):
    """Unreduced losses ``[N]`` and detached metrics ``[N]``."""

    losses: Tensor
    ratio: Tensor
    clipped: Tensor


class ValueLoss(NamedTuple):
    """Unreduced losses ``[N]`` and where the clip was active ``[N]``."""

    losses: Tensor
    clipped: Tensor


def dpo_loss(
    policy_chosen_logprobs: Tensor,
    policy_rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    probability: Tensor,
    *,
    beta: float,
) -> DpoLoss:
    """DPO with a soft label (cDPO): ``-(p log sigmoid(b D) + (1-p) log sigmoid(-b D))``.

    ``D = (log pi_w - log ref_w) - (log pi_l - log ref_l)``, all sums over the answer's tokens ``[B]``. At p = 1 it is
    Rafailov et al. 2023 (arXiv 2305.18290), eq. 7; ln 2 where policy and reference are the same model.

    Args:
        probability: that chosen is the better one ``[B]``, in [0, 1].
        beta: strength of the pull to the reference.
    """
    chosen = beta * (policy_chosen_logprobs - ref_chosen_logprobs)
    rejected = beta * (policy_rejected_logprobs - ref_rejected_logprobs)
    margin = chosen - rejected
    losses = -(probability * F.logsigmoid(margin) + (1 - probability) * F.logsigmoid(-margin))
    return DpoLoss(losses, chosen.detach(), rejected.detach())


def dpo_positive_loss(
    policy_chosen_logprobs: Tensor,
    policy_rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    probability: Tensor,
    *,
    beta: float,
    positive_coef: float,
) -> DpoLoss:
    """DPO-positive (Pal et al. 2024, arXiv 2402.13228, eq. 3): ``D - lambda max(0, log ref_w - log pi_w)`` instead of ``D``.

    A chosen answer that became less likely than under the reference costs, so that pairs cannot be won by making both
    answers unlikely and the rejected one more so. Arguments as in :func:`dpo_loss`.

    Args:
        positive_coef: lambda; 0 gives DPO.
    """
    lost = (ref_chosen_logprobs - policy_chosen_logprobs).clamp(min=0)
    chosen = policy_chosen_logprobs - positive_coef * lost
    loss = dpo_loss(chosen, policy_rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, probability, beta=beta)
    true_reward = beta * (policy_chosen_logprobs - ref_chosen_logprobs).detach()
    return loss._replace(chosen_rewards=true_reward)


# ---------------------------------------------------------------------------------------------------- the policy's loss


def ppo_loss(log_ratio: Tensor, advantages: Tensor, *, clip_range: float) -> PpoLoss:
    """``max(-A r, -A clip(r, 1-e, 1+e))`` with ``r = pi/old`` (Schulman et al. 2017, arXiv 1707.06347, eq. 7).

    Args:
        log_ratio: log pi - log old of the sampled tokens, at the sampling temperature ``[N]``.
        advantages: ``[N]``, no gradient.
        clip_range: e.
    """
    ratio = log_ratio.exp()
    free, held = -advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    return PpoLoss(torch.maximum(free, held), ratio.detach(), (held > free).detach())


def dual_clip(losses: Tensor, advantages: Tensor, *, bound: float) -> Tensor:
    """``min(loss, c |A|)`` where A < 0: no huge ratio on a bad token (Ye et al. 2020, arXiv 1912.09729, eq. 6).

    Args:
        losses, advantages: of :func:`ppo_loss` ``[N]``.
        bound: c, above 1.
    """
    return torch.where(advantages < 0, torch.minimum(losses, -bound * advantages), losses)


def answer_log_ratio(log_ratio: Tensor, answer: Tensor) -> Tensor:
    """Each token's log-ratio replaced by its answer's: the sum over the answer's tokens, as RLOO clips it.

    Args:
        log_ratio: ``[N]``.
        answer: which answer a token belongs to, from 0 ``[N]``.
    """
    return torch.zeros_like(log_ratio).index_add(0, answer, log_ratio)[answer]


def importance_weights(old_logprobs: Tensor, sampler_logprobs: Tensor, *, cap: float) -> Tensor:
    """``min(pi_old / pi_sampler, C)``, no gradient: corrects for a sampler that isn't quite the policy.

    Truncated importance sampling (Ionides 2008, eq. 2; for RL's samplers Yao et al. 2025). Where a log-probability is not
    finite the weight is 1.

    Args:
        old_logprobs, sampler_logprobs: by the trainer's forward and as sampled ``[N]``.
        cap: C.
    """
    gap = (old_logprobs - sampler_logprobs).detach()
    return torch.where(gap.isfinite(), gap.exp().clamp(max=cap), 1)


# ------------------------------------------------------------------------------------------------- the KL in the loss


def k2_loss(policy_logprobs: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """``sg(r) d^2 / 2`` with ``d = log pi - log ref``: its gradient is that of KL(pi || ref) (Liu et al. 2025, 2510.01555).

    All ``[N]``. The ratio r = pi/old carries the expectation from the old policy's samples to the policy's own.
    """
    ratio = (policy_logprobs - old_logprobs).detach().exp()
    return ratio * (policy_logprobs - ref_logprobs) ** 2 / 2


def k3_loss(policy_logprobs: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """``r (exp(-d) + d - 1)`` with ``d = log pi - log ref`` and r = pi/old: its gradient is that of KL(pi || ref).

    Without the ratio, as in Shao et al. 2024 (arXiv 2402.03300, eq. 4), the gradient would be the forward KL's. All ``[N]``.
    """
    log_ratio = policy_logprobs - ref_logprobs
    return (policy_logprobs - old_logprobs).exp() * (torch.expm1(-log_ratio) + log_ratio)


# -------------------------------------------------------------------------------------------------- the critic's loss


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, *, clip_range: float) -> ValueLoss:
    """``0.5 max((v-R)^2, (clip(v, v_old-e, v_old+e)-R)^2)`` (Ziegler et al. 2019, arXiv 1909.08593; all ``[N]``)."""
    held = torch.minimum(torch.maximum(values, old_values - clip_range), old_values + clip_range)
    free_square, held_square = (values - returns) ** 2, (held - returns) ** 2
    return ValueLoss(0.5 * torch.maximum(free_square, held_square), (held_square > free_square).detach())


# ---------------------------------------------------------------------------------------------------------- reductions


def token_mean(mask: Tensor) -> Tensor:
    """Every token counts alike: ``1 / tokens``. Weights ``[B, T]`` of the mask ``[B, T]`` of a whole optimizer step."""
    return mask / mask.sum().clamp(min=1)


def sequence_mean(mask: Tensor) -> Tensor:
    """Every answer counts alike, and within it every token (Shao et al. 2024, arXiv 2402.03300, eq. 3). ``[B, T]``."""
    return mask / mask.sum(1, keepdim=True).clamp(min=1) / mask.any(1).sum().clamp(min=1)


def constant_mean(mask: Tensor, length: int) -> Tensor:
    """``1 / (answers * length)``, whatever their lengths, so that long answers are not spared (Liu et al. 2025, Dr. GRPO).

    arXiv 2503.20783, section 3.2. ``[B, T]``; ``length`` is the longest an answer can be.
    """
    return mask / (mask.any(1).sum().clamp(min=1) * length)
