"""Models between a trained one and its start: ``W_start + scale (W - W_start)``.

WiSE-FT (Wortsman et al. 2021, arXiv 2109.01903, eq. 1): much of what fine-tuning gained is kept, and much of what it cost is
given back, by going only a part of the way.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from truthward.ledger import Run
from truthward.models import compose


def between(run: Run, scale: float) -> Any:
    """The model that lies between a run and the one that it started from, in fp32.

    Args:
        scale: 0 is the model it started from, 1 the run's own.
    """
    parents = run.manifest["parents"]
    start, end = compose(run.parent("start" if "start" in parents else "model")), compose(run)
    with torch.no_grad():
        for one, other in zip(end.parameters(), start.parameters(), strict=True):
            one.lerp_(other, 1 - scale)
    return end


def keep_share(run: Run, scale: float) -> Callable[[Path], None] | None:
    """What leaves a share of the change in a run's saved weights (:func:`truthward.models.save`); None where all is kept."""
    return None if scale == 1 else lambda folder: shrink_change(folder, run, scale)


def shrink_change(folder: Path, run: Run, scale: float) -> None:
    """Keep a share of the change from the parent in the saved weights of a folder; of an adapter by its B matrices."""
    parent = None if (folder / "adapter_model.safetensors").exists() else compose(run.parent("model")).state_dict()
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if parent is not None:
                tensor.copy_(torch.lerp(parent[name].float(), tensor.float(), scale))
            elif "lora_B" in name:
                tensor.mul_(scale)
        save_file(tensors, file, metadata={"format": "pt"})
