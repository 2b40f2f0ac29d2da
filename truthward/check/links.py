"""What the links between ranks are like, and what the slow ones cost a step of each stage."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from truthward.check import machine
from truthward.check.facts import TRAINED, Facts
from truthward.check.findings import Found, note, warning
from truthward.check.memory import micro_batches

SLOW = 4  # times slower than a good link of the same run
GIGABIT = 125e6  # bytes a second, below which a link is slow whatever the others are
LATE = 5e-3  # seconds, from which it is late whatever the others are; a network in one room takes 1e-5 to 5e-4
STALL = 0.08  # seconds over the fastest; a lost message is sent again after 0.2 (TCP_RTO_MIN of Linux), both ways
LOSSY = 0.02  # share of messages that stall
BUCKET = 25e6  # bytes of gradients that are sent at once (torch's DistributedDataParallel)


class Link(NamedTuple):
    """Two ranks, half a round trip of a small message in seconds, and bytes a second of a large one.

    ``stalled`` is the share of messages that took so much longer that they were lost on the way and sent again, and
    ``lost`` the seconds that this adds to a message on average.
    """

    a: int
    b: int
    latency: float
    bandwidth: float
    stalled: float = 0.0
    lost: float = 0.0


class Traffic(NamedTuple):
    """What a rank sends in an optimizer step: bytes, and messages of which each waits for the one before."""

    size: float
    messages: float

    def seconds(self, link: Link) -> float:
        """How long it takes on a link, of which every message of a ring crosses one."""
        return self.size / link.bandwidth + self.messages * (link.latency + link.lost)


def traffic(facts: Facts, stage: str, width: int) -> Traffic | None:
    """What a step of a stage sends over the ring of ranks (Rajbhandari et al. 2020, arXiv 1910.02054, section 7).

    With N ranks every reduction or gathering of S bytes sends S (N - 1) / N, in N - 1 messages. Stages 0 and 1 reduce and
    gather the gradients once a step; stage 2 reduces them in every micro-batch; stage 3 gathers all weights, also those that
    are not trained, for each pass of a micro-batch forward or back, one layer at a time.

    Args:
        width: bytes of the compute type.

    Returns:
        None where the model's sizes are not known.
    """
    shape, table, launch = facts.shape, getattr(facts.recipe, stage), facts.recipe.launch
    lora, ranks = table.tune == "lora", launch.world
    if not (shape.layers if lora else shape.parameters):
        return None
    trained = shape.adapter(table.lora_rank) if lora else shape.parameters
    if critic := stage == "ppo" and table.advantage == "gae":
        trained += shape.adapter(table.lora_rank)
    gradients = trained * (4 if lora or stage == "ppo" else width)
    weights = shape.parameters * width
    passes, buckets = micro_batches(facts, stage), math.ceil(gradients / BUCKET)
    if launch.zero < 2:
        size, collectives = 2 * gradients, 2 * buckets
    elif launch.zero == 2:
        size, collectives = (passes + 1) * gradients, (passes + 1) * buckets
    else:
        gathered = 3 if stage == "dpo" else 4 if critic else 2  # DPO's reference, PPO's critic
        size, collectives = passes * (gradients + gathered * weights), passes * (gathered + 1) * max(shape.layers, buckets)
    return Traffic(size * (ranks - 1) / ranks, collectives * (ranks - 1))


def price(facts: Facts, link: Link) -> str:
    """What a link does to a step of each stage, in words; nothing where it is not known."""
    told, width = [], machine.chosen_width(facts)
    for stage, _ in facts.uses(*TRAINED):
        sent, steps = traffic(facts, stage, width), facts.steps(stage)
        work = machine.flops(facts, stage) if steps else 0
        if sent and work:
            alone = work / steps / machine.speed(facts)
            told.append(f"of {stage} {_brief(alone + sent.seconds(link))} instead of {_brief(alone)}")
    return f"a step {', '.join(told)}" if told else ""


def _brief(seconds: float) -> str:
    """Two digits, in the unit that fits."""
    if seconds < 1:
        return f"{1e3 * seconds:.{0 if seconds >= 0.01 else 2}f} ms"
    return f"{seconds:.1f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def _rate(bandwidth: float) -> str:
    return f"{bandwidth / 1e9:.1f} GB/s" if bandwidth >= 1e9 else f"{bandwidth / 1e6:.{0 if bandwidth >= 1e7 else 2}f} MB/s"


def judge_links(links: list[Link], hosts: list[str], cost: Callable[[Link], str] = lambda link: "") -> Found:
    """The slowest links by name, whether they lag behind the others, and what they cost.

    Args:
        links: as measured.
        hosts: of every rank.
        cost: what a link does to a run, in words.
    """
    if not links:
        return
    slowest, latest = min(links, key=lambda link: link.bandwidth), max(links, key=lambda link: link.latency)
    lossiest = max(links, key=lambda link: link.stalled)
    good = sorted((link.bandwidth for link in links), reverse=True)[len(links) // 4]  # one slow rank of four slows half
    waits = sorted(link.latency for link in links)[len(links) // 4]

    def slow(link: Link, told: str, fix: str) -> Found:
        why = "every step waits for the slowest link" + (f": {priced}" if (priced := cost(link)) else "")
        yield warning("link-slow", "launch.ranks", f"between {_named(link, hosts)}: {told}", why=why, fix=fix)

    told = f"{_rate(slowest.bandwidth)}, a good link here {_rate(good)}"
    if good > SLOW * slowest.bandwidth or slowest.bandwidth < GIGABIT:
        yield from slow(slowest, told, "see the cable, the switch, and that the network interface is the right one")
    if latest.latency > min(LATE, max(SLOW * waits, 1e-3)):
        late = f"a message takes {_brief(latest.latency)}, on a good link here {_brief(waits)}"
        yield from slow(latest, late, "put the hosts into one room, and see that the network interface is the right one")
    if lossiest.stalled > LOSSY:
        lost = f"{lossiest.stalled:.0%} of messages stall, and take {_brief(lossiest.lost / lossiest.stalled)} more"
        yield from slow(lossiest, lost, "messages are lost and sent again, or a host is busy otherwise: see cable and port")
    text = f"{len(links)} links; slowest between {_named(slowest, hosts)}: {told}; a message takes {_brief(waits)}"
    yield note("links", "launch.ranks", text)


def _named(link: Link, hosts: list[str]) -> str:
    return f"ranks {link.a} ({hosts[link.a]}) and {link.b} ({hosts[link.b]})"
