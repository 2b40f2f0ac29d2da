"""From scores to advantages: the per-token reward, four estimators of the advantage, whitening, the KL controller.

Shapes: B rows, T answer tokens, padded on the right. Masks are bool, True counts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Advantages(NamedTuple):
    advantages: Tensor
    returns: Tensor


def token_rewards(scores: Tensor, policy_logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, *, kl_coef: float) -> Tensor:
    """``r_t = -beta (log pi - log ref)``, plus the score at the last token that counts. Shape ``[B, T]``.

    The k1 estimator in the reward gives the gradient of the reverse KL (Ouyang et al. 2022, arXiv 2203.02155, eq. 2).

    Args:
        scores: of the whole answers ``[B]``.
        policy_logprobs, ref_logprobs: of the sampled tokens ``[B, T]``, no gradient.
        mask: answer tokens, the end token included ``[B, T]``.
        kl_coef: beta.
    """
    rewards = torch.where(mask, -kl_coef * (policy_logprobs - ref_logprobs), 0)
    last = (mask.sum(1) - 1).clamp(min=0)
    rewards[torch.arange(len(rewards)), last] += scores
    return rewards


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, gae_lambda: float) -> Advantages:
    """``A_t = d_t + g l A_{t+1}`` with ``d_t = r_t + g V_{t+1} - V_t`` (Schulman et al. 2016, arXiv 1506.02438, eq. 16).

    Beyond the last token both value and advantage are 0 (an answer that was cut off is scored as ended, with a penalty
    in its score). Padding neither contributes nor leaks.

    Args:
        rewards, values: ``[B, T]``.
        mask: answer tokens ``[B, T]``.
        gamma, gae_lambda: g and l.
    """
    values = torch.where(mask, values, 0)
    advantages = torch.zeros_like(rewards)
    carry = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        ahead = values[:, t + 1] if t + 1 < rewards.shape[1] else torch.zeros_like(carry)
        carry = torch.where(mask[:, t], rewards[:, t] + gamma * ahead - values[:, t] + gamma * gae_lambda * carry, 0)
        advantages[:, t] = carry
    return Advantages(advantages, advantages + values)


def rloo(returns: Tensor, group: int) -> Tensor:
    """``A_i = R_i - mean of the other answers' R`` (Ahmadian et al. 2024, arXiv 2402.14740, eq. 7).

    Args:
        returns: of whole answers ``[B]``, those to one prompt next to each other.
        group: answers to each prompt, at least 2.

    Returns:
        advantages ``[B]``.
    """
    grouped = returns.view(-1, group)
    return ((grouped - grouped.mean(1, keepdim=True)) * group / (group - 1)).flatten()


def grpo(returns: Tensor, group: int) -> Tensor:
    """``A_i = (R_i - mean) / (std + 1e-4)`` over the answers to a prompt (Shao et al. 2024, 2402.03300, section 4.1.2).

    The sample's standard deviation, as in TRL; arguments as for :func:`rloo`.
    """
    grouped = returns.view(-1, group)
    return ((grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)).flatten()


def dr_grpo(returns: Tensor, group: int) -> Tensor:
    """``A_i = R_i - mean`` over the answers to a prompt: no prompt counts more for being nearly always right or wrong.

    Liu et al. 2025, arXiv 2503.20783, section 3.2; arguments as for :func:`rloo`.
    """
    grouped = returns.view(-1, group)
    return (grouped - grouped.mean(1, keepdim=True)).flatten()


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """``(x - mean) / sqrt(var + 1e-8)`` over the entries that count, population variance; 0 elsewhere."""
    count = mask.sum().clamp(min=1)
    mean = torch.where(mask, values, 0).sum() / count
    variance = torch.where(mask, (values - mean) ** 2, 0).sum() / count
    return torch.where(mask, (values - mean) / (variance + 1e-8).sqrt(), 0)


def approximate_kl(log_ratio: Tensor) -> Tensor:
    """``k3 = exp(-d) + d - 1`` of ``d = log p - log q`` under p: never negative, mean equal to KL(p || q).

    Schulman 2020, http://joschu.net/blog/kl-approx.html.
    """
    return torch.expm1(-log_ratio) + log_ratio


def adapted_kl_coef(kl_coef: float, kl: float, *, target: float, horizon: float, answers: int) -> float:
    """``beta (1 + clip(KL/target - 1, -0.2, 0.2) n / horizon)`` (Ziegler et al. 2019, arXiv 1909.08593, section 2.2).

    Args:
        kl_coef: beta.
        kl: measured KL(policy || reference) of an answer, nats (the sum over its tokens).
        target: the KL to hold.
        horizon: answers in which beta can change by a fifth of itself.
        answers: n, since the last change.
    """
    error = max(-0.2, min(0.2, kl / target - 1))
    return kl_coef * (1 + error * answers / horizon)
