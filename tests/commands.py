"""Our commands as a user starts them, forked from one process a test worker that has loaded the libraries already.

They begin as a fresh interpreter does (``tests/test_processes.py``) and end as a plain subprocess does; what they start
themselves is forked from the same process. Tests of how processes are started, killed or limited start plain ones.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from lab import ROOT

from truthward import processes

Done = subprocess.CompletedProcess[str]
BEGAN_WITH = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}


def environment(**changes: str) -> dict[str, str]:
    """What the tests began with, whatever stages that ran in this process have added since, with changes."""
    return BEGAN_WITH | changes


def run(
    *words: str,
    cwd: str | Path | None = ROOT,
    env: dict[str, str] | None = None,
    stdin: str = "",
    timeout: float = 300,
    light: bool = False,
) -> Done:
    """``python -m WORDS`` to its end, with its output as text.

    Args:
        words: of the command.
        cwd: its working directory, the present one if None.
        env: its environment, :func:`environment` if None. In another one, but for our own variables, it is started plainly.
        stdin: what it reads.
        timeout: seconds.
        light: it needs none of the libraries, so that loading them for it alone would not pay.

    Raises:
        subprocess.TimeoutExpired: it took longer, and was killed.
    """
    command = [sys.executable, "-m", *words]
    if processes.server is None and not light and processes.forkable():
        processes.server = processes.Server(environment(), [*processes.LIBRARIES, "matplotlib.figure"])
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        given.write(stdin.encode())
        given.seek(0)
        stdio = (given.fileno(), out.fileno(), err.fileno())
        with processes.start(command, env or environment(), cwd=cwd, stdio=stdio) as process:
            try:
                code = process.wait(timeout)
            except BaseException:
                process.kill()
                raise
        said = []
        for file in (out, err):
            file.seek(0)
            said.append(file.read().decode())
    return subprocess.CompletedProcess(command, code, *said)
