"""The errors a user can meet. Each says what is wrong, where, and what to do."""

from __future__ import annotations


class UserError(Exception):
    """Input or set-up that cannot work. Exit code 2, raised before compute is spent.

    Args:
        what: the fault in one sentence.
        where: the file (and line), recipe key or command it was found in.
        fix: what to do about it.
    """

    exit_code = 2

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__("\n".join(filter(None, [f"{where}: {what}" if where else what, fix and f"  to do: {fix}"])))


class GateFailed(Exception):
    """A stage made the model measurably less truthful. Exit code 3; everything made so far is kept."""

    exit_code = 3


class TrainingFault(Exception):
    """The guard stopped a run: the loss or a probability is not what it can be. Exit code 4; resumes from checkpoint."""

    exit_code = 4


class Interrupted(Exception):
    """The run was told to stop (SIGTERM) and did so behind a checkpoint. Exit code 143, as of a process that died of it."""

    exit_code = 143
