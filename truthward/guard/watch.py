"""The guard itself: from a step's metrics to what is done about them, with every incident put on record."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from typing import Any

from truthward import tables
from truthward.errors import TrainingFault
from truthward.guard.rules import FIRST, NOT_FINITE, Action, Evidence, Past, Row, Rule
from truthward.ledger import Run


class Guard:
    """Watches one run.

    All that it knows follows from the rows of ``metrics.jsonl`` and the incidents on record, so that a run that goes on
    after a kill decides as one that was never killed.

    Args:
        table: the recipe's ``[guard]``.
        run: whose record takes the incidents.
        rules: what is watched for.
    """

    def __init__(self, table: tables.Guard, run: Run, rules: Sequence[Rule]) -> None:
        self.table, self.run, self.rules = table, run, rules
        self.rebuild([])

    def rebuild(self, rows: Iterable[Row]) -> None:
        """Forget everything and live through these rows again, without a word on record."""
        self.past = Past([], deque(maxlen=self.table.window))
        self.streaks: Counter[str] = Counter()
        self._wary, self._refused = False, 0
        for row in rows:
            self._judge(row)

    @property
    def calm(self) -> bool:
        """Nothing that could lead to an action was found at the last step; only then is a checkpoint written."""
        return not any(self.streaks[rule.kind] for rule in self.rules if rule.action != "noted")

    @property
    def rollbacks(self) -> list[dict[str, Any]]:
        """The times that this run went back, as they are on record."""
        return [entry for entry in self.run.manifest.get("incidents", []) if entry.get("action") == "rolled back"]

    @property
    def rate(self) -> float:
        """What the learning rate is multiplied by: ``rate_factor`` for each time that the run went back."""
        return self.table.rate_factor ** len(self.rollbacks)

    def refuses(self, row: Row) -> bool:
        """Whether a batch is to be left out, asked before the optimizer steps.

        It is when its loss or gradient is not finite; and when it spikes at a place where the run went back before, or
        in one go from there: then it was not the rate.

        Args:
            row: the step and its metrics so far.
        """
        wary = self._is_wary(row)
        refused = any(
            rule.look(self.table, self.past, row) for rule in self.rules if rule.batch and (wary or rule.kind == NOT_FINITE)
        )
        self._refused = row["step"] if refused else 0
        return refused

    def observe(self, row: Row) -> Action | None:
        """Judge a step by its metrics; what is found goes on record.

        Returns:
            "rolled back" or "stopped" if that is what has to be done now; else None.
        """
        found, limits = self._judge(row), {rule.kind: self._limit(rule) for rule in self.rules}
        due = [(rule, evidence) for rule, evidence in found if self.streaks[rule.kind] == limits[rule.kind]]
        acts = [rule.action for rule, _ in due if rule.action != "noted"]
        act: Action | None = "stopped" if "stopped" in acts else acts[0] if acts else None
        if act == "rolled back" and len(self.rollbacks) >= self.table.rollbacks:
            act = "stopped"
        for rule, evidence in found:
            count = self.streaks[rule.kind]
            skipped = rule.batch and self._refused == row["step"]
            if (rule, evidence) not in due and (skipped or (rule.at_once and count == 1)):
                self.record(rule.kind, row["step"], "skipped" if skipped else "noted", **evidence)
            elif (rule, evidence) in due and rule.action == "noted":
                self.record(rule.kind, row["step"], "noted", in_a_row=count, **evidence)
        for rule, evidence in due if act else []:
            if rule.action != "noted":
                self.record(rule.kind, row["step"], act or "noted", in_a_row=self.streaks[rule.kind], **evidence)
                break  # one cause is enough: each entry of this kind counts as one time
        return act

    def record(self, kind: str, step: int, action: Action, **evidence: Any) -> None:
        """Put an incident on record, once: a run that goes on after a kill meets the same one again."""
        entry = {"kind": kind, "step": step, "action": action, **evidence, "rollbacks": len(self.rollbacks)}
        known = ({k: v for k, v in old.items() if k != "time"} for old in self.run.manifest.get("incidents", []))
        if entry not in known:
            self.run.incident(**entry)

    def fault(self) -> TrainingFault:
        """What is said when the run stops: the last incident, and what to do."""
        last = [entry for entry in self.run.manifest["incidents"] if entry.get("action") == "stopped"][-1]
        seen = ", ".join(f"{k} {_short(v)}" for k, v in last.items() if k not in ("time", "kind", "step", "action"))
        return TrainingFault(
            f"{last['kind']} at step {last['step']} of {self.run.path} ({seen})\n"
            "  to do: see its incidents in manifest.json or the report, and docs/guard.md; the last good checkpoint is kept."
            " The same recipe stops here again: change what made it, or the value in [guard]"
        )

    def _judge(self, row: Row) -> list[tuple[Rule, Evidence]]:
        self._wary = self._is_wary(row)
        found = []
        for rule in self.rules:
            if not all(isinstance(row.get(key), int | float) for key in rule.needs):
                continue  # nothing is said, so that nothing changes
            evidence = rule.look(self.table, self.past, row)
            self.streaks[rule.kind] = self.streaks[rule.kind] + 1 if evidence else 0
            found += [(rule, evidence)] if evidence else []
        if self.calm:
            self.past.recent.append(row)
            if len(self.past.first) < FIRST:
                self.past.first.append(row)
        return found

    def _is_wary(self, row: Row) -> bool:
        """Up to the step from which the run went back, and on until it is calm."""
        before = max((entry["step"] for entry in self.rollbacks), default=0)
        return row["step"] <= before or (self._wary and not self.calm)

    def _limit(self, rule: Rule) -> int:
        if rule.batch and self._wary:
            return self.table.skips
        return getattr(self.table, rule.patience) if rule.patience else 1


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
