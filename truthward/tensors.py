"""Tensor maths used by more than one stage.

Shapes: B rows, T positions, V words. Masks are bool and True always means "counts".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum over the entries that count; entries that don't may hold anything, NaN included."""
    return torch.where(mask, values, 0).sum()


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the entries that count; 0 where none does."""
    return masked_sum(values, mask) / mask.sum().clamp(min=1)


def token_logprobs(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """log p of each given token, in fp32: ``z_t/T - logsumexp(z/T)``. Logits ``[..., V]``, ids and result ``[...]``."""
    flat = _tempered(logits, temperature).flatten(0, -2)
    return -F.cross_entropy(flat, ids.flatten(), reduction="none").view(ids.shape)


def token_entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy of the next-word distribution, in nats: ``logsumexp(z) - sum(p z)``. Logits ``[..., V]``, result ``[...]``."""
    logits = _tempered(logits, temperature)
    return logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1)


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    return logits.float() if temperature == 1.0 else logits.float() / temperature


def pad(rows: Sequence[Sequence[int]], value: int, side: str = "right", length: int = 0) -> tuple[Tensor, Tensor]:
    """Stack rows of different lengths.

    Returns:
        ids ``[B, T]`` and the mask of real tokens ``[B, T]``; T is the longest row, or ``length`` if that is more.
    """
    width = max(length, *(len(r) for r in rows)) if rows else length
    ids = torch.full((len(rows), width), value, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        span = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, span], mask[i, span] = torch.tensor(row, dtype=torch.long), True
    return ids, mask


def positions(mask_BT: Tensor) -> Tensor:
    """Position of each token counted from the first real one; padding gets 0. Needed wherever rows are left-padded."""
    return (mask_BT.long().cumsum(-1) - 1).clamp(min=0)
