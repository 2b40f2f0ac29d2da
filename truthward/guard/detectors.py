"""The guard's formulas: plain numbers in, plain numbers out."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from statistics import fmean, median, stdev
from typing import NamedTuple

FLOOR = 0.05  # least spread, as a share of the median: a loss that hardly moves must not make a spike of a hair's breadth


class Score(NamedTuple):
    """A robust z-score with what it was made of."""

    z: float
    median: float
    spread: float


def robust_z(value: float, history: Sequence[float]) -> Score:
    """``0.6745 (x - median) / MAD`` (Iglewicz & Hoaglin 1993, "How to Detect and Handle Outliers", section 3.3).

    The factor makes it a z-score where the history is normal; unlike mean and deviation, median and MAD stay put when up to
    half of the history is off. The MAD, the median distance from the median, is taken as at least ``FLOOR`` x |median|.

    Args:
        history: one value or more.
    """
    middle = median(history)
    spread = max(median(abs(x - middle) for x in history), FLOOR * abs(middle), 1e-12)
    return Score(0.6745 * (value - middle) / spread, middle, spread)


def repeated_share(ids: Sequence[Hashable], n: int = 4) -> float:
    """Share of a text's n-grams that stood in it before: ``1 - distinct / all``; 0 where it has fewer than two."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if len(grams) > 1 else 0.0


class Change(NamedTuple):
    """A mean paired difference and its standard error."""

    mean: float
    error: float


def paired_change(before: Sequence[float], after: Sequence[float]) -> Change:
    """``mean(after - before)`` over the same items, with ``stdev / sqrt(n)``; two items or more."""
    gains = [b - a for a, b in zip(before, after, strict=True)]
    return Change(fmean(gains), stdev(gains) / math.sqrt(len(gains)))
