"""Run under torchrun: stages of a lab one after another, in one start of all ranks (see :mod:`tests.test_ranks`).

A job is ``{"home", "runs", "stage", "overrides"}``; a ``"fault"`` befalls the last rank at the step ``"at"``, once: it is
``killed``, it is ``hung``, or its ``disk`` is full when it writes its part of the checkpoint of that step. A loss that is
``not finite`` at three steps befalls all of them.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from lab import Lab  # noqa: E402

from truthward import ranks, shards, zero  # noqa: E402
from truthward.guard.watch import Guard  # noqa: E402
from truthward.stage import guarded  # noqa: E402
from truthward.tables import Launch  # noqa: E402


def befall(fault: str, at: int) -> None:
    """Let the fault happen where the guard is to judge step ``at``: nothing of that step is on disk yet."""
    judge, write, met = Guard.observe, shards.write, list[int]()

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "planted")

    def observe(self: Guard, row: Any) -> Any:
        if row["step"] == at and fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if row["step"] == at and fault == "hung":
            time.sleep(600)
        if at <= row["step"] < at + 3 and fault == "not finite" and row["step"] not in met:
            met.append(row["step"])
            row = {**row, "loss": float("nan")}
        shards.write = full if row["step"] == at and fault == "disk" else write
        return judge(self, row)

    Guard.observe = observe  # type: ignore[method-assign]


def main() -> None:
    for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        lab = Lab(Path(job["home"]), Path(job["runs"]))
        zero.enter(Launch())  # nothing of the job before
        ranks.join(lab.recipe(*job["overrides"]).launch, patience=120)
        last, begun_again = ranks.rank() == ranks.count() - 1, os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        if "fault" in job and (last or job["fault"] == "not finite") and not begun_again:
            befall(job["fault"], job["at"])
        lab.run(job["stage"], *job["overrides"])
    ranks.leave()


if __name__ == "__main__":
    sys.exit(guarded(main))
