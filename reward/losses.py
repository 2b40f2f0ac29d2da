"""The preference loss, as a pure function. B pairs."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F


class PreferenceLoss(NamedTuple):
    """Unreduced losses ``[B]`` and detached metrics ``[B]``."""

    losses: Tensor
    margins: Tensor
    correct: Tensor


def preference_loss(
    chosen_rewards: Tensor, rejected_rewards: Tensor, probability: Tensor, *, center_coef: float
) -> PreferenceLoss:
    """Bradley-Terry cross-entropy with a soft label, and a pull of the rewards towards zero.

    ``-(p log sigmoid(d) + (1-p) log sigmoid(-d)) + c (r_w + r_l)^2`` with ``d = r_w - r_l``. At p = 1 it is Ouyang et al.
    2022 (arXiv 2203.02155), eq. 1; the centring term is Eisenstein et al. 2023 (arXiv 2312.09244), section 3.

    Args:
        chosen_rewards, rejected_rewards: scores ``[B]``.
        probability: that chosen is the better one ``[B]``, in [0, 1].
        center_coef: c.
    """
    margins = chosen_rewards - rejected_rewards
    losses = -(probability * F.logsigmoid(margins) + (1 - probability) * F.logsigmoid(-margins))
    losses = losses + center_coef * (chosen_rewards + rejected_rewards) ** 2
    return PreferenceLoss(losses, margins.detach(), (margins > 0).detach())
