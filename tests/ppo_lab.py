"""What PPO's tests share: a policy that has moved, the gradient of one step, and ways to compare two of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lab import Lab

from rl.ppo import PpoRun
from rl.rollout import Batch
from rl.update import Scores, Targets
from truthward.ledger import Run
from truthward.tracking import read_metrics

Gradient = dict[str, torch.Tensor]
SMALL = ("ppo.rollouts=4", "ppo.epochs=1", "ppo.max_new_tokens=4", "ppo.kl_coef=0.1")


def quiet(n: int) -> None:
    """A progress bar that isn't there."""


def sampled(ppo: PpoRun) -> tuple[Batch, Scores, Targets]:
    """One rollout, scored, with its advantages."""
    batch = ppo.rollout(quiet)
    scores = ppo.score(batch)
    return batch, scores, ppo.advantages(batch, scores)[0]


def disturb(ppo: PpoRun, size: float = 0.05) -> None:
    """Move everything that is trained, so that ratios leave 1, clips bite and values leave 0."""
    generator = torch.Generator().manual_seed(1)
    for parameter in ppo.trainable.values():
        parameter.data += size * torch.randn(parameter.shape, generator=generator)
    ppo.progress.step = 1  # past the first step, at which the ratio has to be 1


def gradient(
    ppo: PpoRun, batch: Batch, scores: Scores, targets: Targets, rows: list[int] | None = None, **table: Any
) -> tuple[Gradient, dict[str, float]]:
    """What one optimizer step over these rows (all of them) leaves in the parameters, and its metrics."""
    kept, ppo.learner.table = ppo.learner.table, ppo.learner.table.model_copy(update=table)
    ppo.optimizer.zero_grad()
    metrics = ppo.learner.minibatch(batch, scores, targets, rows or list(range(len(batch.answers))), ppo.progress)
    found = {n: p.grad.clone() for n, p in ppo.trainable.items() if p.grad is not None}
    ppo.optimizer.zero_grad()
    ppo.learner.table = kept
    return found, metrics


def assert_same(got: Gradient, expected: Gradient, tolerance: float) -> None:
    """Equal to ``tolerance`` of the largest entry, and large enough for that to say something."""
    assert got.keys() == expected.keys() != set()
    for name, each in expected.items():
        assert each.abs().max() > 1e-4, f"{name} hardly has a gradient: nothing is compared"
        torch.testing.assert_close(got[name], each, atol=tolerance * max(1, each.abs().max().item()), rtol=0)


def policy_logprobs(ppo: PpoRun, batch: Batch, rows: list[int] | None = None) -> torch.Tensor:
    """Of all answer tokens, with gradients."""
    return ppo.actor_critic("policy", batch.forest(rows or list(range(len(batch.answers))))).logprobs


def lasting(run: Run) -> list[dict]:
    """Metrics but the clock's."""
    clock = ("seconds/", "gemm_share/")
    return [{k: v for k, v in row.items() if not k.startswith(clock)} for row in read_metrics(run)]


def files(run: Run) -> dict[str, bytes]:
    """Every file of the last checkpoint, the model and the critic, less the folder that the run happens to be in."""
    last, home = max((run.path / "checkpoints").glob("iteration-*")), str(run.path.parent).encode()
    folders = [folder for folder in (last, run.model_dir, run.path / "critic") if folder.exists()]
    found = [p for folder in folders for p in folder.iterdir()]
    assert {"shard-00000-of-00001.safetensors", "progress.json"} < {p.name for p in found}
    return {str(p.relative_to(run.path)): p.read_bytes().replace(home, b"") for p in found}


def place(lab: Lab, path: Path) -> Lab:
    """The same world with its PPO runs in a folder of their own."""
    return lab.copy(path / "runs")
