"""``python -m truthward.fork_server FD LIBRARY …``: load libraries once, then fork a process for each command asked for.

Asked through a socket by :mod:`truthward.processes`. Only libraries of others are loaded: each process reads our own code
from the disk when it begins, as a fresh interpreter does, so that it is the code that goes on record. No thread of ours is
started, no random number drawn and no device asked.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
from typing import Any, NamedTuple

from truthward import processes

LIMIT = 2**20  # bytes of a message


class Command(NamedTuple):
    """What a process is to run.

    Attributes:
        module, arguments, cwd: as in ``cd CWD; python -m MODULE ARGUMENTS``.
        environment: our own variables, in place of those that the server was started with.
        descriptors: standard input, output and error.
        reply: where its end is told.
        channel: to this server, for commands that it starts itself.
    """

    module: str
    arguments: list[str]
    cwd: str
    environment: dict[str, str]
    descriptors: list[int]
    reply: socket.socket
    channel: socket.socket

    def close(self) -> None:
        """The server's copies of what only the process needs."""
        for descriptor in self.descriptors:
            os.close(descriptor)
        self.channel.close()

    def run(self) -> None:
        """Become this command; ends as ``python -m`` does, through the interpreter's own exit."""
        for number, descriptor in enumerate(self.descriptors):
            os.dup2(descriptor, number)
            os.close(descriptor)
        os.chdir(self.cwd)
        sys.argv = [self.module, *self.arguments]
        if not sys.flags.safe_path:
            sys.path[0] = self.cwd
        importlib.invalidate_caches()
        for name in [name for name in os.environ if name.startswith(processes.OURS)]:
            del os.environ[name]
        os.environ.update(self.environment)
        if numpy := sys.modules.get("numpy"):
            numpy.random.seed()  # as in a fresh interpreter; Python does so itself for its own generator
        processes.server, processes.lifeline = processes.Server.joined(self.channel), self.reply
        signal.pthread_sigmask(signal.SIG_UNBLOCK, processes.STOPS)
        handle = os.pidfd_open(os.getpid())
        socket.send_fds(self.reply, [processes.BEGUN], [handle])
        os.close(handle)
        runpy.run_module(self.module, run_name="__main__", alter_sys=True)


def load(libraries: list[str]) -> None:
    """Import them.

    Raises:
        RuntimeError: one of them has started a thread, which no forked process would have.
    """
    for name in libraries:
        importlib.import_module(name)
    if threading.active_count() > 1:
        raise RuntimeError(f"threads are running: {threading.enumerate()}")
    gc.collect()
    gc.freeze()  # pages that nobody writes to stay shared


def receive(channel: socket.socket) -> Command | None:
    """The next command; None when nobody is left who could ask for one."""
    message, descriptors, *_ = socket.recv_fds(channel, LIMIT, 5, socket.MSG_CMSG_CLOEXEC)
    if not message:
        return None
    asked: dict[str, Any] = json.loads(message)
    *stdio, reply, back = descriptors
    return Command(**asked, descriptors=stdio, reply=socket.socket(fileno=reply), channel=socket.socket(fileno=back))


def serve(channel: socket.socket) -> Command | None:
    """Fork a process for each command that is asked for, and tell how each ended.

    Returns:
        in each forked process its command; in the server None, once nobody can ask for more.
    """
    running: dict[int, tuple[int, socket.socket]] = {}  # by a descriptor that is readable when the process has ended
    while True:
        for ready in select.select([channel.fileno(), *running], [], [])[0]:
            if ready in running:
                pid, reply = running.pop(ready)
                os.close(ready)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                with reply, contextlib.suppress(OSError):  # whoever asked is gone
                    reply.send(str(code).encode())
                continue
            command = receive(channel)
            if command is None:
                return None
            pid = os.fork()
            if pid == 0:
                channel.close()
                for handle, (_, reply) in running.items():
                    os.close(handle)
                    reply.close()
                return command
            command.close()
            running[os.pidfd_open(pid)] = (pid, command.reply)


def main() -> None:
    """Entry point."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    os.set_inheritable(channel.fileno(), False)
    try:
        load(sys.argv[2:])
        channel.send(processes.READY)
        command = serve(channel)
    except Exception:  # commands are started plainly then, and say what is wrong
        os._exit(1)
    if command is None:
        os._exit(0)
    command.run()


if __name__ == "__main__":
    main()
