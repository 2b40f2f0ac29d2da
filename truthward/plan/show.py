"""``truthward plan``: what a recipe would take on so many devices of a kind, as tables."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from truthward.check.facts import Facts
from truthward.check.machine import FULL
from truthward.check.memory import GB
from truthward.console import console, say
from truthward.errors import UserError
from truthward.plan.estimate import Estimate, estimates, width_on
from truthward.plan.machines import Cluster, kind
from truthward.tables import Recipe

COLUMNS = ("stage", "ZeRO", "micro", "GB a rank", "fits", "sent a step", "s a step", "tokens/s", "MFU", "time", "cost $")


def show(
    recipe: Recipe, where: str, *, gpus: int, name: str, hosts: int = 0, price: float | None = None, zero: int | None = None
) -> list[Estimate]:
    """Print the plan.

    Args:
        recipe: the resolved recipe.
        where: its file.
        gpus: devices in all.
        name: of their kind.
        hosts: 0: eight devices each.
        price: dollars an hour and device; None: the kind's.
        zero: stage of ZeRO; None: the recipe's.

    Raises:
        UserError: no such kind, numbers that are none, or a model whose sizes are not known.
    """
    if price is not None and not 0 <= price < float("inf"):
        raise UserError(f"{price} is no price", where="--price", fix="give dollars an hour and device")
    cluster, facts = Cluster.of(kind(name), gpus, hosts), Facts(recipe, where)
    found = list(estimates(facts, cluster, zero))
    if not found:
        text = "nothing to plan: the model's sizes or the rows are not known"
        raise UserError(text, where="model.base", fix="give a folder with its config.json, or a size that is known")
    price = cluster.kind.price if price is None else price
    say(f"[bold]{gpus} x {name}[/] on {cluster.hosts} host{'s' * (cluster.hosts > 1)}, ${price:g} an hour each")
    table = Table(*COLUMNS, box=None)
    for one in found:
        table.add_row(*cells(one, cluster, price))
    console.print(table)
    seconds = sum(one.seconds for one in found)
    say(f"in all {seconds / 86400:.2f} days, ${money(seconds, cluster, price):,.0f}; constitution, distill and evals apart")
    for line in [*remarks(found, cluster), *alone(facts, cluster)]:
        say(f"  {line}")
    say(f"[dim]{provenance(cluster)}[/]")
    return found


def money(seconds: float, cluster: Cluster, price: float) -> float:
    """Of all devices for so long."""
    return seconds / 3600 * cluster.devices * price


def cells(one: Estimate, cluster: Cluster, price: float) -> list[str]:
    """A row of the table."""
    place = one.place
    return [
        *(one.stage, str(place.zero), str(place.micro), f"{place.memory.total / GB:.1f}", "yes" if place.fits else "no"),
        *(f"{one.sent / 1e6:,.0f} MB", f"{one.step.seconds:.3g}", f"{one.tokens:,.0f}", f"{one.utilisation:.0%}"),
        *(spoken(one.seconds), f"{money(one.seconds, cluster, price):,.2f}"),
    ]


def spoken(seconds: float) -> str:
    """A length of time in the unit that suits it."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def remarks(found: list[Estimate], cluster: Cluster) -> Iterator[str]:
    """What does not fit and what would; ranks without work; what the network and failures take."""
    for one in found:
        if not one.place.fits and one.better:
            better, gb = one.better, one.better.memory.total / GB
            twice = ", launch.gradient_checkpointing" if better.recompute and not one.place.recompute else ""
            yield f"{one.stage}: fits with launch.zero = {better.zero}{twice}, micro-batch {better.micro} ({gb:.1f} GB)"
        elif not one.place.fits:
            yield f"{one.stage}: fits at no stage of ZeRO; its largest row alone is too long, or the model too large"
        if one.busy < cluster.devices:
            text = f"{one.stage}: {cluster.devices - one.busy} of {cluster.devices} ranks have no row in a step"
            yield f"{text}; a batch of {cluster.devices} is needed"
        if one.step.exposed > 0.2 * one.step.seconds:
            share = one.step.exposed / one.step.seconds
            yield f"{one.stage}: {share:.0%} of a step waits for the network"
        if one.place.memory.host:
            yield f"{one.stage}: {one.place.memory.host * cluster.local / GB:.0f} GB in each host's memory"
    left = max(found, key=lambda one: one.goodput.write).goodput
    text = f"a device fails about every {spoken(left.mtbf)}; a checkpoint each {spoken(left.interval)} costs least"
    yield f"{text}, goodput {left.goodput:.1%}, stragglers take {left.stragglers:.1%}"


def alone(facts: Facts, cluster: Cluster) -> Iterator[str]:
    """Stages that one process does, where a device does not hold the model."""
    whole = facts.shape.parameters * width_on(facts, cluster.kind)
    stages = [stage for stage in ("constitution", "distill") if stage in facts.recipe.stages] + ["evals"]
    if whole > FULL * cluster.kind.memory:
        text = f"{', '.join(stages)}: one process holds the whole model, {whole / GB:.0f} GB"
        yield f"{text}, and a device has {cluster.kind.memory / GB:.0f}; run them on a larger one"


def provenance(cluster: Cluster) -> str:
    """Which numbers are measured, which have a source, which are assumed."""
    kind = cluster.kind
    memory = (
        "checked against runs on CPUs of 1 and 2 ranks" if kind.device == "cpu" else "by the CPU's model, no GPU measured"
    )
    return (
        f"memory: {memory}; peak, memory and links: {kind.source}; share of the peak {kind.share:.0%}: {kind.basis}; "
        "failures: Llama 3's published rate; price, restart, jitter, disk, overlap: assumed (docs/scale.md)"
    )
