"""Intervals: every score carries its n and a 95 % bootstrap interval, and comparisons are paired.

A *margin* is the score of a pair's better answer minus that of its worse one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval; ``n`` counts the independent clusters it rests on."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}] n={self.n}"

    def signed(self) -> str:
        """For a difference: every number with its sign."""
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}] n={self.n}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def pair_wins(true: Sequence[float], false: Sequence[float]) -> list[float]:
    """For each matched pair 1 where the true answer has the higher score, 0 where the false one has, 0.5 for a tie."""
    return [1.0 if t > f else 0.5 if t == f else 0.0 for t, f in zip(true, false, strict=False)]


def mean_interval(
    values: Sequence[float], *, clusters: Sequence[str] | None = None, resamples: int = 4000, seed: int = 0
) -> Interval:
    """Mean and percentile bootstrap (Efron 1979) over clusters.

    Args:
        values: one number an observation; for a paired comparison, the differences.
        clusters: what each observation belongs to; whole clusters are drawn. None: each is its own.
        resamples: bootstrap draws.
        seed: of the draws.

    Raises:
        ValueError: no values.
    """
    if not len(values):
        raise ValueError("no values to average")
    names = list(range(len(values))) if clusters is None else list(clusters)
    index = {name: i for i, name in enumerate(dict.fromkeys(names))}
    where = np.array([index[name] for name in names])
    totals = np.bincount(where, weights=np.asarray(values, dtype=float))
    counts = np.bincount(where).astype(float)
    draws = np.random.default_rng(seed).integers(0, len(index), size=(resamples, len(index)))
    means = totals[draws].sum(1) / counts[draws].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(totals.sum() / counts.sum()), float(low), float(high), len(index))


def accuracy(margins: Sequence[float], resamples: int, seed: int) -> Interval:
    """How often the better answer of a pair has the higher score; a tie counts a half."""
    return mean_interval(pair_wins(margins, [0.0] * len(margins)), resamples=resamples, seed=seed)


def probability(difference: float, temperature: float = 1.0) -> float:
    """That the first of two answers is better, from the difference of their scores (Bradley-Terry)."""
    return 1 / (1 + math.exp(-max(-60.0, min(60.0, difference / temperature))))


def fit_temperature(margins: Sequence[float], coldest: float = 1e-3, hottest: float = 1e3) -> float:
    """The T at which ``sigmoid(margin / T)`` is the likeliest (Guo et al. 2017, arXiv 1706.04599), within bounds.

    A judge that is always right would have T = 0, one at chance an endless T.
    """

    def loss(log_t: float) -> float:
        return -sum(math.log(probability(m, math.exp(log_t))) for m in margins)

    low, high = math.log(coldest), math.log(hottest)
    for _ in range(60):  # the loss is convex in 1/T, so it has one minimum in log T
        near, far = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, far) if loss(near) <= loss(far) else (near, high)
    return math.exp((low + high) / 2)


def calibration(margins: Sequence[float], temperature: float = 1.0, bins: int = 10) -> dict[str, float]:
    """How far the probabilities ``sigmoid(margin / temperature)`` can be believed.

    Returns:
        ``brier``: mean square of 1 - that of the better answer; ``ece``: mean distance of the winner's probability from how
        often it is right, over bins of equal width between 0.5 and 1.
    """
    better = [probability(m, temperature) for m in margins]
    off = [0.0] * bins
    for p in better:
        winner = max(p, 1 - p)
        right = 1.0 if p > 0.5 else 0.5 if p == 0.5 else 0.0
        off[min(int((winner - 0.5) * 2 * bins), bins - 1)] += winner - right
    n = max(1, len(better))
    return {"brier": sum((1 - p) ** 2 for p in better) / n, "ece": sum(map(abs, off)) / n}


def takes_longer(lengths: Sequence[tuple[int, int]], margins: Sequence[float], resamples: int, seed: int) -> Interval | None:
    """How often the longer answer is taken; without a liking for length it is as often as it is the better one.

    Args:
        lengths: of each pair, of the better and the worse answer; pairs of equal lengths or scores say nothing.
    """
    taken = [
        1.0 if (margin > 0) == (better > worse) else 0.0
        for (better, worse), margin in zip(lengths, margins, strict=True)
        if better != worse and margin
    ]
    return mean_interval(taken, resamples=resamples, seed=seed) if taken else None
