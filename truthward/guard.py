"""The guard during a run: numbers that cannot be right stop it, with the evidence on record."""

from __future__ import annotations

import math

from truthward.errors import TrainingFault
from truthward.ledger import Run


def check_finite(name: str, value: float, step: int, run: Run) -> None:
    """Stop a run whose loss, gradient or probability is NaN or infinite; its last checkpoint stays.

    Raises:
        TrainingFault: the value is not finite.
    """
    if not math.isfinite(value):
        run.incident("non-finite", metric=name, value=str(value), step=step)
        raise TrainingFault(
            f"{name} is {value} at step {step} of {run.path}\n"
            "  to do: look at metrics.jsonl there; lower the learning rate or look for a broken row, then run again"
        )


def check_start(name: str, value: float, expected: float, tolerance: float, run: Run) -> None:
    """Assert a value that theory fixes at the first step (DPO's loss is ln 2, PPO's ratio 1, its KL 0).

    Raises:
        TrainingFault: it is off by more than ``tolerance``.
    """
    if not abs(value - expected) <= tolerance:
        run.incident("wrong-start", metric=name, value=value, expected=expected, tolerance=tolerance)
        raise TrainingFault(
            f"{name} must be {expected:.6g} at the first step but is {value:.6g} ({run.path})\n"
            "  to do: the reference or the rendering is not what training uses; please report it with the manifest"
        )
