"""Fingerprints: what a result is named after, which is what its data hold and what its code says.

How a path is written does not count, nor where it leads: only the name at its end and what is there. Code counts with
every module of this project that it imports, at any remove, found without importing anything.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.machinery
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

from truthward.errors import UserError

OUR_PACKAGES = ("truthward", "sft", "reward", "constitution", "rl", "evals")


def digest(value: Any) -> str:
    """SHA-256 of a JSON value with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def files_of(path: Path) -> list[Path]:
    """A file by itself, or every file of a folder, in the order of their names."""
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


@functools.cache
def hash_path(path: str) -> str:
    """SHA-256 of a file, or of a directory's file names and contents.

    Raises:
        UserError: nothing is there.
    """
    root = Path(path)
    if not (os.path.isfile(path) or os.path.isdir(path)):
        raise UserError("there is no such file or directory", where=path, fix="mend the path in the recipe")
    hasher = hashlib.sha256()
    for file in files_of(root):
        hasher.update(str(file.relative_to(root)).encode() + b"\0")
        hasher.update(hashlib.sha256(file.read_bytes()).digest())
    return hasher.hexdigest()


@functools.cache
def code_of(module: str) -> dict[str, str]:
    """The source of a module and of every module of this project that it imports, at any remove, by module name."""
    sources: dict[str, str] = {}
    todo = [module, f"{module}.__main__"]
    while todo:
        name = todo.pop()
        file = None if name in sources else _source_file(name)
        if file:
            sources[name] = file.read_text(encoding="utf-8")
            todo += _imports(sources[name])
    return sources


@functools.cache
def hash_code(module: str) -> str:
    """SHA-256 over :func:`code_of`."""
    return digest(code_of(module))


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
    top = module.split(".")[0]
    spec = importlib.util.find_spec(top) if top in OUR_PACKAGES else None
    return _within(spec, module) if spec else None


def _within(spec: importlib.machinery.ModuleSpec, module: str) -> Path | None:
    """The file of a module of a package, or of a module that is none; None where there is no source."""
    rest = module.split(".")[1:]
    if not spec.submodule_search_locations:
        return Path(spec.origin) if not rest and spec.origin and os.path.isfile(spec.origin) else None
    path = Path(spec.submodule_search_locations[0], *rest)
    return next((f for f in (path / "__init__.py", path.with_suffix(".py")) if f.is_file()), None)


def named_path(source: str) -> str:
    """The file or folder behind one of PPO's rewards: ``file.py:function``, ``package.module:function`` or a folder.

    A module is looked for as Python will look for it, in the working directory first, and not imported. Empty where
    nothing is found, as of a hub id.
    """
    place = source.rpartition(":")[0] or source
    if os.path.exists(place):
        return place
    if ":" not in source or not all(part.isidentifier() for part in place.split(".")):
        return ""
    spec = importlib.machinery.PathFinder.find_spec(place.split(".")[0], [os.getcwd(), *sys.path])
    file = _within(spec, place) if spec else None
    return os.path.relpath(file) if file and file.is_relative_to(Path.cwd()) else str(file or "")


# ---------------------------------------------------------------------------------------------------------- settings


def by_content(values: dict[str, Any], data: dict[str, str]) -> dict[str, Any]:
    """Settings with the name and the hash of every file and folder in place of the path to it.

    The name counts because code may go by it (``revisions.jsonl``, ``.csv``).

    Args:
        data: path -> hash of its content.
    """

    def told(value: Any) -> Any:
        if isinstance(value, dict):
            return by_content(value, data)
        if isinstance(value, list):
            return [told(one) for one in value]
        path = value if value in data else named_path(value) if isinstance(value, str) and ":" in value else ""
        if path not in data:
            return value
        return [os.path.basename(os.path.abspath(path)), data[path], value.removeprefix(path)]

    return {key: told(value) for key, value in values.items() if key != "banks"}  # those that are read are in the data
