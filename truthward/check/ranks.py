"""Whether all ranks are about to run the same thing, and how fast the links between them are.

``python -m torch.distributed.run --nproc-per-node=N -m truthward.check.ranks RECIPE``; across hosts, by the same words as
the run itself. ``truthward check`` and ``truthward run`` start it where ``launch.ranks`` is over 1.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from truthward import provenance
from truthward.check.facts import Facts
from truthward.check.findings import Finding, Found, error, note, rule, warning
from truthward.check.machine import Machine, elsewhere
from truthward.errors import UserError
from truthward.fingerprint import digest, hash_code
from truthward.ledger import CODE, plan
from truthward.recipe import load_recipe
from truthward.stage import arguments, guarded
from truthward.tables import Recipe

SMALL, LARGE = 8, 4 << 20  # bytes of a message that measures the latency, and the bandwidth
TIMES = 15
MANY = 16  # ranks over which only neighbours in the ring are measured
SLOW = 4  # times slower than a good link of the same run
GIGABIT = 125e6  # bytes a second
PATIENCE = 300
OUT = "TRUTHWARD_RANKS_OUT"  # file to which rank 0 writes what was found


class Link(NamedTuple):
    """Two ranks, half a round trip of a small message in seconds, and bytes a second of a large one."""

    a: int
    b: int
    latency: float
    bandwidth: float


@rule("ranks-differ", "link-slow", "links", "ranks-silent")
def ranks(facts: Facts) -> Found:
    """Start as many processes as the run will have and let them compare notes."""
    count, machine = facts.recipe.launch.ranks, Machine.here()
    if count == 1 or elsewhere(facts, machine) or not facts.planned or count > max(machine.gpus or machine.cores, 2):
        return  # what is not here, or too many for it, is found elsewhere
    with tempfile.TemporaryDirectory() as scratch:
        recipe, out = Path(scratch) / "recipe.json", Path(scratch) / "found.json"
        recipe.write_text(facts.recipe.model_dump_json(), encoding="utf-8")
        words = ["-m", "torch.distributed.run", f"--nproc-per-node={count}", "-m", "truthward.check.ranks", str(recipe)]
        try:
            done = subprocess.run(
                [sys.executable, *words],
                env={**os.environ, OUT: str(out), "OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
                timeout=PATIENCE,
            )
            said = next(iter(done.stderr.strip().splitlines()[::-1]), "")
        except subprocess.TimeoutExpired:
            said = f"no answer in {PATIENCE} s"
        if not out.exists():
            text = f"{count} processes could not reach each other: {said[:200]}"
            why = "the run would hang at its first step"
            yield error(
                "ranks-silent", "launch.ranks", text, why=why, fix="see whether a firewall or a wrong host name parts them"
            )
            return
        yield from (Finding(**found) for found in json.loads(out.read_text(encoding="utf-8")))


def identity(recipe: Recipe) -> dict[str, str]:
    """What must be the same on every rank, as digests."""
    try:
        data = digest({name: planned.data for name, planned in plan(recipe).items()})
    except UserError as fault:
        data = f"{fault.where}: {fault.what}"
    return {
        "recipe": digest(recipe.model_dump(mode="json")),
        "data": data,
        "code": digest([hash_code(CODE.get(stage, stage)) for stage in [*recipe.stages, "evals"]]),
        "packages": digest(provenance.surroundings()["packages"]),
        "python": platform.python_version(),
    }


def differences(identities: list[dict[str, str]], hosts: list[str]) -> Found:
    """Where ranks are not as most of them are."""
    for part in identities[0]:
        values = [found[part] for found in identities]
        usual = statistics.mode(values)
        odd = [f"{rank} on {hosts[rank]}" for rank, value in enumerate(values) if value != usual]
        if odd:
            text = f"the {part} of rank {', '.join(odd)} differ{'s' if len(odd) == 1 else ''} from the others'"
            why = "ranks would average gradients of different models, or wait for each other for ever"
            yield error(
                "ranks-differ", "launch.ranks", text, why=why, fix="copy one commit and one data folder to every host"
            )


def judge_links(links: list[Link], hosts: list[str]) -> Found:
    """The slowest link by name, and whether it lags behind the others."""
    if not links:
        return
    slowest, latest = min(links, key=lambda link: link.bandwidth), max(links, key=lambda link: link.latency)
    usual = sorted((link.bandwidth for link in links), reverse=True)[len(links) // 4]  # one slow rank of four slows half
    waits = sorted(link.latency for link in links)[len(links) // 4]

    def named(link: Link) -> str:
        return f"ranks {link.a} ({hosts[link.a]}) and {link.b} ({hosts[link.b]})"

    why = "every step waits for the slowest link"
    told = f"{slowest.bandwidth / 1e9:.2f} GB/s, a good link here {usual / 1e9:.2f}"
    if usual > SLOW * slowest.bandwidth or slowest.bandwidth < GIGABIT:
        text = f"between {named(slowest)}: {told}"
        yield warning(
            "link-slow", "launch.ranks", text, why=why, fix="see the cable, the switch or the network interface used"
        )
    if latest.latency > max(SLOW * waits, 1e-3):
        text = f"between {named(latest)}: {latest.latency * 1e6:.0f} µs, a good link here {waits * 1e6:.0f}"
        yield warning(
            "link-slow", "launch.ranks", text, why=why, fix="see the cable, the switch or the network interface used"
        )
    text = f"{len(links)} links; slowest between {named(slowest)}: {told}; latency {waits * 1e6:.0f} µs"
    yield note("links", "launch.ranks", text)


# ------------------------------------------------------------------------------------------------------ on every rank


def measure(device: Any) -> list[Link]:
    """Latency and bandwidth pair by pair, while the others wait; the process group must be there. The same list on all."""
    import torch.distributed as dist

    me, count = dist.get_rank(), dist.get_world_size()
    pairs = list(combinations(range(count), 2))
    if count > MANY:
        pairs = [(rank, (rank + 1) % count) for rank in range(count)]
    links = []
    for a, b in pairs:
        dist.barrier()
        if me in (a, b):
            latency = _round_trips(b if me == a else a, me == a, SMALL, device)
            each = _round_trips(b if me == a else a, me == a, LARGE, device)
            if me == a:
                links.append(Link(a, b, latency, LARGE / each))
    found: list[Any] = [None] * count
    dist.all_gather_object(found, links)
    return [Link(*link) for some in found for link in some]


def _round_trips(other: int, first: bool, size: int, device: Any) -> float:
    """Seconds of half a round trip, the fastest of several: what else the machine does is no fault of the link."""
    import torch
    import torch.distributed as dist

    message, seconds = torch.zeros(size, dtype=torch.uint8, device=device), []
    for _ in range(TIMES + 1):
        begun = time.perf_counter()
        steps = (dist.send, dist.recv) if first else (dist.recv, dist.send)
        for step in steps:
            step(message, other)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append((time.perf_counter() - begun) / 2)
    return min(seconds)


def confer(recipe: Recipe) -> list[Finding]:
    """Compare what each rank is about to run, and measure the links; the process group must be there."""
    import torch
    import torch.distributed as dist

    count, rank = dist.get_world_size(), dist.get_rank()
    nccl = dist.get_backend() == "nccl"
    device = torch.device("cuda", rank % torch.cuda.device_count()) if nccl else torch.device("cpu")
    if nccl:
        torch.cuda.set_device(device)
    told: list[Any] = [None] * count
    dist.all_gather_object(told, (identity(recipe), platform.node()))
    identities, hosts = [t[0] for t in told], [t[1] for t in told]
    return [*differences(identities, hosts), *judge_links(measure(device), hosts)]


def main() -> None:
    """Entry point of each rank."""
    import torch
    import torch.distributed as dist

    options = arguments("compare ranks before a run").parse_args()

    def work() -> None:
        if options.recipe.endswith(".json"):
            recipe = Recipe.model_validate_json(Path(options.recipe).read_text(encoding="utf-8"))
        else:
            recipe = load_recipe(options.recipe, options.overrides, options.why)
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        found = confer(recipe)
        if dist.get_rank() == 0:
            if out := os.environ.get(OUT):
                Path(out).write_text(json.dumps([dataclasses.asdict(f) for f in found]), encoding="utf-8")
            else:
                print("\n".join(f"{f.level}: {f}" for f in found))
        dist.destroy_process_group()

    sys.exit(guarded(work))


if __name__ == "__main__":
    main()
