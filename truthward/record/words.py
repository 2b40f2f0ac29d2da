"""How the record puts things in words: scores, places and commits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from truthward.recorded import TRUTH

METRICS = dict(zip(TRUTH, ("MC1", "MC2", "pairs"), strict=True))  # the scores that lead everywhere


def place(run: Path) -> str:
    """A run directory relative to the runs folder."""
    return f"{run.parent.name}/{run.name}"


def interval(value: dict[str, Any], *, sign: bool = False) -> str:
    """``0.457 [0.40, 0.51]``; with ``sign``, ``+0.020 [-0.031, +0.070]``."""
    if sign:
        return f"{value['mean']:+.3f} [{value['low']:+.3f}, {value['high']:+.3f}]"
    return f"{value['mean']:.3f} [{value['low']:.2f}, {value['high']:.2f}]"


def commit(manifest: dict[str, Any]) -> str:
    """The first 12 characters of a run's commit, and whether files differed from it."""
    git = manifest.get("git", {})
    return (git.get("commit", "")[:12] or "no commit") + (" + changes" if git.get("diff") else "")
