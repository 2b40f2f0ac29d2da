"""The loss of principle distillation, as a pure function. N tokens, V words."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class DistillationLoss(NamedTuple):
    """Unreduced losses ``[N]`` and, detached, how far the target lies from the parent ``[N]``; nats."""

    losses: Tensor
    shift: Tensor


def contrastive_target(
    plain_logits: Tensor, follow_logits: Tensor, violate_logits: Tensor, *, alpha: float, cutoff: float
) -> Tensor:
    """log p* ``[N, V]`` in fp32: ``log softmax(log p_plain + alpha (log p_follow - log p_violate))``.

    All three are one frozen model: without a system prompt, told to keep a principle, and told to break it. Conditioning
    that is distilled into the weights is Askell et al. 2021 (arXiv 2112.00861, section 2.1); follow against violate is Yang
    et al. 2023 (RLCD, arXiv 2307.12950), here for every word instead of for whole answers.

    Args:
        alpha: weight of the contrast; 0 gives p_plain.
        cutoff: words whose p_plain is below this share of the likeliest one's are not shifted, after the plausibility
            constraint of Li et al. 2023 (arXiv 2210.15097, eq. 3), which drops them.
    """
    plain, follow, violate = (z.float().log_softmax(-1) for z in (plain_logits, follow_logits, violate_logits))
    contrast = follow.sub_(violate).mul_(alpha)
    if cutoff:
        contrast.masked_fill_(plain < plain.amax(-1, keepdim=True) + math.log(cutoff), 0.0)
    return contrast.add_(plain).log_softmax(-1)


def distillation_loss(
    policy_logits: Tensor,
    plain_logits: Tensor,
    follow_logits: Tensor,
    violate_logits: Tensor,
    *,
    alpha: float,
    cutoff: float,
) -> DistillationLoss:
    """``KL(p* || p_policy) = sum_v p*(v) (log p*(v) - log p_policy(v))``, p* by :func:`contrastive_target`.

    The expectation is over the target (forward KL), so that its gradient by the policy's logits is ``p_policy - p*``.
    ``shift`` is ``KL(p* || p_plain)``: what the loss is while the policy is its parent.

    Args:
        policy_logits: of the model in training, without a system prompt ``[N, V]``.
        plain_logits, follow_logits, violate_logits: of its frozen parent ``[N, V]``, no gradient.
        alpha, cutoff: as in :func:`contrastive_target`.
    """
    with torch.no_grad():
        target = contrastive_target(plain_logits, follow_logits, violate_logits, alpha=alpha, cutoff=cutoff)
        share = target.exp()
        held = torch.linalg.vecdot(share, target)
        shift = held - torch.linalg.vecdot(share, plain_logits.float().log_softmax(-1))
    return DistillationLoss(held - torch.linalg.vecdot(share, policy_logits.float().log_softmax(-1)), shift)
