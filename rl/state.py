"""PPO's checkpoint: everything the next iteration depends on, at an iteration's boundary, without pickles.

Rollouts are seeded by (seed, iteration, prompt), passes by (seed, iteration, pass), and the rate follows from the step,
so no generator state needs saving and a resumed run equals an undisturbed one bit for bit.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from truthward.guard.storage import newest_whole
from truthward.ledger import Run, whole_directory, write_json


@dataclass
class Progress:
    """Where a run stands: what is done, the weight of the KL, and each reward's normalisation (from the first rollout)."""

    iteration: int = 0
    step: int = 0
    kl_coef: float = 0.0
    score_means: list[float] = field(default_factory=list)
    score_deviations: list[float] = field(default_factory=list)


def save(run: Run, progress: Progress, trainable: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Write a checkpoint, all or nothing, and drop those before the last two."""
    folder = run.path / "checkpoints"
    with whole_directory(folder / f"iteration-{progress.iteration:05d}") as target:
        save_file({n: p.detach().contiguous() for n, p in trainable.items()}, target / "weights.safetensors")
        moments = {}
        for name, parameter in trainable.items():
            for key, value in optimizer.state.get(parameter, {}).items():
                moments[f"{name}|{key}"] = torch.as_tensor(value).detach().clone()
        save_file(moments, target / "optimizer.safetensors")
        write_json(target / "progress.json", asdict(progress))
    for old in sorted(folder.glob("iteration-*"))[:-2]:
        shutil.rmtree(old)


def load(run: Run, trainable: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, fresh: Progress) -> Progress:
    """Restore the newest whole checkpoint into the parameters and the optimizer; the fresh start if there is none."""
    found = sorted(p for p in (run.path / "checkpoints").glob("iteration-*") if (p / "progress.json").exists())
    newest = newest_whole(found, run)
    if newest is None:
        return fresh
    weights, moments = load_file(newest / "weights.safetensors"), load_file(newest / "optimizer.safetensors")
    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(weights[name])
            state = {k.split("|")[1]: v for k, v in moments.items() if k.split("|")[0] == name}
            if state:
                optimizer.state[parameter] = state
            else:  # a first step makes it
                optimizer.state.pop(parameter, None)
    return Progress(**json.loads((newest / "progress.json").read_text()))
