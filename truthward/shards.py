"""What training needs to go on, cut as the ranks hold it: each writes its part of the weights and of Adam's moments.

A part says which stretch of which parameter it is, counted in the flat parameter, so that any other number of ranks and any
stage of ZeRO can go on from it. Safetensors alone; no pickle.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from truthward import ranks
from truthward.errors import UserError

NAME = re.compile(r"shard-(\d{5})-of-(\d{5})\.safetensors")
WEIGHT, STEP = "weight", "step"


class Part(NamedTuple):
    """A stretch of a parameter that this rank steps on: where it starts, and its place in what the optimizer steps on."""

    start: int
    flat: Tensor  # the optimizer's own (fp32) tensor; of several parameters under ZeRO
    offset: int
    size: int
    state: dict[str, Any]  # the optimizer's, for all of ``flat``

    def of(self, values: Tensor) -> Tensor:
        """This stretch of something that is as long as ``flat``."""
        return values.view(-1).narrow(0, self.offset, self.size)


def part(parameter: Any, optimizer: Any) -> Part | None:
    """Which part of a parameter this rank steps on; None: nothing of it.

    Args:
        optimizer: torch's, or DeepSpeed's around it.
    """
    if hasattr(parameter, "ds_id"):  # ZeRO-3: an equal stretch of each parameter on each rank, the last one padded
        group, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
        flat, (start, size) = optimizer.fp32_partitioned_groups_flat[group], _stretch(parameter)
        return Part(start, flat, offset, size, optimizer.optimizer.state[flat]) if size else None
    if hasattr(parameter, "_hp_mapping"):  # ZeRO-1 and 2: a stretch of all parameters in a row
        held = parameter._hp_mapping
        if held is None:
            return None
        flat = optimizer.single_partition_of_fp32_groups[held.param_group_index]
        here = held.hp_fragment_address
        return Part(held.lp_fragment_address.start, flat, here.start, here.numel, optimizer.optimizer.state[flat])
    if not ranks.first():
        return None  # every rank holds all of it
    return Part(0, parameter.data, 0, parameter.numel(), optimizer.state.get(parameter, {}))


def write(folder: Path, trained: dict[str, nn.Parameter], optimizer: Any) -> None:
    """Write this rank's part of the trained parameters and of their optimizer's state; called by every rank."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in trained.items():
        if mine := part(parameter, optimizer):
            tensors[f"{name}|{mine.start}|{WEIGHT}"] = mine.of(mine.flat)
            for key, value in mine.state.items():
                value = torch.as_tensor(value)
                tensors[f"{name}|{mine.start}|{key}"] = value.reshape(1) if value.numel() == 1 else mine.of(value)
    count = ranks.count() if any(map(_shared_out, trained.values())) else 1
    if ranks.rank() < count:
        folder.mkdir(parents=True, exist_ok=True)
        whole = {key: value.detach().cpu().clone() for key, value in tensors.items()}
        save_file(whole, folder / f"shard-{ranks.rank():05d}-of-{count:05d}.safetensors")


@torch.no_grad()
def read(folder: Path, trained: dict[str, nn.Parameter], optimizer: Any) -> None:
    """Take over what :func:`write` left, from however many ranks.

    Raises:
        UserError: parts are missing, or the parameters are not those that were written.
    """
    saved = Saved(folder)
    for name, parameter in trained.items():
        if not saved.covers(name, parameter):
            fix = "go on with the settings that it was written with, or take the run's checkpoints away to begin again"
            raise UserError(f"the checkpoint does not hold {name}", where=str(folder), fix=fix)
        _fill(parameter, name, saved)
        mine = part(parameter, optimizer) if _shared_out(parameter) else _own(parameter, optimizer)
        if mine is None:
            continue
        mine.of(mine.flat).copy_(saved.stretch(name, WEIGHT, mine.start, mine.size))
        keys = saved.keys_of(name) - {WEIGHT}
        if not keys:  # a first step makes them
            mine.state.clear()
        for key in keys - {STEP}:
            if key not in mine.state:
                mine.state[key] = torch.zeros_like(mine.flat)
            mine.of(mine.state[key]).copy_(saved.stretch(name, key, mine.start, mine.size))
        if STEP in keys:
            mine.state[STEP] = saved.step(name)


def _shared_out(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def _stretch(parameter: Any) -> tuple[int, int]:
    """Where this rank's stretch of a parameter under ZeRO-3 starts, and how much of it is no padding."""
    start = ranks.rank() * parameter.ds_tensor.numel()
    return start, max(0, min(parameter.ds_tensor.numel(), parameter.ds_numel - start))


def _own(parameter: nn.Parameter, optimizer: Any) -> Part:
    """As :func:`part` of a parameter that every rank holds; its state, which may not be there yet, is made."""
    return Part(0, parameter.data, 0, parameter.numel(), optimizer.state[parameter])


def _fill(parameter: Any, name: str, saved: Saved) -> None:
    """The weights that the model computes with, where they are a copy of what the optimizer steps on."""
    if hasattr(parameter, "ds_id"):
        start, size = _stretch(parameter)
        if size:
            parameter.ds_tensor.view(-1)[:size].copy_(saved.stretch(name, WEIGHT, start, size))
        if parameter.data.numel() == parameter.ds_numel:  # a small one, which stays whole on every rank
            parameter.data.view(-1).copy_(saved.stretch(name, WEIGHT, 0, parameter.ds_numel))
    elif hasattr(parameter, "_hp_mapping"):
        parameter.data.view(-1).copy_(saved.stretch(name, WEIGHT, 0, parameter.numel()))


class Saved:
    """The parts in a folder, read as they are asked for.

    Raises:
        UserError: some are missing.
    """

    def __init__(self, folder: Path) -> None:
        if fault := missing(folder):
            raise UserError(fault, where=str(folder), fix="go on from an older checkpoint: take this folder away")
        self.found: dict[tuple[str, str], list[tuple[int, int, Any]]] = {}
        for file in sorted(folder.glob("shard-*.safetensors")):
            opened = safe_open(str(file), framework="pt")
            for key in opened.keys():  # noqa: SIM118 - it is no dictionary
                name, start, what = key.rsplit("|", 2)
                length = opened.get_slice(key).get_shape()[0]
                self.found.setdefault((name, what), []).append((int(start), length, opened))

    def keys_of(self, name: str) -> set[str]:
        """What is kept of a parameter."""
        return {what for known, what in self.found if known == name}

    def covers(self, name: str, parameter: Any) -> bool:
        """Whether all of a parameter is there, and no more."""
        size = elements(parameter)
        return sum(length for _, length, _ in self.found.get((name, WEIGHT), [])) == size

    def stretch(self, name: str, what: str, start: int, count: int) -> Tensor:
        """``count`` elements from ``start`` on, of whichever parts hold them."""
        return torch.cat(list(self._pieces(name, what, start, start + count)))

    def step(self, name: str) -> Tensor:
        """Adam's count of steps."""
        start, _, opened = self.found[name, STEP][0]
        return opened.get_tensor(f"{name}|{start}|{STEP}").reshape(())

    def _pieces(self, name: str, what: str, start: int, end: int) -> Iterator[Tensor]:
        for at, length, opened in sorted(self.found[name, what], key=lambda entry: entry[0]):
            low, high = max(start, at), min(end, at + length)
            if low < high:
                yield opened.get_slice(f"{name}|{at}|{what}")[low - at : high - at]


def elements(parameter: Any) -> int:
    """Of a parameter as a whole, wherever its stretches are."""
    return getattr(parameter, "ds_numel", parameter.numel())


def missing(folder: Path) -> str:
    """Which parts of a checkpoint are not there; empty where it is whole, or has no parts."""
    names = [match for file in sorted(folder.glob("shard-*")) if (match := NAME.fullmatch(file.name))]
    counts = {int(match[2]) for match in names}
    if len(counts) > 1:
        return f"parts of {' and '.join(map(str, sorted(counts)))} ranks lie together"
    absent = sorted(set(range(max(counts, default=0))) - {int(match[1]) for match in names})
    return f"parts {absent} of {max(counts)} are missing" if absent else ""
