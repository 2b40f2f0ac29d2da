"""Metrics: ``metrics.jsonl`` in the run directory always, and wandb beside it (offline unless logged in)."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from truthward import ranks
from truthward.console import plain, say
from truthward.errors import UserError
from truthward.ledger import Run, write_text
from truthward.reading import parse_json
from truthward.redaction import clean
from truthward.tables import Recipe

TOLD = ("recipe", "fingerprint", "parents", "data", "sources", "authors", "launched", "code", "git", "packages", "machine")


def read_metrics(run: Run) -> list[dict[str, Any]]:
    """Every whole line of a run's metrics; a line cut off by a crash, or that is no row, is passed over."""
    rows = []
    with contextlib.suppress(FileNotFoundError):
        for line in (run.path / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(UserError):
                row = parse_json(line, "")
                rows += [row] if isinstance(row, dict) and isinstance(row.get("step"), int) else []
    return rows


class Tracker:
    """Writes a step's metrics to the run's ``metrics.jsonl`` and to wandb; on ranks other than the first, nothing."""

    def __init__(self, run: Run, wandb_run: Any) -> None:
        self.run, self.wandb = run, wandb_run
        self.path: Path = run.path / "metrics.jsonl"

    def resume_at(self, step: int) -> None:
        """Forget metrics of steps that the checkpoint does not hold; they will be made again."""
        kept = [row for row in read_metrics(self.run) if row["step"] <= step]
        if ranks.first():
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Add one row; a number that is not finite is kept as null."""
        if not ranks.first():
            return
        row = clean({"step": step, **{k: _finite(v) for k, v in metrics.items()}})
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self.wandb is not None:
            with _spared("log"):
                self.wandb.log(clean(metrics), step=step)


@contextlib.contextmanager
def tracked(recipe: Recipe, run: Run) -> Iterator[Tracker]:
    """A tracker; in wandb, one group a recipe and one run a stage, whose configuration leads back to the run directory.

    A run that was finished within the block leaves its results in wandb's summary and its manifest as an artifact, which
    names those of its parents. wandb is online when logged in, offline otherwise, off with ``WANDB_MODE=disabled``.
    """
    tracker = Tracker(run, None)
    with _spared("start"):
        tracker.wandb = _wandb(recipe, run) if ranks.first() else None
    try:
        yield tracker
    finally:
        if tracker.wandb is not None:
            with _spared("finish"):
                if run.done:
                    _publish(run, tracker.wandb)
                tracker.wandb.finish()


@contextlib.contextmanager
def _spared(what: str) -> Iterator[None]:
    """A fault of wandb is said and passed over: it must not cost a run whose record is on disk."""
    try:
        yield
    except Exception as error:
        say(f"  [yellow]warning[/]: wandb could not {what}: {type(error).__name__}: {plain(error)}")


def _wandb(recipe: Recipe, run: Run) -> Any:
    mode = os.environ.get("WANDB_MODE") or ("online" if _logged_in() else "offline")
    if mode == "disabled":
        return None
    os.environ.setdefault("WANDB_DISABLE_WEAVE", "true")  # it would advertise itself, and trace what a judge is asked
    import wandb

    return wandb.init(
        project="truthward",
        group=recipe.name,
        name=run.path.name,
        id=run.path.name,
        resume="allow" if mode == "online" else None,
        mode=mode,  # type: ignore[arg-type]
        dir=str(run.path),
        config={key: run.manifest.get(key) for key in TOLD} | {"run": f"{run.path.parent.name}/{run.path.name}"},
        settings=wandb.Settings(silent=True, x_disable_stats=True, x_disable_meta=True, disable_git=True, console="off"),
    )


def _publish(run: Run, target: Any) -> None:
    """Results into the summary, the manifest as an artifact; where wandb is online, linked to those of its parents."""
    import wandb

    target.summary.update(dict(_flat(run.manifest.get("metrics", {}))))
    parents = run.manifest["parents"]
    for name in parents.values() if not target.offline else []:
        with _spared(f"link {name}"):
            target.use_artifact(f"{name}:latest")
    about = {"stage": run.stage, "fingerprint": run.manifest["fingerprint"], "parents": parents}
    artifact = wandb.Artifact(run.path.name, type="run", metadata=about)
    for file in ("manifest.json", "evals.json"):
        if (run.path / file).is_file():
            artifact.add_file(str(run.path / file))
    target.log_artifact(artifact)


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}/")
        elif isinstance(value, int | float | str):
            yield prefix + key, value


def _logged_in() -> bool:
    netrc = Path.home() / ".netrc"
    with contextlib.suppress(OSError):
        return "WANDB_API_KEY" in os.environ or "api.wandb.ai" in netrc.read_text()
    return "WANDB_API_KEY" in os.environ


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
