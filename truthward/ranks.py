"""The processes of a stage: one a device, on one host or many, started by torchrun.

The first rank alone writes the record; what it decides from the disk or the clock (where to go on, which compute type) it
decides for all, and an error that it meets there ends all of them.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from truthward.errors import UserError
from truthward.tables import Launch

T = TypeVar("T")
ALONE = {  # what torchrun tells each process, for one that was started without it
    **{"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"},
    **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"},
}
_alone = False  # whether the first rank is at what only one may do
SHM = "deepspeed_shm_comm"  # an operation of DeepSpeed that is compiled at the first start


def rank() -> int:
    """Of this process among all."""
    return int(os.environ.get("RANK", "0"))


def count() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def first() -> bool:
    """Whether this is the process that writes."""
    return rank() == 0


def any_of(said: bool) -> bool:
    """Whether any rank says so; the same on all of them."""
    return any(gather(said))


def join(launch: Launch, patience: float) -> None:
    """Enter the group of all processes; does nothing where there is one.

    Args:
        launch: the recipe's table.
        patience: seconds after which a collective that waits for a lost rank gives up.

    Raises:
        UserError: there are not as many processes as the recipe says.
    """
    if count() != launch.world:
        raise UserError(
            f"the recipe wants {launch.world} ranks (launch.ranks * launch.hosts), and there are {count()}",
            where="launch.ranks",
            fix="start it by truthward run, or by what truthward launch RECIPE --print torchrun says",
        )
    if launch.zero:
        _spare_compiling()
        os.environ.update({key: value for key, value in ALONE.items() if key not in os.environ})
    if (count() > 1 or launch.zero) and not _group():
        import torch
        import torch.distributed as dist

        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        bound = datetime.timedelta(seconds=patience)
        store, me, all_of_them = next(dist.rendezvous("env://", timeout=bound))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # ranks started again must not find dead ones' addresses
        store = dist.PrefixStore(f"attempt-{attempt}", store)
        dist.init_process_group(backend, store=store, rank=me, world_size=all_of_them, timeout=bound)


def leave() -> None:
    """Leave the group, all together: a first rank that goes before the others takes their meeting point with it."""
    if group := _group():
        group.barrier()
        group.destroy_process_group()


def share(value: T) -> T:
    """The first rank's value, on every rank."""
    box: list[Any] = [value]
    if group := _group():
        group.broadcast_object_list(box)
    return box[0]


def gather(value: T) -> list[T]:
    """The value of every rank, in their order, on each of them."""
    values: list[Any] = [value]
    if group := _group():
        values *= group.get_world_size()
        group.all_gather_object(values, value)
    return values


def lead(work: Callable[[], T]) -> T:
    """Let the first rank do what only one may do, and give every rank its result.

    While it works it is alone: the functions of this module are those of a single process.

    Raises:
        Exception: the first rank met it; it is raised on every rank.
    """
    global _alone
    if not _group():
        return work()
    outcome: tuple[Any, Exception | SystemExit | None] = (None, None)
    if first():
        _alone = True
        try:
            outcome = work(), None
        except (Exception, SystemExit) as error:
            outcome = None, error
        finally:
            _alone = False
    value, trouble = share(outcome)
    if trouble is not None:
        trouble.told = not first()  # type: ignore[union-attr]
        raise trouble
    return value


def lost(error: BaseException) -> str:
    """What an error of a collective says of another rank, which is gone, hung or out of reach; empty for any other error."""
    text = str(error).splitlines()[0] if str(error) else ""
    collective = "gloo/" in text or type(error).__name__.startswith("Dist")  # NCCL's and the store's have types
    if count() == 1 or not isinstance(error, RuntimeError) or not collective:
        return ""
    return f"rank {rank()} on {socket.gethostname()} waited for another rank in vain: {text.partition('] ')[2] or text}"


@contextlib.contextmanager
def agreed() -> Iterator[None]:
    """A block in which each rank does its part; where one of them meets trouble, all end. Entered by all of them.

    Raises:
        Exception: this rank's own trouble, or an OSError that names the rank that had it.
    """
    trouble: Exception | None = None
    try:
        yield
    except Exception as error:
        trouble = error
    said = gather(trouble and f"{type(trouble).__name__}: {trouble}")
    if trouble is not None:
        raise trouble
    for number, text in enumerate(said):
        if text is not None:
            elsewhere = OSError(errno.EIO, f"rank {number} could not do its part: {text}")
            elsewhere.told = True  # type: ignore[attr-defined]
            raise elsewhere


def _group() -> Any:
    """``torch.distributed`` within a group of processes, else None; torch is not loaded to find that out."""
    if "RANK" not in os.environ or _alone:
        return None
    import torch.distributed as dist

    return dist if dist.is_initialized() else None


def _spare_compiling() -> None:
    """Keep DeepSpeed from compiling an operation at its first start, which only its inference uses.

    On a CPU it takes minutes, a compilation that is killed leaves a lock at which every later start waits without a word,
    and ranks that come to the operation's shared memory at different times abort.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__[SHM] = False
