"""Whether all processes of a run hold the same weights, at the same step, of the same recipe."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from truthward.errors import TrainingFault
from truthward.ledger import Run


class Standing(NamedTuple):
    """Where one rank stands: step, the recipe's fingerprint, and the SHA-256 of its trained weights."""

    step: int
    fingerprint: str
    weights: str


def standing(step: int, fingerprint: str, parameters: Iterable[Tensor]) -> Standing:
    """Of this process; weights are hashed bit by bit, so that a NaN equals itself and -0 is not 0."""
    hasher = hashlib.sha256()
    for parameter in parameters:
        hasher.update(parameter.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return Standing(step, fingerprint, hasher.hexdigest())


def disagreement(standings: list[Standing]) -> dict[str, Any]:
    """In what the ranks differ, and which of them from most; empty where they agree."""
    for field in Standing._fields:
        values = [getattr(each, field) for each in standings]
        usual = Counter(values).most_common(1)[0][0]
        if apart := [rank for rank, value in enumerate(values) if value != usual]:
            return {"metric": field, "ranks": apart, "values": [str(v)[:12] for v in values]}
    return {}


def check_ranks(step: int, parameters: Iterable[Tensor], run: Run) -> None:
    """Compare all ranks; called by each of them at every checkpoint. Does nothing in a single process.

    Raises:
        TrainingFault: they differ. The checkpoint of this step is not to be trusted.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    standings: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(standings, standing(step, run.manifest.get("fingerprint", ""), parameters))
    found = disagreement(standings)
    if found:
        if dist.get_rank() == 0:
            run.incident("ranks disagree", step=step, action="stopped", **found)
        raise TrainingFault(
            f"ranks {found['ranks']} differ from the others in {found['metric']} at step {step} of {run.path}\n"
            "  to do: look for a rank with other data, code or packages; go on from the checkpoint before this one"
        )
