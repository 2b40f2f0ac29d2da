"""PPO's checkpoint: everything the next iteration depends on, at an iteration's boundary, without pickles.

Rollouts are seeded by (seed, iteration, prompt), passes by (seed, iteration, pass), and the rate follows from the step,
so no generator state needs saving and a resumed run equals an undisturbed one bit for bit.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from truthward import ranks, shards
from truthward.guard.storage import newest_whole
from truthward.ledger import Run, joint_directory, write_json


@dataclass
class Progress:
    """Where a run stands: what is done, the weight of the KL, and each reward's normalisation (from the first rollout)."""

    iteration: int = 0
    step: int = 0
    kl_coef: float = 0.0
    score_means: list[float] = field(default_factory=list)
    score_deviations: list[float] = field(default_factory=list)


def save(run: Run, progress: Progress, trainable: dict[str, nn.Parameter], optimizer: Any) -> None:
    """Write a checkpoint, all or nothing, and drop those before the last two. Called by every rank, each with its part."""
    folder = run.path / "checkpoints"
    target = folder / f"iteration-{progress.iteration:05d}"
    with joint_directory(target) as scratch:
        shards.write(scratch, trainable, optimizer)
        if ranks.first():
            write_json(scratch / "progress.json", asdict(progress))
    if ranks.first():
        for old in sorted(folder.glob("iteration-*"))[:-2]:
            shutil.rmtree(old)


def load(run: Run, trainable: dict[str, nn.Parameter], optimizer: Any, fresh: Progress) -> Progress:
    """Restore the newest whole checkpoint into the parameters and the optimizer; the fresh start if there is none."""

    def newest() -> Path | None:
        found = sorted(p for p in (run.path / "checkpoints").glob("iteration-*") if (p / "progress.json").exists())
        return newest_whole(found, run)

    checkpoint = ranks.lead(newest)
    if checkpoint is None:
        return fresh
    shards.read(checkpoint, trainable, optimizer)
    return Progress(**json.loads((checkpoint / "progress.json").read_text()))
