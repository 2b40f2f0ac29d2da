"""Run directories: the record of what was made, from what, with which values and why.

``runs/<recipe>/<stage>-<fingerprint>/`` holds ``manifest.json``, ``metrics.jsonl``, ``model/``, rows and checkpoints;
``runs/<recipe>/kept/`` the data and the code that the runs read, each content once.
The fingerprint hashes the stage's resolved settings, the content of its data, its parents' fingerprints and the code it
can reach. It is known before the stage runs, so every directory of a recipe can be named without loading a model. Same
fingerprint: nothing to do. Interrupted: the stage resumes. Anything changed: a new directory; nothing is overwritten.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from truthward import provenance, ranks
from truthward.errors import UserError
from truthward.fingerprint import by_content, code_of, digest, hash_code, hash_path
from truthward.reading import parse_json, read_text
from truthward.recipe import DATA_KEYS, eval_paths, guard_settings, judge_settings, ppo_base, ppo_paths, settings
from truthward.recorded import require_manifest
from truthward.redaction import clean, without_secrets
from truthward.tables import MODEL_STAGES, Recipe

CODE = {  # stage -> module; the others are their own name
    "base": "truthward.base",
    "distill": "constitution.distill",
    "dpo": "rl.dpo",
    "ppo": "rl.ppo",
}
KEPT = "kept"  # beside the run directories: data and code as they were, by content hash
TRAINED = ("sft", "distill", "reward", "dpo", "ppo")  # stages that the guard watches


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
    """Write a JSON value as :func:`write_text` does, without the secrets in it."""
    write_text(path, json.dumps(clean(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


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


@contextlib.contextmanager
def joint_directory(path: Path) -> Iterator[Path]:
    """As :func:`whole_directory`, written into by all ranks: it becomes ``path`` when the block has ended well on each.

    Raises:
        OSError: another rank could not write its part; nothing is left of the others'.
    """
    scratch = path.with_name(f".{path.name}.writing")

    def begin() -> None:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)

    def end() -> None:
        shutil.rmtree(path, ignore_errors=True)
        os.replace(scratch, path)

    ranks.lead(begin)
    try:
        with ranks.agreed():
            yield scratch
    except Exception:
        if ranks.first():
            shutil.rmtree(scratch, ignore_errors=True)
        raise
    ranks.lead(end)


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


def plan_evals(recipe: Recipe, model: Run) -> Planned:
    """The evals of a model that is there, as :func:`plan` has them where the recipe made it."""
    planned: dict[str, Planned] = {}
    _add(planned, recipe, f"evals-{model.stage}", "evals", {"model": model.path.name})
    return planned[f"evals-{model.stage}"]


def _add(planned: dict[str, Planned], recipe: Recipe, name: str, stage: str, parents: dict[str, str]) -> None:
    values, compute = settings(recipe, "model" if stage == "base" else stage), settings(recipe, "model")
    if stage == "constitution":
        values = {**values, "judge": judge_settings(recipe)}
    if stage in TRAINED:
        values = {**values, "guard": guard_settings(recipe, stage)}
    data = {path: hash_path(path) for path in dict.fromkeys(_reads(recipe, name, stage))}
    if stage != "base":
        del compute["base"]  # it counts through the parents
    told = [by_content(values, data), by_content(compute, data)]
    code = hash_code(CODE.get(stage, stage))
    value = digest([stage, recipe.seed, *told, sorted(data.values()), parents, code])[:10]
    path = Path(recipe.runs) / recipe.name / f"{stage}-{value}"
    planned[name] = Planned(stage, path, parents, data, values, value)


def _reads(recipe: Recipe, name: str, stage: str) -> list[str]:
    """The files and folders that a stage reads beside its parents' runs."""
    values = settings(recipe, "model" if stage == "base" else stage)
    paths = [p for key in sorted(DATA_KEYS & values.keys()) for p in as_list(values[key]) if p and p != "constitution"]
    if stage == "constitution":
        paths.append(recipe.judge.bank)
        folder = recipe.judge.model not in MODEL_STAGES and not recipe.judge.base_url and os.path.isdir(recipe.judge.model)
        paths += [recipe.judge.model] if folder else []
    if stage == "evals":
        paths += eval_paths(recipe, name.removeprefix("evals-"))
    if stage == "base" and os.path.isdir(recipe.model.base):
        paths.append(recipe.model.base)
    if stage == "ppo":
        paths += ppo_paths(recipe)
    return paths


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
            UserError: it has no manifest, or one that is not JSON or not of a manifest's form.
        """
        path = Path(path)
        file = path / "manifest.json"
        if not os.path.isfile(file):
            raise UserError("this is not a run directory: no manifest.json", where=str(path), fix="name one under runs/")
        manifest = parse_json(read_text(file), str(file))
        require_manifest(manifest, str(file))
        return cls(path, manifest)

    @classmethod
    def find(cls, path: Path) -> Run:
        """A run directory, with an empty manifest where nothing has been run yet."""
        return cls.load(path) if os.path.exists(path / "manifest.json") else cls(path)

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
            UserError: there is none, it is not there, or it is not complete.
        """
        name = self.manifest["parents"].get(role)
        if name is None:
            raise UserError(f"the run has no parent {role}", where=str(self.path), fix="name a run that came from one")
        return complete(self.path.parent / name)

    def record(self, **values: Any) -> None:
        """Add to the manifest and write it; while the run goes on, with the seconds that it has taken so far.

        The first rank alone writes.
        """
        self.manifest |= clean(values)
        self.manifest |= {"seconds": self._seconds()} if self.manifest.get("status") == "running" else {}
        if ranks.first():
            write_json(self.path / "manifest.json", self.manifest)

    def incident(self, kind: str, **details: Any) -> None:
        """Put on record that something went wrong or was set aside, with its evidence."""
        entry = {"time": provenance.now(), "kind": kind, **details}
        self.record(incidents=[*self.manifest.get("incidents", []), entry])

    def override(self, reason: str) -> None:
        """Put on record that somebody goes on though the gate says stop; it stays in this manifest."""
        entry = {"reason": reason, "who": provenance.who(), "time": provenance.now()}
        self.record(gate={**self.manifest["gate"], "override": entry})

    def finish(self, **values: Any) -> None:
        """The last write of a stage: everything it made is on disk before ``complete`` is."""
        closing = {"seconds": self._seconds(), "peak_memory_gb": peak_memory_gb(), "finished": provenance.now()}
        self.record(**values, **closing, status="complete")

    def _seconds(self) -> float:
        return round(self.manifest.get("seconds_before", 0) + time.monotonic() - self.entered, 1)


@contextlib.contextmanager
def open_run(recipe: Recipe, name: str) -> Iterator[Run]:
    """Enter the run directory of a planned stage, made or resumed; only one process at a time, or all ranks of one launch.

    Args:
        recipe: the resolved recipe.
        name: a stage, or ``evals-<stage>``.

    Raises:
        UserError: the stage is not in the recipe, a parent is missing, or another process is in it.
    """
    planned = plan(recipe)
    if name not in planned:
        raise UserError(f"the recipe has no stage {name}", where=recipe.name, fix=f"its stages: {', '.join(recipe.stages)}")
    with contextlib.ExitStack() as held:
        manifest = ranks.lead(lambda: held.enter_context(entered(recipe, planned[name])).manifest)
        yield Run(planned[name].path, manifest)


@contextlib.contextmanager
def entered(recipe: Recipe, this: Planned) -> Iterator[Run]:
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
            started=run.manifest.get("started", provenance.now()),
            resumed=run.manifest.get("resumed", -1) + 1,
            seconds_before=run.manifest.get("seconds", 0.0) + _unrecorded(this.path),
            incidents=run.manifest.get("incidents", []),
            sources=provenance.sources(this.data),
            code=_keep(this, run.path.parent / KEPT),
            **provenance.launch(recipe.origin),
            **provenance.surroundings(),
        )
    return run


def _keep(this: Planned, folder: Path) -> str:
    """Copy what the run reads and the code it runs into the record, each content once and without secrets.

    Returns:
        the hash of the code.
    """
    for path, value in this.data.items():
        target = folder / "data" / value[:16]
        if not target.exists() and (files := provenance.keepable(Path(path))):
            with whole_directory(target) as copy:
                for file in files:
                    to = copy / (file.relative_to(path) if file != Path(path) else file.name)
                    to.parent.mkdir(parents=True, exist_ok=True)
                    to.write_text(without_secrets(file.read_text(encoding="utf-8", errors="replace")), encoding="utf-8")
    module = CODE.get(this.stage, this.stage)
    code = hash_code(module)
    if not (folder / "code" / f"{code[:16]}.json").exists():
        write_json(folder / "code" / f"{code[:16]}.json", code_of(module))
    return code


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


def _unrecorded(path: Path) -> float:
    """Seconds between the manifest's last write and the last of all: what a killed run did that is not on record."""
    times = {p: p.stat().st_mtime for p in path.rglob("*") if p.name != ".lock"}
    manifest = times.get(path / "manifest.json")
    return 0.0 if manifest is None else max(times.values()) - manifest


def peak_memory_gb() -> float:
    """The most that this process has held so far."""
    import resource

    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
