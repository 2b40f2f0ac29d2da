"""Bootstrap over questions in topics, for any statistic, alone or paired; and what many comparisons do to it.

Questions of a topic have much in common, and a bank is a draw of topics as well as of questions. Each resample draws
topics, then questions within each drawn topic (the two-stage bootstrap; Davison & Hinkley 1997, section 3.8). Drawing
questions alone is too sure of itself as soon as topics differ, drawing topics alone as soon as there are few
(docs/decisions/0005).

Shapes: n items, R resamples. A resample is a row of weights: how often each item was drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from truthward.stats import Interval

Array = NDArray[np.float64]
Statistic = Callable[..., Array]  # (weights [R, n], *columns [n]) -> [R]; nan where nothing was drawn that it needs
K = TypeVar("K", bound=Hashable)
POWER = 2.8  # (z of 97.5 % + z of 80 %): an effect of this many standard errors is found four times in five


def draw_weights(topics: Sequence[str], resamples: int, seed: int, *, fixed_topics: bool = False) -> Array:
    """``[R, n]`` weights of a two-stage bootstrap; with one topic it is the plain bootstrap over its questions.

    Args:
        fixed_topics: every topic is in every resample, and only its questions are drawn (the stratified bootstrap; Davison &
            Hinkley 1997, section 3.2): what is claimed is about these topics alone (docs/decisions/0009).
    """
    names = {name: k for k, name in enumerate(dict.fromkeys(topics))}
    where = np.array([names[t] for t in topics])
    generator = np.random.default_rng(seed)
    times = generator.multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
    times = np.ones_like(times) if fixed_topics else times
    weights = np.zeros((resamples, len(where)))
    for k in range(len(names)):
        members = np.flatnonzero(where == k)
        fair = np.full(len(members), 1 / len(members))
        for turn in range(times[:, k].max()):
            rows = np.flatnonzero(times[:, k] > turn)
            weights[np.ix_(rows, members)] += generator.multinomial(len(members), fair, size=len(rows))
    return weights


# -------------------------------------------------------------------------------------------------------- statistics


def mean_of(weights: Array, values: Array) -> Array:
    """Mean over the items that have a value."""
    there = ~np.isnan(values)
    return _ratio(weights[:, there] @ values[there], weights[:, there].sum(1))


def ratio_of(weights: Array, above: Array, below: Array) -> Array:
    """Ratio of two means over the items that have both values: steadier than a mean of ratios, where one may be huge."""
    there = ~np.isnan(above) & ~np.isnan(below)
    return _ratio(weights[:, there] @ above[there], weights[:, there] @ below[there])


def area_under(weights: Array, positive: Array, negative: Array) -> Array:
    """That a positive score lies above a negative one, a tie counting a half (AUROC; Hanley & McNeil 1982).

    Args:
        positive, negative: ``[n]`` scores, nan where an item has none.
    """
    p, q = (np.flatnonzero(~np.isnan(scores)) for scores in (positive, negative))
    above, below = positive[p][:, None], negative[q][None, :]
    beats = (above > below) + 0.5 * (above == below)
    pairs = ((weights[:, p] @ beats) * weights[:, q]).sum(1)
    return _ratio(pairs, weights[:, p].sum(1) * weights[:, q].sum(1))


def confidence_area(weights: Array, confidence: Array, right: Array) -> Array:
    """AUROC of a confidence: that a right answer carries more of it than a wrong one."""
    return area_under(weights, np.where(right > 0.5, confidence, np.nan), np.where(right > 0.5, np.nan, confidence))


def calibration_error(weights: Array, confidence: Array, right: Array, bins: int = 10) -> Array:
    """Expected calibration error over bins of equal width (Guo et al. 2017, arXiv 1706.04599, equation 5)."""
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    off = weights @ ((confidence - right)[:, None] * (place[:, None] == np.arange(bins)))
    return _ratio(np.abs(off).sum(1), weights.sum(1))


def selective_accuracy(weights: Array, confidence: Array, right: Array, coverage: float = 0.5) -> Array:
    """Accuracy on the most confident share of the items (El-Yaniv & Wiener 2010)."""
    order = np.argsort(-confidence, kind="stable")
    drawn = np.cumsum(weights[:, order], axis=1)
    room = coverage * drawn[:, -1:]
    taken = np.clip(room - (drawn - weights[:, order]), 0, weights[:, order])
    return _ratio(taken @ right[order], taken.sum(1))


def _ratio(above: Array, below: Array) -> Array:
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0)


# -------------------------------------------------------------------------------------------------------- comparison


@dataclass(frozen=True)
class Difference:
    """A paired difference.

    Attributes:
        draws: ``[R]``: the difference in each resample.
    """

    interval: Interval
    draws: Array

    @property
    def detectable(self) -> float:
        """The smallest true difference that would be found four times in five with these questions."""
        return float(POWER * np.nanstd(self.draws))

    @property
    def p(self) -> float:
        """Two-sided p-value: twice the smaller share of the resamples on either side of zero."""
        return min(1.0, 2 * min(_share(self.draws <= 0), _share(self.draws >= 0)))

    def below(self, bound: float) -> float:
        """One-sided p-value of the claim that the difference lies below ``bound``: the share of resamples that do not."""
        return _share(self.draws >= bound)

    def above(self, bound: float) -> float:
        """The same of the claim that it lies above ``bound``."""
        return _share(self.draws <= bound)


def paired_power(items: int, loss: float, changed: float) -> float:
    """Chance that a true loss of a yes-or-no score is told from none, at two-sided 95 %, where topics are fixed.

    A paired difference varies by ``changed - loss^2`` an item (McNemar's setting; Connor 1987); by less where topics differ,
    since these are not drawn.

    Args:
        items: of the bank.
        loss: how much less often the later model is right, in truth.
        changed: share of the items on which the two models come out differently, either way; at least ``loss``.
    """
    error = math.sqrt((changed - loss**2) / items)
    return NormalDist().cdf(loss / error - NormalDist().inv_cdf(0.975))


def difference_of(
    statistic: Statistic, weights: Array, columns: Sequence[Array], others: Sequence[Array]
) -> Difference | None:
    """The statistic of ``columns`` minus that of ``others`` on the same items and the same resamples; None as above."""
    ours, theirs = (_whole(statistic, c) for c in (columns, others))
    if ours is None or theirs is None:
        return None
    draws = statistic(weights, *columns) - statistic(weights, *others)
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    n = min(_scored(columns), _scored(others))
    return Difference(Interval(ours - theirs, float(low), float(high), n), draws)


def interval_of(statistic: Statistic, weights: Array, columns: Sequence[Array]) -> Interval | None:
    """The statistic over all items with its 95 % percentile interval; None where no item has what it needs."""
    whole = _whole(statistic, columns)
    if whole is None:
        return None
    low, high = np.nanpercentile(statistic(weights, *columns), [2.5, 97.5])
    return Interval(whole, float(low), float(high), _scored(columns))


def holm(p_values: Mapping[K, float]) -> dict[K, float]:
    """p-values corrected for their number (Holm 1979), so that 5 % of all families of true nulls have a false find."""
    corrected: dict[K, float] = {}
    highest = 0.0
    for k, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - k) * p_values[name]))
        corrected[name] = highest
    return {name: corrected[name] for name in p_values}


def _whole(statistic: Statistic, columns: Sequence[Array]) -> float | None:
    """The statistic over all items, each once; None where no item has what it needs."""
    value = statistic(np.ones((1, len(columns[0]))), *columns)[0]
    return float(value) if _scored(columns) and not np.isnan(value) else None


def _scored(columns: Sequence[Array]) -> int:
    return int((~np.isnan(np.vstack(columns))).any(0).sum())


def _share(holds: NDArray[np.bool_]) -> float:
    """Share of the resamples, with one more that holds: a p-value from resamples is never 0."""
    return (float(holds.sum()) + 1) / (holds.size + 1)
