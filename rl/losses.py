"""Losses of DPO and PPO as pure functions: tensors in, unreduced losses and detached metrics out.

Shapes: B rows, T answer tokens. Masks are bool, True counts. Reduction is the caller's: divide by the global count.
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
    """Unreduced losses ``[B, T]`` and detached metrics ``[B, T]``."""

    losses: Tensor
    ratio: Tensor
    clipped: Tensor


class ValueLoss(NamedTuple):
    """Unreduced losses ``[B, T]`` and where the clip was active ``[B, T]``."""

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


def ppo_loss(policy_logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, clip_range: float) -> PpoLoss:
    """``max(-A r, -A clip(r, 1-e, 1+e))`` with ``r = pi/old`` (Schulman et al. 2017, arXiv 1707.06347, eq. 7).

    Args:
        policy_logprobs, old_logprobs: of the sampled tokens, at the sampling temperature ``[B, T]``.
        advantages: ``[B, T]``, no gradient.
        clip_range: e.
    """
    ratio = (policy_logprobs - old_logprobs).exp()
    free, held = -advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    return PpoLoss(torch.maximum(free, held), ratio.detach(), (held > free).detach())


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, *, clip_range: float) -> ValueLoss:
    """``0.5 max((v-R)^2, (clip(v, v_old-e, v_old+e)-R)^2)`` (Ziegler et al. 2019, arXiv 1909.08593; all ``[B, T]``)."""
    held = torch.minimum(torch.maximum(values, old_values - clip_range), old_values + clip_range)
    free_square, held_square = (values - returns) ** 2, (held - returns) ** 2
    return ValueLoss(0.5 * torch.maximum(free_square, held_square), (held_square > free_square).detach())
