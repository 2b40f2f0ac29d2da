"""How stages are started: on one process or many, on one host or several.

``truthward run`` is started by the same words on every host. The host that ``launch.rendezvous`` names leads: it keeps the
store at which the hosts meet, does alone what needs one process, and tells the others what to start with it. Nothing of
this reaches a result, so no stage imports it.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from itertools import count
from typing import Any

from truthward import processes
from truthward.console import say
from truthward.errors import Interrupted, UserError
from truthward.ledger import CODE, TRAINED
from truthward.tables import Launch, Recipe

MANY = (*TRAINED, "check")  # what runs on all ranks; base, constitution and evals are for one process
CHECK = "check"  # where a stage's name may stand: the check before launch
MODULES = {**CODE, CHECK: "truthward.check.ranks"}
MET = "TRUTHWARD_MET"  # environment variable: the hosts of this launch have met
GRACE = 600  # seconds that ranks have for a checkpoint once they are told to stop
PATIENCE = 600  # seconds that hosts wait for each other at the start
POLL = 0.5
END = "end"


# ------------------------------------------------------------------------------------------------------------ commands


def torchrun(recipe: Recipe, stage: str) -> list[str]:
    """The words of ``python`` that start this host's ranks, up to the stage's module; the same on every host."""
    table = recipe.launch
    words = ["-m", "torch.distributed.run", f"--nnodes={table.hosts}", f"--nproc-per-node={table.ranks}"]
    if table.hosts == 1:
        words.append("--standalone")  # meets at a free port of its own
    else:
        words += ["--rdzv-backend=c10d", f"--rdzv-endpoint={table.rendezvous}", f"--rdzv-id={recipe.name}-{stage}"]
    return [*words, f"--max-restarts={table.restarts}", f"--shutdown-timeout={GRACE}"]


def command(recipe: Recipe, stage: str, arguments: list[str], python: str = "") -> list[str]:
    """What starts a stage on this host: one process, or this host's share of many.

    Args:
        recipe: the resolved recipe.
        stage: a stage, ``evals`` or ``check``.
        arguments: words of the stage's own command line.
        python: the interpreter, as it is called; this one if empty.
    """
    starter = torchrun(recipe, stage) if on_many(recipe, stage) else []
    return [python or sys.executable, *starter, "-m", MODULES.get(stage, stage), *arguments]


def on_many(recipe: Recipe, stage: str) -> bool:
    """Whether a stage runs on more than one process."""
    return stage in MANY and recipe.launch.world > 1


def prepare(recipe: Recipe) -> None:
    """Let the processes of a run that has something to do be forked, where each of its stages is a single one."""
    if recipe.launch.world == 1 and not recipe.launch.zero:
        processes.serve()
    else:
        processes.server = None


def start(recipe: Recipe, stage: str, arguments: list[str]) -> int:
    """Run this host's part of a stage to its end.

    A SIGTERM is passed on: the stage ends behind a checkpoint, and this process after it. Ranks share the host's cores, and
    are in a session of their own, so that a signal to a whole process group reaches torchrun once: a second one would end
    it before its ranks.

    Returns:
        its exit code; that of an interrupted run if it was told to stop and did not end well.
    """
    told: list[int] = []
    many = on_many(recipe, stage)
    shared = {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // recipe.launch.ranks))} if many else {}

    def pass_on(number: int, frame: Any) -> None:
        told.append(number)
        process.terminate()

    words = command(recipe, stage, arguments)
    with processes.start(words, {**shared, **os.environ}, new_session=many) as process:
        before = signal.signal(signal.SIGTERM, pass_on)
        try:
            code = process.wait()
        except BaseException:  # as at Ctrl-C: what starts ranks must end them, or they would go on alone
            process.terminate()
            process.wait(GRACE)
            raise
        finally:
            process.kill()  # of no effect once it has ended
            signal.signal(signal.SIGTERM, before)
    return Interrupted.exit_code if told and code else code


# --------------------------------------------------------------------------------------------------------------- hosts


def endpoint(table: Launch) -> tuple[str, int]:
    """Host and port of ``launch.rendezvous``.

    Raises:
        UserError: it is not of the form host:port.
    """
    host, _, port = table.rendezvous.rpartition(":")
    if not host.strip("[]") or not port.isdecimal() or not 0 < int(port) < 2**16:
        fix = 'write the first host and a free port there, e.g. "node0:29500"'
        raise UserError(f"{table.rendezvous!r} is not host:port", where="launch.rendezvous", fix=fix)
    return host.strip("[]"), int(port)


def addresses(host: str) -> list[Any]:
    """What a host's name stands for, as :func:`socket.getaddrinfo` tells it.

    Raises:
        UserError: no such host is known here.
    """
    try:
        return socket.getaddrinfo(host, None, type=socket.SOCK_DGRAM)
    except OSError as fault:
        fix = "give a name that every host can resolve, or an address"
        raise UserError(
            f"{host} is not known on {socket.gethostname()}: {fault}", where="launch.rendezvous", fix=fix
        ) from None


def is_here(host: str) -> bool:
    """Whether an address of this name is one of this machine's: then a socket can be bound to it."""
    for family, kind, _, _, address in addresses(host):
        with socket.socket(family, kind) as probe:
            try:
                probe.bind((address[0], 0))
            except OSError:
                continue
            return True
    return False


def address_towards(host: str) -> str:
    """This machine's address on the network by which it reaches a host; nothing is sent."""
    family, kind, _, _, address = addresses(host)[0]
    with socket.socket(family, kind) as probe:
        probe.connect((address[0], 9))
        return str(probe.getsockname()[0])


class Hosts:
    """The hosts of a launch. The first leads and tells the others what to start; they do nothing by themselves.

    They meet at a store (key and value over TCP) that the first one keeps at ``launch.rendezvous`` until the run ends, and
    torchrun's agents meet at the same one. With a single host there is no store, and telling does nothing.

    Raises:
        UserError: the hosts do not meet in time.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.table, self.first, self.told_so_far = recipe.launch, True, 0
        self.store: Any = None
        if recipe.launch.hosts > 1:
            self._meet()

    def _meet(self) -> None:
        from torch.distributed import TCPStore

        host, port = endpoint(self.table)
        self.first = is_here(host)
        place, me = self.table.rendezvous, socket.gethostname()
        say(f"{me} {'leads' if self.first else 'follows'}; {self.table.hosts} hosts meet at {place}")
        patience = timedelta(seconds=PATIENCE)
        try:
            self.store = TCPStore(host, port, is_master=self.first, wait_for_workers=False, timeout=patience)
            self.store.set(f"host/{self.store.add('hosts', 1)}", me)
            self._await("hosts", self.table.hosts)
        except RuntimeError as fault:  # DistStoreError and DistNetworkError
            what = f"{me} could not {'listen' if self.first else 'reach the first host'} at {place}"
            fix = "see whether the port is free, a firewall parts the hosts, or the run was not started on all of them"
            raise UserError(f"{what}: {str(fault).splitlines()[0]}", where="launch.rendezvous", fix=fix) from None
        os.environ |= {MET: "1", "PET_RDZV_CONF": "is_host=0", "PET_LOCAL_ADDR": address_towards(host)}

    def _await(self, key: str, number: int) -> None:
        """Wait until a count is reached."""
        until = time.monotonic() + PATIENCE
        while (there := self.store.add(key, 0)) < number:
            if time.monotonic() > until:
                names = [self._read(f"host/{i + 1}") for i in range(there)]
                what = f"{there} of {number} hosts came within {PATIENCE} s: {', '.join(names)}"
                fix = "start the same command on every host, or set launch.hosts to their number"
                raise UserError(what, where="launch.hosts", fix=fix)
            time.sleep(POLL)

    def _read(self, key: str) -> str:
        return self.store.get(key).decode()

    def tell(self, step: str) -> None:
        """Let the other hosts start a step too; of the first host.

        Raises:
            UserError: one of them has given up.
        """
        if self.store:
            if self.store.check(["lost"]):
                fix = "see its message; then start the same command on every host, it goes on from here"
                raise UserError(f"{self._read('lost')} has given up", where="launch.hosts", fix=fix)
            self.told_so_far += 1
            self.store.set(f"step/{self.told_so_far}", step)

    def told(self) -> Iterator[str]:
        """What to start, one step after the other, as the first host tells it.

        Raises:
            UserError: the first host is gone, or stopped the run.
        """
        for number in count(1):
            try:
                while not self.store.check([f"step/{number}"]):
                    time.sleep(POLL)
                step, _, code = self._read(f"step/{number}").partition(" ")
            except RuntimeError:
                fix = "see its message; then start the same command on every host, it goes on from here"
                raise UserError("the first host is gone", where="launch.rendezvous", fix=fix) from None
            if step == END:
                self.store.add("left", 1)
                if int(code):
                    stopped = UserError("the first host stopped the run", fix="see its message")
                    stopped.exit_code = int(code)
                    raise stopped
                return
            yield step

    def part(self, code: int) -> None:
        """End the run on all hosts with an exit code: the first tells the others, any other that it is lost."""
        if not self.store:
            return
        try:
            if not self.first:
                self.store.set("lost", socket.gethostname())
                return
            self.store.set(f"step/{self.told_so_far + 1}", f"{END} {code}")
            until = time.monotonic() + 20 * POLL
            while self.store.add("left", 0) < self.table.hosts - 1 and time.monotonic() < until:
                time.sleep(POLL / 5)
        except RuntimeError:
            pass  # the store is gone, and so is the first host


def lead_or_follow(recipe: Recipe, lead: Any, follow: Any) -> None:
    """Run ``lead(hosts)`` on the first host and ``follow(hosts)`` on the others; when one ends, the others do."""
    hosts = Hosts(recipe)
    try:
        (lead if hosts.first else follow)(hosts)
    except BaseException as fault:
        hosts.part(getattr(fault, "exit_code", 1))
        raise
    if hosts.first:
        hosts.part(0)
