"""Kinds of machines: what a device has by its maker's data sheet, and what an hour of it is assumed to cost."""

from __future__ import annotations

import difflib
import math
from typing import NamedTuple

from truthward.check.memory import GB, Device
from truthward.errors import UserError

ACROSS, WITHIN = 10e-6, 3e-6  # assumed: seconds until a message reaches another host, another device of the same


class Kind(NamedTuple):
    """A kind of device, on hosts of eight.

    Attributes:
        memory: bytes that a process can have.
        peak: dense bf16 FLOP/s.
        bandwidth: of its memory, bytes a second.
        intra, inter: of its links within the host and out of it, bytes a second each way.
        share: of the peak that a training step reaches where nothing waits for the network; ``basis`` says from where.
        price: US dollars an hour and device, assumed.
        basis: how ``share`` is known.
        source: of the rest.
        device: what the memory model calls it.
        hosts_of: devices of a host.
    """

    memory: float
    peak: float
    bandwidth: float
    intra: float
    inter: float
    share: float
    price: float
    basis: str
    source: str
    device: Device = "cuda"
    hosts_of: int = 8


SHEET = "its maker's data sheet (dense, no sparsity); links out of a host assumed"
KINDS = {
    "h100-80gb": Kind(80e9, 989.4e12, 3.35e12, 450e9, 50e9, 0.45, 2.5, "fitted", "NVIDIA H100 SXM data sheet; 400 Gbit/s"),
    "h200-141gb": Kind(141e9, 989.4e12, 4.8e12, 450e9, 50e9, 0.45, 3.5, "as h100", "NVIDIA H200 SXM data sheet; 400 Gbit/s"),
    "a100-80gb": Kind(80e9, 312e12, 2.039e12, 300e9, 25e9, 0.65, 1.5, "fitted", "NVIDIA A100 SXM data sheet; 200 Gbit/s"),
    "l40s-48gb": Kind(48e9, 362e12, 864e9, 32e9, 12.5e9, 0.45, 1.0, "assumed", "NVIDIA L40S data sheet, PCIe 4; 100 Gbit/s"),
    "b200-192gb": Kind(192e9, 2250e12, 7.7e12, 900e9, 50e9, 0.4, 5.0, "assumed", "NVIDIA HGX B200 data sheet; 400 Gbit/s"),
    "mi300x-192gb": Kind(192e9, 1307.4e12, 5.3e12, 448e9, 50e9, 0.35, 2.5, "assumed", "AMD MI300X data sheet; 400 Gbit/s"),
    "cpu": Kind(
        *(16 * GB, 0.3e12, 20e9, 5e9, 0.125e9, 0.4, 0.1),
        *("measured (docs/check.md)", "two cores with AVX2: measured in fp32; 1 Gbit/s", "cpu", 1),
    ),
}


def kind(name: str) -> Kind:
    """A kind by its name.

    Raises:
        UserError: there is none, with the nearest.
    """
    if name not in KINDS:
        near = difflib.get_close_matches(name.casefold(), KINDS, n=1, cutoff=0.3)
        fix = f"did you mean {near[0]}? They are {', '.join(KINDS)}" if near else f"they are {', '.join(KINDS)}"
        raise UserError(f"there is no kind {name!r} of machine", where="--kind", fix=fix)
    return KINDS[name]


class Cluster(NamedTuple):
    """So many devices of a kind on so many hosts."""

    kind: Kind
    devices: int
    hosts: int

    @property
    def local(self) -> int:
        """Devices of a host."""
        return self.devices // self.hosts

    @classmethod
    def of(cls, kind: Kind, devices: int, hosts: int = 0) -> Cluster:
        """Spread over hosts evenly; of eight devices each where their number is not given.

        Raises:
            UserError: a number is not positive, or does not divide.
        """
        if devices < 1:
            raise UserError(f"{devices} GPUs are none", where="--gpus", fix="give 1 or more")
        hosts = hosts or math.ceil(devices / kind.hosts_of)
        if hosts < 1 or devices % hosts:
            right = next(n for n in range(min(devices, max(1, hosts)), 0, -1) if devices % n == 0)
            text = f"{devices} devices do not spread evenly over {hosts} hosts"
            more = f"--gpus {math.ceil(devices / max(1, hosts)) * max(1, hosts)} or --hosts {right}"
            raise UserError(text, where="--hosts", fix=f"take {more}")
        return cls(kind, devices, hosts)

    def pass_time(self, size: float, messages: float = 1) -> float:
        """Seconds in which ``size`` bytes are gathered by all, or summed and scattered, over rings.

        A ring of n moves size * (n - 1) / n through each link in n - 1 steps. Within a host first, then each device with
        those of its place in the other hosts, which is what NCCL's rings over hosts with one network card a device come to.

        Args:
            size: of the whole, in bytes.
            messages: into how many it is cut; each waits for the ring's latency.
        """
        local, hosts = self.local, self.hosts
        within = size * (local - 1) / local / self.kind.intra + messages * (local - 1) * WITHIN
        across = size / local * (hosts - 1) / hosts / self.kind.inter + messages * (hosts - 1) * ACROSS
        return within + across
