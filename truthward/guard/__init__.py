"""The guard during a run: it notices what cannot be right, and skips a batch, goes back to a checkpoint or stops.

``detectors`` are formulas, ``rules`` say what each kind of training is watched for, ``watch`` turns a step's metrics into
an action, ``trainer`` does that for TRL's trainers, ``interruptions`` end a run that hangs or is told to stop, ``storage``
finds checkpoints that are whole, and ``ranks`` compares processes. ``docs/guard.md`` explains each.
"""

from __future__ import annotations

from truthward.errors import TrainingFault
from truthward.ledger import Run


def check_start(name: str, value: float, expected: float, tolerance: float, run: Run) -> None:
    """Assert a value that theory fixes at the first step (DPO's loss is ln 2, PPO's ratio 1, its KL 0).

    Raises:
        TrainingFault: it is off by more than ``tolerance``, or NaN.
    """
    if not abs(value - expected) <= tolerance:
        run.incident("wrong-start", metric=name, value=str(value), expected=expected, tolerance=tolerance, step=0)
        raise TrainingFault(
            f"{name} must be {expected:.6g} at the first step but is {value:.6g} ({run.path})\n"
            "  to do: the reference or the rendering is not what training uses; please report it with the manifest"
        )
