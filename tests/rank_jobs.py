"""Run under torchrun: stages of a lab one after another, in one start of all ranks (see :mod:`tests.test_ranks`).

A job is ``{"home", "runs", "stage", "overrides"}``; with ``"die_at"`` the last rank is killed before it logs that step.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from lab import Lab  # noqa: E402

from truthward import ranks, zero  # noqa: E402
from truthward.guard.watch import Guard  # noqa: E402
from truthward.stage import guarded  # noqa: E402
from truthward.tables import Launch  # noqa: E402


def die_at(step: int) -> None:
    """Kill the last rank where the guard is to judge this step: nothing of the step is on disk yet."""
    judge = Guard.observe

    def observe(self: Guard, row: Any) -> Any:
        if row["step"] == step and ranks.rank() == ranks.count() - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return judge(self, row)

    Guard.observe = observe  # type: ignore[method-assign]


def main() -> None:
    for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        lab = Lab(Path(job["home"]), Path(job["runs"]))
        zero.enter(Launch())  # nothing of the job before
        ranks.join(lab.recipe(*job["overrides"]).launch, patience=120)
        if "die_at" in job:
            die_at(job["die_at"])
        lab.run(job["stage"], *job["overrides"])
    ranks.leave()


if __name__ == "__main__":
    sys.exit(guarded(main))
