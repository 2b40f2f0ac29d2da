"""What failures, checkpoints and stragglers leave of the time: goodput."""

from __future__ import annotations

import functools
import math
from statistics import NormalDist
from typing import NamedTuple

HOUR = 3600.0
MTBF = (
    16384 * 54 * 24 / 419 * HOUR
)  # seconds a GPU: 419 unexpected interruptions in 54 days on 16,384 (Llama 3, section 3.3.4)
RESTART = 600.0  # assumed: seconds until a run that was lost steps again (found, started, weights read, first step)
DISK_HOST, DISK_ALL = 2e9, 2e12  # bytes a second: a host's writing (assumed), a whole file system's (Llama 3, section 3.3.1)
JITTER = 0.02  # assumed: spread of a rank's step about its mean


class Goodput(NamedTuple):
    """Seconds between failures, of writing a checkpoint and between two of them; shares of the time."""

    mtbf: float
    write: float
    interval: float
    goodput: float
    stragglers: float


def goodput(devices: int, hosts: int, state: float) -> Goodput:
    """Of a run whose ranks each write their part of ``state`` bytes and all start again when one is lost."""
    mtbf = MTBF / devices
    write = max(1.0, state / min(hosts * DISK_HOST, DISK_ALL))
    interval = checkpoint_interval(write, mtbf)
    return Goodput(mtbf, write, interval, useful_share(interval, write, mtbf, RESTART), expected_maximum(devices) * JITTER)


def young(write: float, mtbf: float) -> float:
    """sqrt(2 delta M): Young 1974, CACM 17(9), first order."""
    return math.sqrt(2 * write * mtbf)


def checkpoint_interval(write: float, mtbf: float) -> float:
    """Best time from the end of a checkpoint to the begin of the next: Daly 2006, FGCS 22(3), higher order."""
    if write >= 2 * mtbf:
        return mtbf
    x = write / (2 * mtbf)
    return young(write, mtbf) * (1 + math.sqrt(x) / 3 + x / 9) - write


def useful_share(interval: float, write: float, mtbf: float, restart: float) -> float:
    """Useful time over wall time with failures at random (Daly 2006, complete model): the inverse of his wall time."""
    return interval / (mtbf * math.exp(restart / mtbf) * math.expm1((interval + write) / mtbf))


@functools.cache
def expected_maximum(ranks: int) -> float:
    """Mean of the largest of ``ranks`` standard normal draws: a step ends with its slowest rank.

    The integral of 1 - F^n above 0 less that of F^n below it, by the trapezium rule.
    """
    normal, step = NormalDist(), 0.01
    points = [normal.cdf(-9 + step * i) ** ranks for i in range(1801)]
    below, above = points[:900], points[900:]
    return step * (sum(1 - p for p in above) - 0.5 * (1 - above[0]) - sum(below) - 0.5 * above[0])
