"""Two hosts on one machine: network namespaces with names of their own, and a link between them that can be made bad.

A good link is a pair of virtual Ethernet devices; a narrow one has a token bucket on it. Late and lossy ones are two TUN
devices with :class:`Wire` between them, since not every kernel has netem.
"""

from __future__ import annotations

import contextlib
import fcntl
import heapq
import os
import random
import select
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lab import ROOT

TUNSETIFF, TUN, NO_PREFIX = 0x400454CA, 0x0001, 0x1000  # of linux/if_tun.h
NAMES = ("alpha", "beta")
PORT = 29500
LARGE = 60000  # bytes of a packet on a wire, so that Python can carry a gigabit of them
ETC = Path("/etc/netns")


def missing() -> str:
    """Why there can be no two hosts here; empty if there can."""
    if os.geteuid():
        return "network namespaces need root"
    if absent := [tool for tool in ("ip", "tc", "unshare") if not shutil.which(tool)]:
        return f"{absent[0]} is not installed"
    name = f"tw{os.getpid()}"
    done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    if done.returncode:
        return f"no network namespaces: {done.stderr.strip()}"
    return "" if Path("/dev/net/tun").exists() else "there is no /dev/net/tun"


class Wire(threading.Thread):
    """Carries packets between two TUN devices, each after ``delay`` seconds and some not at all.

    Args:
        devices: their file descriptors.
        delay: one way, in seconds.
        loss: share of packets that are dropped.
    """

    def __init__(self, devices: list[int], delay: float, loss: float) -> None:
        super().__init__(daemon=True)
        self.devices, self.delay, self.loss, self.ended = devices, delay, loss, False

    def run(self) -> None:
        dice, queue, number = random.Random(0), list[tuple[float, int, int, bytes]](), 0
        while not self.ended:
            until = min(0.1, max(0.0, queue[0][0] - time.monotonic())) if queue else 0.1
            for device in select.select(self.devices, [], [], until)[0]:
                packet, number = os.read(device, 65536), number + 1
                other = self.devices[1 - self.devices.index(device)]
                if dice.random() >= self.loss:
                    heapq.heappush(queue, (time.monotonic() + self.delay, number, other, packet))
            while queue and queue[0][0] <= time.monotonic():
                with contextlib.suppress(OSError):  # the other end is down
                    os.write(queue[0][2], queue[0][3])
                heapq.heappop(queue)


@dataclass
class TwoHosts:
    """What runs on either of them; see :func:`two_hosts`."""

    spaces: tuple[str, str]
    devices: tuple[str, str]
    running: list[subprocess.Popen] = field(default_factory=list)

    @property
    def rendezvous(self) -> str:
        return f"{NAMES[0]}:{PORT}"

    def start(self, host: int, *words: str, **more: str) -> subprocess.Popen:
        """``python words`` on a host of its own name, with gloo told which network to use."""
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": self.devices[host], **more}
        named = ["unshare", "--uts", "bash", "-c", f'hostname {NAMES[host]} && exec "$@"', "-", sys.executable, *words]
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.spaces[host], *named],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.running.append(process)
        return process

    def lose(self) -> None:
        """The second host is without power: its link first, so that nothing says goodbye, then all that runs on it."""
        subprocess.run(["ip", "-n", self.spaces[1], "link", "set", self.devices[1], "down"], check=True)
        kill_all(self.spaces[1])

    def find(self) -> None:
        """It has power again."""
        subprocess.run(["ip", "-n", self.spaces[1], "link", "set", self.devices[1], "up"], check=True)

    def both(self, *words: str, timeout: float = 110, **more: str) -> list[tuple[int, str]]:
        """The same on both hosts, to its end: exit codes and what they said."""
        found = [("", 0)] * 2
        started = [self.start(host, *words, **more) for host in (0, 1)]
        readers = [
            threading.Thread(target=lambda i=i: found.__setitem__(i, started[i].communicate(timeout=timeout)[0]))
            for i in (0, 1)
        ]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        return [(process.returncode, said) for process, said in zip(started, found, strict=True)]


def kill_all(space: str) -> None:
    """Every process of a namespace."""
    for pid in subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True).stdout.split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


def address(host: int) -> str:
    return f"10.77.0.{host + 1}"


def _tun(name: str) -> int:
    device = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH", name.encode(), TUN | NO_PREFIX))
    return device


@contextlib.contextmanager
def two_hosts(*, carried: bool = False, delay: float = 0.0, loss: float = 0.0, rate: str = "") -> Iterator[TwoHosts]:
    """Two hosts, ``alpha`` (10.77.0.1) and ``beta``, and all that runs on them; both are gone afterwards.

    Args:
        carried: whether a :class:`Wire` is between them also where it does no harm.
        delay: of the link between them, one way, in seconds.
        loss: share of its packets that get lost.
        rate: its bandwidth, as ``tc`` writes it (``1mbit``).
    """

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)

    me = f"tw{os.getpid()}"
    hosts = TwoHosts((f"{me}a", f"{me}b"), (f"{me}c", f"{me}d"))
    files: list[int] = []
    wire = None
    try:
        for space in hosts.spaces:
            names = ETC / space / "hosts"  # `ip netns exec` puts it in the place of /etc/hosts
            names.parent.mkdir(parents=True)
            names.write_text("127.0.0.1 localhost\n" + "".join(f"{address(i)} {n}\n" for i, n in enumerate(NAMES)))
            ip("netns", "add", space)
            ip("-n", space, "link", "set", "lo", "up")
        if carried or delay or loss:
            files += [_tun(device) for device in hosts.devices]
            for space, device in zip(hosts.spaces, hosts.devices, strict=True):
                ip("link", "set", device, "netns", space)
            wire = Wire(files, delay, loss)
            wire.start()
        else:
            ends = [["name", d, "netns", s] for s, d in zip(hosts.spaces, hosts.devices, strict=True)]
            ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        for host, (space, device) in enumerate(zip(hosts.spaces, hosts.devices, strict=True)):
            ip("-n", space, "addr", "add", f"{address(host)}/24", "dev", device)
            ip("-n", space, "link", "set", device, *(["mtu", str(LARGE)] if files else []), "up")
            if rate:
                limit = ["root", "tbf", "rate", rate, "burst", "32k", "latency", "400ms"]
                subprocess.run(["tc", "-n", space, "qdisc", "add", "dev", device, *limit], check=True)
        yield hosts
    finally:
        if wire:
            wire.ended = True
            wire.join()
        for process in hosts.running:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        for space in hosts.spaces:
            kill_all(space)
            subprocess.run(["ip", "netns", "del", space], capture_output=True)
            shutil.rmtree(ETC / space, ignore_errors=True)
        with contextlib.suppress(OSError):
            ETC.rmdir()
        for file in files:
            os.close(file)
