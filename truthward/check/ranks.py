"""Whether all ranks are about to run the same thing, and how fast the links between them are.

``python -m torch.distributed.run --nproc-per-node=N -m truthward.check.ranks RECIPE``; across hosts, by the same words as
the run itself (``truthward launch RECIPE`` prints them). ``truthward check`` and ``truthward run`` start it where there is
more than one rank.
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
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

from truthward import launch, provenance
from truthward.check.facts import Facts
from truthward.check.findings import Finding, Found, error, rule
from truthward.check.links import STALL, Link, judge_links, price
from truthward.check.machine import Machine, elsewhere
from truthward.errors import UserError
from truthward.fingerprint import digest, hash_code
from truthward.ledger import CODE, plan, write_text
from truthward.recipe import load_recipe
from truthward.stage import arguments, guarded
from truthward.tables import Recipe

SMALL, LARGE = 8, (1 << 16, 1 << 19, 1 << 22)  # bytes of a message that measures the latency, and the bandwidth
ENOUGH = 0.1  # seconds from which a message is large enough to tell a link's bandwidth
TIMES, PROBES = 15, 60  # large messages, and small ones
AT_MOST = 90  # seconds that all links together may take, twice
MANY = 16  # ranks over which only neighbours in the ring are measured
PATIENCE = 300  # seconds that ranks wait for each other
OUT = "TRUTHWARD_RANKS_OUT"  # file to which the first rank of each host writes what was found
FIX = "see whether a firewall, a wrong host name or network interface parts them (docs/launch.md)"
WHY = "the run would hang at its first step"


@rule("ranks-differ", "link-slow", "links", "ranks-silent")
def ranks(facts: Facts) -> Found:
    """Start as many processes as the run will have and let them compare notes; on all hosts, where these have met."""
    recipe, machine = facts.recipe, Machine.here()
    if launch.MET not in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:  # the others are not about to do the same
        recipe = recipe.model_copy(update={"launch": recipe.launch.model_copy(update={"hosts": 1})})
    count, most = recipe.launch.ranks, max(machine.gpus or machine.cores, 2)
    if recipe.launch.world == 1 or elsewhere(facts, machine) or not facts.planned or count > most:
        return  # what is not here, or too many for it, is found elsewhere
    with tempfile.TemporaryDirectory() as scratch:
        path, out = Path(scratch) / "recipe.json", Path(scratch) / "found.json"
        path.write_text(facts.recipe.model_dump_json(), encoding="utf-8")
        try:
            done = subprocess.run(
                launch.command(recipe, launch.CHECK, [str(path)]),
                env={**os.environ, OUT: str(out), "OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
                timeout=PATIENCE,
            )
            said = next(iter(done.stderr.strip().splitlines()[::-1]), "")
        except subprocess.TimeoutExpired:
            said = f"no answer in {PATIENCE} s"
        if not out.exists():
            text = f"{recipe.launch.world} processes could not reach each other: {said[:200]}"
            yield error("ranks-silent", "launch.ranks", text, why=WHY, fix=FIX)
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


# ------------------------------------------------------------------------------------------------------ on every rank


def measure(device: Any, hosts: list[str]) -> list[Link]:
    """Latency and bandwidth pair by pair, while the others wait; the process group must be there. The same list on all.

    Raises:
        UserError: a message did not arrive in time; names the two.
    """
    import torch.distributed as dist

    me, count = dist.get_rank(), dist.get_world_size()
    pairs = list(combinations(range(count), 2))
    if count > MANY:
        pairs = [(rank, (rank + 1) % count) for rank in range(count)]
    links = []
    for a, b in pairs:
        try:
            dist.barrier()
            if me == a:
                links.append(_time(a, b, device, AT_MOST / len(pairs)))
            elif me == b:
                _answer(a, device)
        except RuntimeError as fault:
            lines = str(fault).splitlines()
            what = f"a message between ranks {a} ({hosts[a]}) and {b} ({hosts[b]}) did not arrive: {lines[0][:200]}"
            raise UserError(what, where="launch.ranks", fix=FIX) from fault
    found: list[Any] = [None] * count
    dist.all_gather_object(found, links)
    return [Link(*link) for some in found for link in some]


def _time(a: int, b: int, device: Any, seconds: float) -> Link:
    """Send messages to and fro; larger ones until they take long enough, and so many as fit into the time."""
    small, size = _trips(b, SMALL, PROBES, device, seconds), LARGE[0]
    for size in LARGE:
        if _trip(b, size, device) > ENOUGH:
            break
    large = _trips(b, size, TIMES, device, seconds)
    _trip(b, 0, device)
    latency, fastest = min(small), min(large)
    late = [t - best for trips, best in ((small, latency), (large, fastest)) for t in trips if t - best > STALL]
    sent = len(small) + len(large)
    bandwidth = size / max(fastest - latency, fastest / 2)  # latency is noisy, too
    return Link(a, b, latency, bandwidth, len(late) / sent, sum(late) / sent)


def _trips(other: int, size: int, times: int, device: Any, seconds: float) -> list[float]:
    """Seconds of half a round trip, so many times as fit; the first is for warming up."""
    until = time.monotonic() + seconds
    taken = [_trip(other, size, device), _trip(other, size, device)]
    while len(taken) <= times and time.monotonic() < until:
        taken.append(_trip(other, size, device))
    return taken[1:]


def _trip(other: int, size: int, device: Any) -> float:
    """Announce a message, send it and get it back; a size of 0 is the last."""
    import torch
    import torch.distributed as dist

    dist.send(torch.tensor([size], device=device), other)
    if not size:
        return 0.0
    message, begun = torch.zeros(size, dtype=torch.uint8, device=device), time.perf_counter()
    dist.send(message, other)
    dist.recv(message, other)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - begun) / 2


def _answer(other: int, device: Any) -> None:
    """The other end of :func:`_trip`."""
    import torch
    import torch.distributed as dist

    size = torch.zeros(1, dtype=torch.int64, device=device)
    while True:
        dist.recv(size, other)
        if not (count := int(size.item())):
            return
        message = torch.zeros(count, dtype=torch.uint8, device=device)
        dist.recv(message, other)
        dist.send(message, other)


def confer(recipe: Recipe, cost: Callable[[Link], str] = lambda link: "") -> list[Finding]:
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
    found = list(differences(identities, hosts))
    try:
        return [*found, *judge_links(measure(device, hosts), hosts, cost)]
    except UserError as fault:
        return [*found, error("ranks-silent", fault.where, fault.what, why=WHY, fix=fault.fix)]


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
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(seconds=PATIENCE * 2 / 3))
        tells = int(os.environ["LOCAL_RANK"]) == 0
        found = confer(recipe, partial(price, Facts(recipe, options.recipe)) if tells else lambda link: "")
        if tells and (out := os.environ.get(OUT)):
            write_text(Path(out), json.dumps([dataclasses.asdict(f) for f in found]))
        elif dist.get_rank() == 0:
            print("\n".join(f"{f.level}: {f}" for f in found))
        dist.destroy_process_group()
        if any(f.level == "error" for f in found):
            sys.exit(UserError.exit_code)

    sys.exit(guarded(work))


if __name__ == "__main__":
    main()
