"""What a recipe's run directories hold, gathered once for the report and the closing table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from truthward.ledger import Planned, Run, plan
from truthward.record.words import METRICS, interval
from truthward.recorded import read_evals
from truthward.tables import MODEL_STAGES, Recipe

Status = Literal["complete", "unfinished", "not run yet"]
ROLES = {"parent": "against_parent", "base": "against_base"}


@dataclass(frozen=True)
class Seen:
    """A planned run and what is there of it; ``run`` is set only when it is complete."""

    planned: Planned
    status: Status
    run: Run | None
    partial: Run | None  # the run while it is unfinished: its incidents count, its results do not

    @property
    def metrics(self) -> dict[str, Any]:
        return self.run.manifest.get("metrics", {}) if self.run else {}


@dataclass(frozen=True)
class Stage:
    """A stage with its evals, where it has any."""

    name: str
    seen: Seen
    evals_seen: Seen | None
    evals: dict[str, Any] | None

    @property
    def is_model(self) -> bool:
        return self.name in MODEL_STAGES

    @property
    def state(self) -> str:
        """In words, what is missing; empty when nothing is."""
        if self.seen.status != "complete":
            return self.seen.status
        if not self.is_model or self.evals:
            return ""
        return "not scored: not in evals.models" if self.evals_seen is None else f"evals {self.evals_seen.status}"

    @property
    def gate(self) -> str:
        """The gate's verdict in a few words."""
        gate = (self.evals_seen.run.manifest.get("gate") or {}) if self.evals_seen and self.evals_seen.run else {}
        if not gate or not self.compared("parent"):
            return "-"
        worse = ", ".join(METRICS.get(m, m) for m in gate.get("worse", {}))
        if worse:
            done = "overridden" if gate.get("override") else "blocked" if gate["mode"] == "block" else "warned"
            return f"{done}: worse {worse}"
        return "passed" if gate.get("gated") else "off"

    def compared(self, role: Literal["parent", "base"]) -> dict[str, Any] | None:
        """The paired comparison with the stage's parent or with the base."""
        return (self.evals or {}).get(ROLES[role])


@dataclass(frozen=True)
class View:
    """All stages of a recipe in order."""

    recipe: Recipe
    stages: list[Stage]

    @property
    def scored(self) -> list[Stage]:
        return [s for s in self.stages if s.evals]

    @property
    def base(self) -> Stage | None:
        return next((s for s in self.scored if s.name == "base"), None)

    @property
    def final(self) -> Stage | None:
        """The last trained stage that is complete and scored."""
        return next((s for s in reversed(self.scored) if s.name != "base"), None)

    def stage(self, name: str) -> Stage | None:
        return next((s for s in self.stages if s.name == name), None)


def gather(recipe: Recipe) -> View:
    """Look at every run directory of the recipe's plan.

    Raises:
        UserError: a data path of the recipe does not exist, or a manifest or an ``evals.json`` is at fault.
    """
    seen = {name: _look(planned) for name, planned in plan(recipe).items()}
    stages = []
    for name in recipe.stages:
        evals = seen.get(f"evals-{name}")
        stages.append(Stage(name, seen[name], evals, _read_evals(evals)))
    return View(recipe, stages)


def _look(planned: Planned) -> Seen:
    run = Run.find(planned.path)
    if not run.manifest:
        return Seen(planned, "not run yet", None, None)
    return Seen(planned, "complete", run, None) if run.done else Seen(planned, "unfinished", None, run)


def _read_evals(seen: Seen | None) -> dict[str, Any] | None:
    path = seen.run.path / "evals.json" if seen and seen.run else None
    return read_evals(path) if path and path.exists() else None


# ------------------------------------------------------------------------------------------------------------- words


def duration(seconds: float | None) -> str:
    """``41 s``, ``3 min 20 s`` or ``1 h 05 min``."""
    if seconds is None:
        return "-"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60:02d} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def memory(gigabytes: float | None) -> str:
    return "-" if gigabytes is None else f"{gigabytes:.1f} GB"


def cost(seen: Seen) -> tuple[str, str]:
    """Time and peak memory of a complete run."""
    manifest = seen.run.manifest if seen.run else {}
    return duration(manifest.get("seconds")), memory(manifest.get("peak_memory_gb"))


def headline(stage: Stage, *, brief: bool = False) -> str:
    """What a stage without a chat model came to: the reward's accuracy, or how many rows were made."""
    metrics = stage.seen.metrics
    accuracy = metrics.get("validation_accuracy")
    if accuracy:
        return f"{'' if brief else 'validation '}accuracy {interval(accuracy)}"
    if brief and "preferences" in metrics:
        return f"{metrics['preferences']} pairs"
    return ", ".join(f"{v} {k}" for k, v in metrics.items() if isinstance(v, int) and not isinstance(v, bool))


def direction(value: dict[str, Any]) -> int:
    """1 when a difference's whole interval is above zero, -1 when it is below, 0 when zero is inside."""
    return 1 if value["low"] > 0 else -1 if value["high"] < 0 else 0


def effect(compared: dict[str, Any]) -> str:
    """What a stage did by its three paired differences: helped, hurt, cut both ways, or nothing measurable."""
    found = {direction(compared["differences"][m]) for m in METRICS} - {0}
    return {(): "none", (1,): "helped", (-1,): "hurt", (-1, 1): "mixed"}[tuple(sorted(found))]


def listed(parts: list[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}" if parts else ""
