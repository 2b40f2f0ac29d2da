"""Run under torchrun: stages of a lab one after another, in one start of all ranks (see :mod:`tests.test_ranks`).

``torchrun --nproc-per-node=2 tests/rank_jobs.py JOBS.json``; a job is ``{"home", "runs", "stage", "overrides"}``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from lab import Lab  # noqa: E402

from truthward import ranks, zero  # noqa: E402
from truthward.stage import guarded  # noqa: E402
from truthward.tables import Launch  # noqa: E402


def main() -> None:
    jobs = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    for job in jobs:
        lab = Lab(Path(job["home"]), Path(job["runs"]))
        zero.enter(Launch())  # nothing of the job before
        ranks.join(lab.recipe(*job["overrides"]).launch, patience=120)
        lab.run(job["stage"], *job["overrides"])
    ranks.leave()


if __name__ == "__main__":
    sys.exit(guarded(main))
