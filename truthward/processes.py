"""How our own commands are started: forked from a process that has loaded the libraries, or as plain subprocesses.

Most of what a short stage costs is the import of torch, transformers and the like. A fork server
(:mod:`truthward.fork_server`) does that once for all stages of a run. Where forking is not safe or not possible, and where
the server is lost, commands are started plainly. Nothing of this reaches a result, so no stage imports it.
(``docs/decisions/0007-stages-are-forked.md``)
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Words = list[str]
Stdio = tuple[int, int, int]
STOPS = {signal.SIGINT, signal.SIGTERM}  # blocked in the server, which ends when nobody can ask it any more
OURS = "TRUTHWARD_"  # environment variables by which our commands talk to each other; no library reads them
GPUS = ("/dev/nvidiactl", "/dev/nvmap", "/dev/kfd", "/dev/dxg")  # NVIDIA, its boards, AMD, either under Windows
READY, BEGUN = b"ready", b"begun"
LIBRARIES = (
    "torch",
    "numpy",
    "datasets",
    "safetensors.torch",
    "transformers.trainer",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "peft",
    "trl.trainer.sft_trainer",
    "trl.trainer.reward_trainer",
    "trl.trainer.dpo_trainer",
    "openai",
    "pydantic",
    "rich.progress",
    "rich.table",
)


def forkable() -> bool:
    """Whether a process with these libraries loaded may be forked here.

    On Linux only: on macOS system libraries do not survive it. Not beside a GPU: a forked process cannot use a device that
    its parent has asked about.
    """
    if sys.platform != "linux" or any(map(os.path.exists, GPUS)):
        return False
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError):  # Linux before 5.3
        return False
    return True


class Server:
    """A fork server, as its clients see it.

    Args:
        environment: what it is started with; this process's own if None.
        libraries: modules that it loads.
    """

    def __init__(self, environment: Mapping[str, str] | None = None, libraries: Sequence[str] = LIBRARIES) -> None:
        self.environment = dict(os.environ if environment is None else environment)
        self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.ready = False
        words = [sys.executable, "-m", "truthward.fork_server", str(theirs.fileno()), *libraries]
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # inherited: Ctrl-C is not for it, from the start
        try:
            with theirs:
                self.process = subprocess.Popen(words, env=self.environment, pass_fds=[theirs.fileno()])
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    @classmethod
    def joined(cls, channel: socket.socket) -> Server:
        """The same server, for a process that it has forked and that has a channel to it."""
        server = cls.__new__(cls)
        server.environment, server.channel, server.ready = dict(os.environ), channel, True
        return server

    def fits(self, environment: Mapping[str, str]) -> bool:
        """Whether the libraries that it has loaded are as a command in this environment would load them."""
        return _foreign(environment) == _foreign(self.environment)

    def send(self, message: dict[str, Any], descriptors: list[int]) -> None:
        """Ask it for a process.

        Raises:
            OSError: it is lost.
        """
        if not self.ready and self.channel.recv(len(READY)) != READY:
            raise ConnectionResetError("the fork server could not load the libraries")
        self.ready = True
        socket.send_fds(self.channel, [json.dumps(message).encode()], [*descriptors, self.channel.fileno()])

    def close(self) -> None:
        """Let it go; it ends when no process is left that can ask it."""
        self.channel.close()


server: Server | None = None  # of this process; see :func:`serve`
lifeline: socket.socket | None = None  # open until a forked process ends: who waits for it knows, even without the server


class Forked:
    """A command in a process that the server forks; as much of :class:`subprocess.Popen` as is used.

    Raises:
        OSError: the server is lost, and nothing has begun.
    """

    def __init__(self, from_server: Server, words: Words, env: Mapping[str, str], cwd: str | Path, stdio: Stdio) -> None:
        self.words, self.env, self.cwd, self.stdio = words, env, cwd, stdio
        self.returncode: int | None = None
        self.plain: subprocess.Popen[bytes] | None = None  # in its place, once the server is lost
        self.sent: int | None = None  # the last signal
        ours = {name: value for name, value in env.items() if name.startswith(OURS)}
        message = {"module": words[2], "arguments": words[3:], "cwd": str(cwd), "environment": ours}
        self.reply, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            from_server.send(message, [*stdio, theirs.fileno()])
        _, handles, *_ = socket.recv_fds(self.reply, len(BEGUN), 1, socket.MSG_CMSG_CLOEXEC)
        if not handles:
            raise ConnectionResetError("the fork server is gone")
        (self.handle,) = handles

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()
        self.reply.close()
        os.close(self.handle)

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, or minus the signal that ended it.

        Where the server is lost no code is known: the command is started again, plainly, once its process has ended. What it
        had done, it finds.

        Raises:
            subprocess.TimeoutExpired: it goes on.
        """
        if self.returncode is None and self.plain is None:
            self.reply.settimeout(timeout)
            try:
                code = self.reply.recv(16)
            except TimeoutError:
                raise subprocess.TimeoutExpired(self.words, timeout or 0) from None
            if code or self.sent:
                self.returncode = int(code) if code else -(self.sent or 0)
            else:
                self.plain = _plain(self.words, self.env, self.cwd, self.stdio)
        if self.plain is not None:
            self.returncode = self.plain.wait(timeout)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Of no effect once it has ended."""
        if self.plain is not None:
            self.plain.send_signal(number)
        elif self.returncode is None:
            self.sent = number
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.handle, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def serve() -> None:
    """From now on :func:`start` forks, where that is safe; the libraries are loaded meanwhile."""
    global server
    if server is None and forkable():
        server = Server()


def start(
    words: Words,
    env: Mapping[str, str] | None = None,
    *,
    cwd: str | Path | None = None,
    stdio: Stdio = (0, 1, 2),
    new_session: bool = False,
) -> Forked | subprocess.Popen[bytes]:
    """Start a command: forked if there is a server for it, else plainly.

    Args:
        words: of the command; only ``python -m MODULE …`` by this interpreter is forked.
        env: its environment, this process's own if None.
        cwd: its working directory, this process's own if None.
        stdio: its standard input, output and error.
        new_session: put it into a session of its own; never forked.
    """
    global server
    env, cwd = os.environ if env is None else env, cwd or os.getcwd()
    if server and words[:2] == [sys.executable, "-m"] and not new_session and server.fits(env):
        try:
            return Forked(server, words, env, cwd, stdio)
        except OSError:
            server.close()
            server = None
    return _plain(words, env, cwd, stdio, new_session)


def call(words: Words, env: Mapping[str, str] | None = None) -> int:
    """Run a command to its end; its exit code."""
    with start(words, env) as process:
        try:
            return process.wait()
        except BaseException:  # as at Ctrl-C
            process.kill()
            raise


def _plain(
    words: Words, env: Mapping[str, str], cwd: str | Path, stdio: Stdio, new_session: bool = False
) -> subprocess.Popen[bytes]:
    pipes = [None if number == fd else fd for number, fd in enumerate(stdio)]
    options: Any = {"start_new_session": new_session, **dict(zip(("stdin", "stdout", "stderr"), pipes, strict=True))}
    return subprocess.Popen(words, env=env, cwd=cwd, **options)


def _foreign(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if not name.startswith(OURS)}
