"""What the tests of faults share: a run of 36 steps, ways to disturb it, and ways to compare it with one that was not."""

from __future__ import annotations

import torch
from safetensors.torch import load_file

from truthward.ledger import Run
from truthward.tracking import read_metrics

STEPS = 36
SFT = (
    "sft.packing=false",
    "sft.micro_batch_size=1",  # two a step: gradients are accumulated
    "sft.epochs=12",
    "sft.checkpoint_every=6",
    "sft.learning_rate=3e-3",
    "guard.warmup=8",
)
AT = 20  # the step that a fault hits, counted from 0; the checkpoint before it is that of step 18


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {name: t for path in sorted(run.model_dir.glob("*.safetensors")) for name, t in load_file(path).items()}


def same(one: Run, two: Run) -> bool:
    """Weights and metrics, bit for bit."""
    a, b = weights(one), weights(two)
    return a.keys() == b.keys() != set() and all(torch.equal(a[n], b[n]) for n in a) and rows(one) == rows(two)


def rows(run: Run) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.startswith(("seconds/", "gemm_share/"))} for row in read_metrics(run)]


def last_loss(run: Run) -> float:
    """Mean of the last three steps, each a third of the data."""
    return sum(row["loss"] for row in read_metrics(run)[-3:]) / 3


def found(run: Run, *keys: str) -> list[tuple]:
    return [tuple(entry.get(key) for key in ("kind", "step", "action", *keys)) for entry in run.manifest["incidents"]]


def disturb(monkeypatch, trainer: type, change) -> None:
    """Let ``change(trainer, inputs, loss)`` have its way with every micro-batch's loss."""
    compute = trainer.compute_loss

    def compute_loss(self, model, inputs, *args, **kwargs):
        return change(self, inputs, lambda: compute(self, model, inputs, *args, **kwargs))

    monkeypatch.setattr(trainer, "compute_loss", compute_loss)
