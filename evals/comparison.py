"""A model beside another on the same questions: paired differences, what flipped, and the gate's verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from evals.asking import Exam
from evals.suite import Scored, columns_of, resampled
from truthward.errors import UserError
from truthward.resampling import difference_of, holm
from truthward.stats import Interval
from truthward.tables import VOICE, VOICE_MARGIN, VOICE_METRICS, Evals, Gate

ALPHA = 0.025  # one-sided, as one end of a 95 % interval


def compare(
    scored: Sequence[Scored], other: dict[str, Any], by_name: Mapping[str, Exam], table: Evals, seed: int
) -> dict[str, Any]:
    """Question by question against the evals of another model.

    Args:
        scored: this model's items.
        other: the other's ``evals.json``; sets and questions that it lacks are left out.

    Returns:
        ``differences`` by metric, each an interval with ``p``, ``p_corrected`` (Holm, over all metrics), ``loss`` (one-sided
        p-value of a loss beyond the margin) and ``detectable``; ``flipped``: items whose verdict changed.
    """
    before = {(row["set"], row["id"]): row for row in other["items"]}
    differences: dict[str, dict[str, Any]] = {}
    flipped: list[dict[str, Any]] = []
    for name in dict.fromkeys(s.set for s in scored):
        own = [s for s in scored if s.set == name and (name, s.id) in before]
        then = [before[name, s.id] for s in own]
        if not own:
            continue
        weights = resampled(own, by_name[name], table.resamples, seed)
        for key, metric in by_name[name].metrics.items():
            now, past = columns_of(metric, [s.values for s in own]), columns_of(metric, [b["values"] for b in then])
            found = difference_of(metric.statistic, weights, now, past)
            if found:
                margin = margin_of(table, f"{name}.{key}")
                loss = found.above(margin) if metric.better == "lower" else found.below(-margin)
                extra = {
                    "p": found.p,
                    "detectable": found.detectable,
                    "loss": loss if metric.better and not metric.part else None,
                }
                differences[f"{name}.{key}"] = found.interval.as_dict() | extra
        if verdict := by_name[name].verdict:
            flipped += _flips(own, then, verdict)
    corrected = holm({name: d["p"] for name, d in differences.items()})
    for name, difference in differences.items():
        difference["p_corrected"] = corrected[name]
    return {"evals": other["model"], "stage": other["stage"], "differences": differences, "flipped": flipped}


def _flips(own: Sequence[Scored], then: Sequence[dict[str, Any]], verdict: str) -> list[dict[str, Any]]:
    found = []
    for now, past in zip(own, then, strict=True):
        a, b = past["values"][verdict], now.values[verdict]
        if a is not None and b is not None and (a > 0.5) != (b > 0.5):
            found.append({"set": now.set, "id": now.id, "better": b > a, "before": past["picked"], "after": now.picked})
    return found


# -------------------------------------------------------------------------------------------------------------- gate


def gate_of(table: Evals, metric: str) -> Gate:
    """What a loss in a metric does: named itself, or by its set; those of the voice block unless they are named.

    A single word in the recipe is for the truth set and the voice.
    """
    word = table.gate if isinstance(table.gate, str) else "block"
    gates: dict[str, Gate] = dict.fromkeys(VOICE_METRICS, word)
    gates |= {"truth": word} if isinstance(table.gate, str) else table.gate
    return gates.get(metric, gates.get(metric.partition(".")[0], "off"))


def margin_of(table: Evals, metric: str) -> float:
    """How large a loss counts: named for the metric, or for its set; 0.03 for those of the voice; else the single number."""
    named = table.margin if isinstance(table.margin, dict) else {}
    other = 0.0 if isinstance(table.margin, dict) else table.margin
    for name in (metric, metric.partition(".")[0]):
        if name in named:
            return named[name]
    return VOICE_MARGIN if metric in VOICE_METRICS else other


def require_known(table: Evals, by_name: Mapping[str, Exam], where: str) -> None:
    """Refuse a gate or margin for a metric that does not exist.

    Raises:
        UserError: names the set's metrics.
    """
    for key in ("gate", "margin"):
        named = getattr(table, key)
        for name in named if isinstance(named, dict) else []:
            own, dot, metric = name.partition(".")
            if dot and metric not in by_name[own].metrics:
                fix = f"metrics of {own}: {', '.join(by_name[own].metrics)}"
                raise UserError(f"there is no metric {name}", where=f"{where}: evals.{key}", fix=fix)


def verdict(table: Evals, compared: dict[str, Any] | None, base: dict[str, Any] | None = None) -> dict[str, Any]:
    """Which gated metrics got worse, corrected for their number (Holm), and the strictest thing that is to be done.

    Args:
        compared: with the parent.
        base: with the base, for sets on which the parent was not measured (``evals.brief``), and beside the parent for
            those of the voice: three small losses add up to one that no step showed.

    Returns:
        ``worse``: metric -> ``block`` or ``warn``; ``mode``: the strictest of them, ``off`` where nothing got worse;
        ``text``: in words.
    """
    near, far = ((other or {}).get("differences", {}) for other in (compared, base))
    far = {name: d for name, d in far.items() if name not in near or name.partition(".")[0] in VOICE}
    if compared and base and compared["stage"] == base["stage"]:
        far = {}  # the parent is the base
    sides = [(other["stage"], d) for other, d in ((compared, near), (base, far)) if other]
    differences = {(name, stage): d for stage, named in sides for name, d in named.items()}
    if not differences:
        return {"mode": "off", "gated": [], "worse": {}, "text": "nothing to compare with"}
    losses = {key: d["loss"] for key, d in differences.items() if gate_of(table, key[0]) != "off" and d["loss"] is not None}
    lost = [key for key, p in holm(losses).items() if p <= ALPHA]
    worse = {name: gate_of(table, name) for name, _ in lost}
    mode = "block" if "block" in worse.values() else "warn" if worse else "off"
    words = [f"{name} {signed(differences[name, stage])} against {stage}" for name, stage in lost]
    gated = list(dict.fromkeys(name for name, _ in losses))
    return {"mode": mode, "gated": gated, "worse": worse, "text": ", ".join(words) or "not worse than its parent"}


def signed(difference: dict[str, Any]) -> str:
    """A difference with its interval, in words."""
    return Interval(*(difference[key] for key in ("mean", "low", "high", "n"))).signed()
