"""All run directories below a folder: found by name, walked by descent, asked for values, scores and what was kept."""

from __future__ import annotations

import contextlib
import functools
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from truthward.errors import UserError
from truthward.ledger import KEPT, Run
from truthward.reading import parse_json, read_text
from truthward.record.settings import Setting, recipe_settings
from truthward.recorded import read_evals, require_manifest
from truthward.tables import Recipe

STAGE_OF = {"judge": "constitution"}  # tables that another stage reads; the others are read by the stage of their name
COMMON = ("", "model", "launch")  # tables that every stage reads
NAMES = ("name", "runs")  # where a run is kept, which nothing depends on
SHORTEST = 3  # letters of a name that may stand for the whole


@functools.lru_cache(maxsize=4096)
def _read(path: Path, written: int) -> Run:
    return Run.load(path)


def load(path: Path) -> Run:
    """A run as :meth:`Run.load` reads it, read once for as long as its manifest stays as it is.

    Raises:
        UserError: it has no manifest, or one that our commands can't go by.
    """
    manifest = path / "manifest.json"
    return _read(path, manifest.stat().st_mtime_ns) if manifest.is_file() else Run.load(path)


def lineage(run: Run) -> list[Run]:
    """A run and every run that it came from in any role, each after its parents; lost directories are left out."""
    found: dict[str, Run] = {}

    def visit(this: Run) -> None:
        found[this.path.name] = this  # first, so that a circle in damaged manifests ends
        for name in this.manifest.get("parents", {}).values():
            if name not in found:
                with contextlib.suppress(UserError):
                    visit(load(this.path.parent / name))
        found[this.path.name] = found.pop(this.path.name)

    visit(run)
    return list(found.values())


def newest_evals(run: Run) -> dict[str, Any] | None:
    """The newest complete evals of this very model."""
    for found in reversed(evals_runs(run)):
        with contextlib.suppress(UserError):  # of another version, or damaged
            return read_evals(found.path / "evals.json")
    return None


def evals_runs(run: Run) -> list[Run]:
    """Complete runs of the evals of this model, with their gates' verdicts; the oldest first."""
    found = []
    for path in run.path.parent.glob("evals-*/manifest.json"):
        with contextlib.suppress(UserError):
            other = load(path.parent)
            if (
                other.done
                and other.manifest["parents"].get("model") == run.path.name
                and (path.parent / "evals.json").exists()
            ):
                found.append(other)
    return sorted(found, key=lambda r: r.manifest.get("finished", ""))


def kept_data(run: Run, path: str) -> Path | None:
    """The copy of a source of data as this run read it, if one was kept."""
    value = run.manifest.get("data", {}).get(path, "")
    copy = run.path.parent / KEPT / "data" / value[:16]
    return copy if re.fullmatch("[0-9a-f]+", value) and copy.is_dir() else None


def kept_code(run: Run) -> dict[str, str]:
    """The modules that this run was made by, as they were; empty if they were not kept."""
    path = run.path.parent / KEPT / "code" / f"{run.manifest.get('code', '')[:16]}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


@dataclass
class Archive:
    """Every run directory ``<root>/<recipe>/<stage>-<fingerprint>``; those whose manifest cannot be read are set aside.

    Attributes:
        runs: in the order they were started.
        unreadable: one sentence each.
    """

    root: Path
    runs: list[Run] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for path in sorted(self.root.glob("*/*/manifest.json")):
            try:
                self.runs.append(load(path.parent))
            except UserError as error:
                self.unreadable.append(f"{path}: {error.what}")
        self.runs.sort(key=lambda r: str(r.manifest.get("started", "")))

    def named(self, name: str) -> list[Run]:
        """Runs whose directory begins with this name, as ``ppo-1f2e`` or ``laptop/ppo-1f2e``."""
        recipe, _, short = name.rstrip("/").rpartition("/")
        whole = [r for r in self.runs if r.path.name == short and recipe in ("", r.path.parent.name)]
        stage, dash, value = short.rpartition("-")
        if whole or not (stage and dash and len(value) >= SHORTEST):
            return whole
        return [r for r in self.runs if r.path.name.startswith(short) and recipe in ("", r.path.parent.name)]


def resolve(model: str, runs: str) -> tuple[Run, Archive]:
    """The run that is meant, and the archive it lies in.

    Args:
        model: a run directory, an exported model's folder, or (the beginning of) a run's name below ``runs``.

    Raises:
        UserError: nothing or more than one run is meant, or an exported model's run is not below ``runs``.
    """
    path = Path(model)
    if (path / "manifest.json").is_file():
        run = Run.load(path)
        return run, Archive(path.absolute().parent.parent)
    archive = Archive(Path(runs))
    name = model
    if (path / "truthward.json").is_file():
        name = _exported(path / "truthward.json")
    found = archive.named(name)
    if len(found) != 1:
        known = ", ".join(f"{r.path.parent.name}/{r.path.name}" for r in (found or archive.runs[-6:]))
        what = f"{len(found)} runs are named so" if found else f"there is no run {name}"
        fix = (
            f"name one of {known}"
            if known
            else f"name a run directory, or the folder that holds the runs by --runs (now {runs})"
        )
        raise UserError(what, where=model, fix=fix)
    return found[0], archive


def _exported(path: Path) -> str:
    """The name of the run that an exported model came from."""
    chain = parse_json(read_text(path), str(path))
    made: Any = chain[-1] if isinstance(chain, list) and chain else None
    require_manifest(made, str(path))
    return f"{made['recipe']['name']}/{made['stage']}-{made['fingerprint']}"


# -------------------------------------------------------------------------------------------------- values that a run has


def settings_of(run: Run) -> dict[str, tuple[Setting, Run]]:
    """Every value that this run depends on, by dotted key, with the run that it was set for: itself, or the nearest of the
    table's stage that it came from."""
    nearest = {each.stage: each for each in lineage(run)} | dict.fromkeys(COMMON, run)
    found: dict[str, tuple[Setting, Run]] = {}
    for table in ("", *(name for name in Recipe.model_fields if name != "why")):
        if decided := nearest.get(STAGE_OF.get(table, table)):
            own = [s for s in recipe_settings(decided.manifest["recipe"]) if s.table == table and s.name not in NAMES]
            found |= {s.name: (s, decided) for s in own}
    return found


def author(setting: Setting, run: Run) -> dict[str, str]:
    """``by``, ``at`` and ``commit`` of a reason; who launched the run and when, where the recipe was in no repository."""
    written = run.manifest.get("authors", {}).get(setting.name)
    by = run.manifest.get("launched", {}).get("by", "unknown")
    return written or {"by": by, "at": str(run.manifest.get("started", ""))[:10], "commit": ""}
