"""Run directories: the record of what was made, from what, with which values and why.

``runs/<recipe>/<stage>-<fingerprint>/`` holds ``manifest.json``, ``metrics.jsonl``, ``model/``, rows and checkpoints.
The fingerprint hashes the stage's resolved settings, the content of its data, its parents' fingerprints and the code it
can reach. It is known before the stage runs, so every directory of a recipe can be named without loading a model. Same
fingerprint: nothing to do. Interrupted: the stage resumes. Anything changed: a new directory; nothing is overwritten.
"""

from __future__ import annotations

import ast
import contextlib
import fcntl
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from truthward.errors import UserError
from truthward.recipe import DATA_KEYS, eval_paths, guard_settings, judge_settings, ppo_base, ppo_paths, settings
from truthward.tables import MODEL_STAGES, Recipe

CODE = {  # stage -> module; the others are their own name
    "base": "truthward.base",
    "distill": "constitution.distill",
    "dpo": "rl.dpo",
    "ppo": "rl.ppo",
}
TRAINED = ("sft", "distill", "reward", "dpo", "ppo")  # stages that the guard watches
OUR_PACKAGES = ("truthward", "sft", "reward", "constitution", "rl", "evals")
RECORDED_VERSIONS = ("torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "datasets", "safetensors")


# ---------------------------------------------------------------------------------------------------- atomic writing


def write_text(path: Path, text: str) -> None:
    """Write all of a file or none of it, even when killed between any two instructions."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(scratch, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except OSError:
        scratch.unlink(missing_ok=True)  # a full disk needs the room
        raise


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


@contextlib.contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """A scratch directory that becomes ``path`` when the block ends well, in one rename."""
    scratch = path.with_name(f".{path.name}.writing")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
        shutil.rmtree(path, ignore_errors=True)
        os.replace(scratch, path)
    except Exception:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


# ------------------------------------------------------------------------------------------------------ fingerprints


def digest(value: Any) -> str:
    """SHA-256 of a JSON value with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


@functools.cache
def hash_path(path: str) -> str:
    """SHA-256 of a file, or of a directory's file names and contents.

    Raises:
        UserError: nothing is there.
    """
    root = Path(path)
    if not root.exists():
        raise UserError("there is no such file or directory", where=path, fix="mend the path in the recipe")
    files = sorted(p for p in root.rglob("*") if p.is_file()) if root.is_dir() else [root]
    hasher = hashlib.sha256()
    for file in files:
        hasher.update(str(file.relative_to(root)).encode() + b"\0")
        hasher.update(hashlib.sha256(file.read_bytes()).digest())
    return hasher.hexdigest()


@functools.cache
def hash_code(module: str) -> str:
    """SHA-256 over the source of a module and of every module of this project that it imports, at any remove."""
    sources: dict[str, str] = {}
    todo = [module, f"{module}.__main__"]
    while todo:
        name = todo.pop()
        file = None if name in sources else _source_file(name)
        if file:
            sources[name] = file.read_text(encoding="utf-8")
            todo += _imports(sources[name])
    return digest(sources)


def _imports(source: str) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names


def _source_file(module: str) -> Path | None:
    """The file of one of our modules, found without importing anything; None for other names."""
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top) if top in OUR_PACKAGES else None
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0], *rest)
    return next((f for f in (path / "__init__.py", path.with_suffix(".py")) if f.is_file()), None)


# -------------------------------------------------------------------------------------------------------------- plan


@dataclass(frozen=True)
class Planned:
    """What one stage will read and where it will write; known before anything runs."""

    stage: str
    path: Path
    parents: dict[str, str]  # role -> directory name of the run it comes from
    data: dict[str, str]  # recipe key or path -> SHA-256
    settings: dict[str, Any]
    fingerprint: str


def plan(recipe: Recipe) -> dict[str, Planned]:
    """Every stage of a recipe (and ``evals-<stage>`` for every scored one) with its run directory.

    Raises:
        UserError: a data path does not exist.
    """
    planned: dict[str, Planned] = {}
    for stage in recipe.stages:
        parents = {}
        if stage != "base":
            parents["model"] = getattr(recipe, stage).parent
        if stage == "constitution" and recipe.judge.model in planned and not recipe.judge.base_url:
            parents["judge"] = recipe.judge.model
        if stage in ("reward", "dpo") and "constitution" in getattr(recipe, stage).preferences:
            parents["preferences"] = "constitution"
        if stage == "ppo":
            parents["model"] = ppo_base(recipe)
            if "reward" in recipe.ppo.rewards:
                parents["reward"] = "reward"
            if recipe.ppo.parent != parents["model"]:
                parents["start"] = recipe.ppo.parent  # the policy starts as a copy of this stage's adapter
        _add(planned, recipe, stage, stage, {role: planned[name].path.name for role, name in parents.items()})
        if stage in recipe.evals.models and stage in MODEL_STAGES:
            _add(planned, recipe, f"evals-{stage}", "evals", {"model": planned[stage].path.name})
    return planned


def _add(planned: dict[str, Planned], recipe: Recipe, name: str, stage: str, parents: dict[str, str]) -> None:
    values = settings(recipe, "model" if stage == "base" else stage)
    paths = [p for key in sorted(DATA_KEYS & values.keys()) for p in as_list(values[key]) if p != "constitution"]
    if stage == "constitution":
        values = {**values, "judge": judge_settings(recipe)}
        paths.append(recipe.judge.bank)
    if stage in TRAINED:
        values = {**values, "guard": guard_settings(recipe, stage)}
    if stage == "evals":
        paths += [p for p in eval_paths(recipe, name.removeprefix("evals-")) if p not in paths]
    if stage == "base" and Path(recipe.model.base).is_dir():
        paths.append(recipe.model.base)
    if stage == "ppo":
        paths += ppo_paths(recipe)
    data = {path: hash_path(path) for path in paths}
    code = hash_code(CODE.get(stage, stage))
    value = digest([stage, recipe.seed, values, settings(recipe, "model"), sorted(data.values()), parents, code])[:10]
    path = Path(recipe.runs) / recipe.name / f"{stage}-{value}"
    planned[name] = Planned(stage, path, parents, data, values, value)


def as_list(value: str | list[str]) -> list[str]:
    """Paths of a recipe's key that holds one or several."""
    return value if isinstance(value, list) else [value]


# --------------------------------------------------------------------------------------------------------------- run


@dataclass
class Run:
    """One run directory and its manifest."""

    path: Path
    manifest: dict[str, Any] = field(default_factory=dict)
    entered: float = field(default_factory=time.monotonic, compare=False)  # a clock that nobody sets

    @classmethod
    def load(cls, path: str | Path) -> Run:
        """Read a run directory.

        Raises:
            UserError: it has no manifest, or one that is not JSON.
        """
        path = Path(path)
        try:
            return cls(path, json.loads((path / "manifest.json").read_text(encoding="utf-8")))
        except FileNotFoundError as error:
            raise UserError("this is not a run directory: no manifest.json", where=str(path)) from error
        except ValueError as error:
            raise UserError(f"not valid JSON: {error}", where=str(path / "manifest.json")) from error

    @classmethod
    def find(cls, path: Path) -> Run:
        """A run directory, with an empty manifest where nothing has been run yet."""
        return cls.load(path) if (path / "manifest.json").exists() else cls(path)

    @property
    def done(self) -> bool:
        return self.manifest.get("status") == "complete"

    @property
    def stage(self) -> str:
        return self.manifest["stage"]

    @property
    def model_dir(self) -> Path:
        return self.path / "model"

    def parent(self, role: str) -> Run:
        """The run that this one started from, or took its preference model or rows from.

        Raises:
            UserError: it is not there or not complete.
        """
        name = self.manifest["parents"][role]
        return complete(self.path.parent / name)

    def record(self, **values: Any) -> None:
        """Add to the manifest and write it; while the run goes on, with the seconds that it has taken so far."""
        self.manifest |= values
        self.manifest |= {"seconds": self._seconds()} if self.manifest.get("status") == "running" else {}
        write_json(self.path / "manifest.json", self.manifest)

    def incident(self, kind: str, **details: Any) -> None:
        """Put on record that something went wrong or was set aside, with its evidence."""
        entry = {"time": _now(), "kind": kind, **details}
        self.record(incidents=[*self.manifest.get("incidents", []), entry])

    def override(self, reason: str) -> None:
        """Put on record that somebody goes on though the gate says stop; it stays in this manifest."""
        entry = {"reason": reason, "who": _git("config", "user.name") or "unknown", "time": _now()}
        self.record(gate={**self.manifest["gate"], "override": entry})

    def finish(self, **values: Any) -> None:
        """The last write of a stage: everything it made is on disk before ``complete`` is."""
        closing = {"seconds": self._seconds(), "peak_memory_gb": _peak_memory_gb(), "finished": _now()}
        self.record(**values, **closing, status="complete")

    def _seconds(self) -> float:
        return round(self.manifest.get("seconds_before", 0) + time.monotonic() - self.entered, 1)


@contextlib.contextmanager
def open_run(recipe: Recipe, name: str) -> Iterator[Run]:
    """Enter the run directory of a planned stage, made or resumed; only one process at a time.

    Args:
        recipe: the resolved recipe.
        name: a stage, or ``evals-<stage>``.

    Raises:
        UserError: the stage is not in the recipe, a parent is missing, or another process is in it.
    """
    planned = plan(recipe)
    if name not in planned:
        raise UserError(f"the recipe has no stage {name}", where=recipe.name, fix=f"its stages: {', '.join(recipe.stages)}")
    this = planned[name]
    for parent in this.parents.values():
        complete(this.path.parent / parent)
    this.path.mkdir(parents=True, exist_ok=True)
    with open(this.path / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError("another process is running this stage", where=str(this.path), fix="wait for it") from None
        yield _start(recipe, this)


def _start(recipe: Recipe, this: Planned) -> Run:
    run = Run.find(this.path)
    if not run.done:
        run.record(
            stage=this.stage,
            status="running",
            fingerprint=this.fingerprint,
            recipe=recipe.model_dump(mode="json"),
            parents=this.parents,
            data=this.data,
            seed=recipe.seed,
            started=run.manifest.get("started", _now()),
            resumed=run.manifest.get("resumed", -1) + 1,
            seconds_before=run.manifest.get("seconds", 0.0) + _unrecorded(this.path),
            incidents=run.manifest.get("incidents", []),
            **provenance(),
        )
    return run


def is_done(path: Path) -> bool:
    """Whether a run directory exists and is complete."""
    return Run.find(path).done


def complete(path: Path) -> Run:
    """A run that another one builds on.

    Raises:
        UserError: it is not there, or not complete.
    """
    run = Run.find(path)
    if not run.done:
        stage = path.name.rpartition("-")[0]
        state = "is not complete" if run.manifest else "has not been run with these settings, data and code"
        first = f"run python -m {CODE.get(stage, stage)} RECIPE first"
        raise UserError(f"stage {stage} {state}", where=str(path), fix=first)
    return run


def provenance() -> dict[str, Any]:
    """Code, packages and machine: what a result depends on beside the recipe and the data."""
    versions = {}
    for package in RECORDED_VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "git": {"commit": _git("rev-parse", "HEAD"), "diff": _git("diff", "HEAD")[:200_000]},
        "packages": versions,
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "python": platform.python_version(), "os": platform.system()},
    }


def _git(*words: str) -> str:
    try:
        root = Path(__file__).parent.parent
        return subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _unrecorded(path: Path) -> float:
    """Seconds between the manifest's last write and the last of all: what a killed run did that is not on record."""
    times = {p: p.stat().st_mtime for p in path.rglob("*") if p.name != ".lock"}
    manifest = times.get(path / "manifest.json")
    return 0.0 if manifest is None else max(times.values()) - manifest


def _peak_memory_gb() -> float:
    import resource

    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
