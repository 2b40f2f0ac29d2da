"""The guard's formulas: plain numbers in, plain numbers out."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from itertools import combinations
from statistics import fmean, median, stdev
from typing import NamedTuple

FLOOR = 0.05  # least spread, as a share of the median: a loss that hardly moves must not make a spike of a hair's breadth
RECENT = 5  # values whose median is the level that the next one is compared with


class Score(NamedTuple):
    """A robust z-score with what it was made of."""

    z: float
    expected: float
    spread: float


def robust_z(value: float, history: Sequence[float]) -> Score:
    """``0.6745 (x - expected) / MAD`` (Iglewicz & Hoaglin 1993, "How to Detect and Handle Outliers", section 3.3).

    The factor makes it a z-score where deviations are normal; medians stay put when up to half of the values are off.

    A loss falls, and its fall must not count as spread, or an explosion early in training would pass for a return to where
    the loss was before. So deviations are taken from a line through the history, its slope the median of the slopes between
    all pairs (Theil 1950, Sen 1968), and their MAD, the median distance from their median, is the spread: at least ``FLOOR``
    x |median of the history|. Expected is the median of the last ``RECENT`` values, or the line's next if that is more.

    Args:
        history: one value or more, the oldest first.
    """
    slopes = [(y - x) / (j - i) for (i, x), (j, y) in combinations(enumerate(history), 2)]
    slope = median(slopes) if slopes else 0.0
    level = [x - slope * i for i, x in enumerate(history)]
    middle = median(level)
    spread = max(median(abs(x - middle) for x in level), FLOOR * abs(median(history)), 1e-12)
    expected = max(median(history[-RECENT:]), middle + slope * len(history))
    return Score(0.6745 * (value - expected) / spread, expected, spread)


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
