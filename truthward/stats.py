"""Intervals: every score carries its n and a 95 % bootstrap interval, and comparisons are paired."""

from __future__ import annotations

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
