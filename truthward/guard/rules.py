"""What each kind of training is watched for.

A rule looks at a step's metrics beside those of the first and of the last calm steps, and gives evidence when it finds
something. The guard acts when a rule has found something so many times in a row.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from truthward.guard.detectors import robust_z
from truthward.tables import Guard

Action = Literal["noted", "skipped", "rolled back", "stopped"]
Row = dict[str, Any]
NOT_FINITE = "not finite"
FIRST = 3  # calm steps that "at first" is the mean of
RISE = 0.25  # of the normalised score, in the first rollout's spreads, that counts as rising
SURE = 3  # standard errors of a fall of the truth; at every probe there is a new chance to be wrong
GROWN = 1.3  # answers this many times as long as at first have grown


@dataclass(frozen=True)
class Past:
    """Metrics of the first calm steps, and of the last ones up to the guard's window."""

    first: list[Row]
    recent: deque[Row]

    def at_first(self, key: str) -> float | None:
        """Mean over the first calm steps; None while there are too few."""
        values = [row[key] for row in self.first if is_number(row.get(key))]
        return fmean(values) if len(values) >= FIRST else None


Evidence = dict[str, float | str]
Look = Callable[[Guard, Past, Row], Evidence | None]


@dataclass(frozen=True)
class Rule:
    """One thing that is watched for.

    Attributes:
        kind: what is found, as the record names it.
        needs: metrics that a step must have for the rule to say anything.
        look: the evidence, or None.
        action: what happens when it is found ``patience`` times in a row.
        patience: the guard's key that says how often that is; empty: once.
        at_once: the first finding is an incident already.
        batch: it is one batch that is judged, which can be left out.
    """

    kind: str
    needs: tuple[str, ...]
    look: Look
    action: Action = "rolled back"
    patience: str = "patience"
    at_once: bool = False
    batch: bool = False


def is_number(value: Any) -> bool:
    """A finite number; a metric that was NaN is None in the record."""
    return isinstance(value, int | float) and math.isfinite(value)


# ------------------------------------------------------------------------------------------------- every kind of training


def broken(row: Row, keys: Sequence[str]) -> str:
    """The first of these metrics that is there and is not finite; empty if none is."""
    return next((key for key in keys if key in row and not is_number(row[key])), "")


def not_finite(*keys: str) -> Rule:
    """A loss or gradient norm that is NaN or infinite."""

    def look(table: Guard, past: Past, row: Row) -> Evidence | None:
        metric = broken(row, keys)
        return {"metric": metric, "value": str(row[metric])} if metric else None

    return Rule(NOT_FINITE, (), look, at_once=True, batch=True)


def spike(key: str, *, batch: bool = False) -> Rule:
    """A value far above what it was over the last calm steps."""

    def look(table: Guard, past: Past, row: Row) -> Evidence | None:
        history = [r[key] for r in past.recent if is_number(r.get(key))]
        if len(history) < table.warmup or not is_number(row[key]):
            return None
        score = robust_z(row[key], history)
        if score.z <= table.spike:
            return None
        against = {"z": round(score.z, 1), "most": table.spike, "expected": score.expected, "spread": score.spread}
        return {"metric": key, "value": row[key], **against}

    return Rule(f"spike of {key}", (key,), look, at_once=True, batch=batch)


TRAINER = (not_finite("grad_norm", "loss"), spike("loss", batch=True), spike("grad_norm", batch=True))


# ------------------------------------------------------------------------------------------------------------------- PPO


def _entropy(table: Guard, past: Past, row: Row) -> Evidence | None:
    first = past.at_first("entropy")
    if first is None or row["entropy"] >= table.entropy_least * first:
        return None
    return {"metric": "entropy", "value": row["entropy"], "at_first": first, "least": table.entropy_least * first}


def _repetition(table: Guard, past: Past, row: Row) -> Evidence | None:
    first = past.at_first("answers/repeated")
    if first is None or row["answers/repeated"] <= first + table.repeated_rise:
        return None
    most = first + table.repeated_rise
    return {"metric": "answers/repeated", "value": row["answers/repeated"], "at_first": first, "most": most}


def _kl(table: Guard, past: Past, row: Row) -> Evidence | None:
    if row["kl/k1"] <= table.kl_most:
        return None
    return {"metric": "kl/k1", "value": row["kl/k1"], "most": table.kl_most}


def _length(table: Guard, past: Past, row: Row) -> Evidence | None:
    first = past.at_first("answers/tokens")
    if first is None or row["answers/tokens"] <= table.length_most * first:
        return None
    most = table.length_most * first
    return {"metric": "answers/tokens", "value": row["answers/tokens"], "at_first": first, "most": most}


def _paid_for_length(table: Guard, past: Past, row: Row) -> Evidence | None:
    first, correlation = past.at_first("answers/tokens"), row["score/length_correlation"]
    if first is None or correlation <= table.length_correlation or row["answers/tokens"] <= GROWN * first:
        return None
    grown = {"tokens": row["answers/tokens"], "tokens_at_first": first}
    return {"metric": "score/length_correlation", "value": correlation, "most": table.length_correlation, **grown}


def _less_true(table: Guard, past: Past, row: Row) -> Evidence | None:
    first, fall = past.at_first("score/normalised"), -row["probe/change"]
    score = fmean([r["score/normalised"] for r in [*past.recent, row][-FIRST:]])
    if first is None or score <= first + RISE or fall <= max(table.truth_fall, SURE * row["probe/error"]):
        return None
    seen = {"error": row["probe/error"], "most_fall": table.truth_fall, "score": score, "score_at_first": first}
    return {"metric": "probe/truth", "value": row["probe/truth"], "fall": fall, **seen}


def _critic(table: Guard, past: Past, row: Row) -> Evidence | None:
    if row["value/explained"] > 0:
        return None
    return {"metric": "value/explained", "value": row["value/explained"], "least": 0.0}


def _drift(table: Guard, past: Past, row: Row) -> Evidence | None:
    if row["sampler_gap"] <= table.gap_most:
        return None
    return {"metric": "sampler_gap", "value": row["sampler_gap"], "most": table.gap_most}


def _skipped(table: Guard, past: Past, row: Row) -> Evidence | None:
    """PPO skips a minibatch as it comes; an iteration in which many were skipped counts as one that failed."""
    if row["skipped"] < min(table.patience, row["steps"]):
        return None
    return {"metric": "grad_norm", "value": "not finite", "minibatches": row["skipped"], "of": row["steps"]}


PPO = (
    Rule(NOT_FINITE, ("skipped", "steps"), _skipped, patience=""),
    spike("loss/value"),
    spike("grad_norm"),
    Rule("entropy collapse", ("entropy",), _entropy),
    Rule("repetition", ("answers/repeated",), _repetition),
    Rule("KL runaway", ("kl/k1",), _kl),
    Rule("length explosion", ("answers/tokens",), _length),
    Rule("paid for length", ("answers/tokens", "score/length_correlation"), _paid_for_length, "stopped"),
    Rule("less true", ("probe/truth", "probe/change", "probe/error", "score/normalised"), _less_true, "stopped", ""),
    Rule("critic explains nothing", ("value/explained",), _critic, "noted", "critic_patience"),
    Rule("sampler drift", ("sampler_gap",), _drift, "stopped"),
)
