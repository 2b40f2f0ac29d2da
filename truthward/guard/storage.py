"""Checkpoints that are whole, and what a disk that is full or read-only looks like."""

from __future__ import annotations

import errno
import json
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path

from truthward.ledger import Run

REFUSALS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),  # something else stands where a run would write
)


def newest_whole(found: Iterable[Path], run: Run) -> Path | None:
    """The last of these checkpoints, in order of age, that is not damaged; newer ones are put aside, never deleted."""
    for checkpoint in reversed(list(found)):
        fault = damage(checkpoint)
        if not fault:
            return checkpoint
        aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
        copies = (checkpoint.with_name(f"{aside.name}.{n}") for n in range(1, 1000))
        aside = next(path for path in (aside, *copies) if not path.exists())
        checkpoint.rename(aside)
        step = int(re.findall(r"\d+", checkpoint.name)[-1])
        run.incident("damaged checkpoint", step=step, action="put aside", seen=fault, path=str(aside.relative_to(run.path)))
    return None


def damage(checkpoint: Path) -> str:
    """What is wrong with the files of a checkpoint, empty where they are whole: none is empty, cut off, or not what it says.

    Weights are not read: a safetensors file says in its head how long it is, a file of ``torch.save`` is a zip archive whose
    directory stands at its end, JSON is parsed.
    """
    for file in sorted(p for p in checkpoint.rglob("*") if p.is_file()):
        if not _whole(file):
            return f"{file.relative_to(checkpoint)} is cut off or damaged ({file.stat().st_size} bytes)"
    from truthward.shards import missing  # loads torch, which a command that trains nothing does without

    return missing(checkpoint)


def _whole(file: Path) -> bool:
    if file.suffix == ".safetensors":
        return _whole_safetensors(file)
    if file.suffix in (".pt", ".pth", ".bin"):
        return zipfile.is_zipfile(file)
    if file.suffix == ".json":
        try:
            json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            return False
    return True


def _whole_safetensors(file: Path) -> bool:
    """8 bytes: length of the head; the head, JSON with each tensor's ``data_offsets``; the tensors."""
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        size = file.stat().st_size
        if not 0 < length <= size - 8:
            return False
        try:
            head = json.loads(opened.read(length))
        except ValueError:
            return False
    ends = [entry["data_offsets"][1] for name, entry in head.items() if name != "__metadata__"]
    return size == 8 + length + max(ends, default=0)


def refusal(error: BaseException) -> str:
    """Why storage refused a write, where an error or one behind it says so; else empty.

    Libraries that write for us wrap the system's error in one of their own, or put it into words.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in REFUSALS:
            return str(seen)
        number = re.search(r"\(os error (\d+)\)", str(seen))
        if number and int(number[1]) in REFUSALS:
            return str(seen)
        if "PytorchStreamWriter failed writing" in str(seen) or "unexpected pos" in str(seen):
            return str(seen).splitlines()[0]
        seen = seen.__cause__ or seen.__context__
    return ""
