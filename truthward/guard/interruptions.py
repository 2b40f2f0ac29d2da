"""How a run ends early and loses nothing: told to stop by SIGTERM, or hung."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from statistics import median
from types import FrameType
from typing import Any

from truthward.errors import Interrupted, TrainingFault
from truthward.guard.watch import Guard

POLL = 1.0  # seconds between the watchdog's looks


class Request:
    """Whether somebody has asked the run to stop."""

    asked = False

    def obey(self, guard: Guard, step: int) -> None:
        """End the run if it was asked to; called behind a checkpoint.

        Raises:
            Interrupted: it was.
        """
        if self.asked:
            guard.run.incident("interrupted", signal="SIGTERM", step=step, action="stopped after the step")
            raise Interrupted(f"SIGTERM stopped {guard.run.path} after step {step}; the same command goes on from here")


@contextlib.contextmanager
def stop_on_request() -> Iterator[Request]:
    """Within this block SIGTERM only makes a request, to be obeyed at the end of a step; a second one ends the process."""
    request = Request()

    def ask(number: int, frame: FrameType | None) -> None:
        request.asked = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    if threading.current_thread() is not threading.main_thread():  # only that one may set handlers
        yield request
        return
    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield request
    finally:
        signal.signal(signal.SIGTERM, before)


class Watchdog:
    """Ends a process whose step does not: stack traces of all threads, an incident, exit code 4. The run can go on later.

    A step may take ``hang_factor`` times the median step, and ``hang_seconds`` in any case. Each rank has a watchdog of its
    own: a collective that waits for one rank hangs on all, so that all write their stacks.

    Args:
        guard: of the run.
        rank: of this process.
        clock: seconds, monotonic: setting the machine's time must not look like a hang.
        end: ends the process; nothing else can, from beside a thread that hangs.
    """

    def __init__(
        self,
        guard: Guard,
        rank: int = 0,
        clock: Callable[[], float] = time.monotonic,
        end: Callable[[int], Any] = os._exit,
    ) -> None:
        self.guard, self.rank, self.clock, self.end = guard, rank, clock, end
        self.path = guard.run.path / f"stacks-rank{rank}.txt"
        self.steps: deque[float] = deque(maxlen=guard.table.window)
        self._over = threading.Event()

    @property
    def limit(self) -> float:
        """Seconds that a step may take."""
        table = self.guard.table
        return max(table.hang_seconds, table.hang_factor * median(self.steps)) if self.steps else table.hang_seconds

    def __enter__(self) -> Watchdog:
        self.step, self.last = 0, self.clock()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self.thread.join()

    def beat(self, step: int) -> None:
        """A step has ended."""
        now = self.clock()
        self.steps.append(now - self.last)
        self.step, self.last = step, now

    def _watch(self) -> None:
        while not self._over.wait(min(POLL, self.guard.table.hang_seconds / 4)):
            if self.clock() - self.last > self.limit:
                return self._bark()

    def _bark(self) -> None:
        waited, usual = round(self.clock() - self.last, 1), round(median(self.steps), 3) if self.steps else None
        with contextlib.suppress(OSError), open(self.path, "w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        evidence = {"seconds": waited, "most": self.limit, "median": usual, "stacks": self.path.name}
        with contextlib.suppress(OSError):
            self.guard.run.incident("hung", step=self.step + 1, action="stopped", **evidence)
        print(
            f"error: rank {self.rank} on {socket.gethostname()}: step {self.step + 1} of {self.guard.run.path} did not end "
            f"in {waited:.0f} seconds\n"
            f"  to do: {self.path} says where each thread was; the same command goes on from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        self.end(TrainingFault.exit_code)
