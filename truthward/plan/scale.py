"""The tables of ``docs/scale.md``: ``python -m truthward.plan.scale``. Llama 3's sizes on 8 to 100,000 GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from truthward.check.facts import KNOWN, Shape
from truthward.check.machine import FULL
from truthward.check.memory import HEAD_TOKENS, Job, States, peak
from truthward.plan import published
from truthward.plan.cost import Learning, Step, step
from truthward.plan.estimate import STATE
from truthward.plan.goodput import Goodput, goodput
from truthward.plan.machines import KINDS, Cluster
from truthward.plan.show import spoken

MODELS = ("llama-3.2-1b", "llama-3.1-8b", "llama-3.1-70b", "llama-3.1-405b")
GPUS = (8, 64, 512, 4096, 32768, 100_000)
LENGTHS = (4096, 2048, 1024, 512, 256)
BATCH = 16e6  # tokens of a step beyond which no published run goes (Llama 3 405B: 16M)
RANK = 16  # of LoRA


class Point(NamedTuple):
    """A model on so many GPUs, one packed row a rank; ``length`` is the longest row that fits, 0 where none does."""

    model: str
    gpus: int
    zero: int
    length: int
    memory: float
    step: Step
    tokens: float
    utilisation: float
    goodput: Goodput
    busy: int


def point(model: str, gpus: int, kind: str = "h100-80gb", *, lora: bool = False) -> Point:
    """The smallest stage of ZeRO at which the longest row fits, and what it comes to."""
    shape, cluster = Shape.of(KNOWN[model]), Cluster.of(KINDS[kind], gpus)
    trained = shape.adapter(RANK) if lora else shape.parameters
    state = States(2 * shape.parameters, trained, 4, 4, 8) if lora else States(0, trained, 2, 2, 4)
    length, zero, memory = _longest(shape, state, cluster, RANK if lora else 0)
    left = goodput(gpus, cluster.hosts, STATE * trained)
    if not length:
        return Point(model, gpus, 3, 0, memory, Step(0, 0, 0), 0, 0, left, 0)
    busy = min(gpus, int(BATCH / length))
    learning = Learning(shape, trained, 2)
    one = step(learning, cluster, length, length, zero)
    tokens = busy * length / (one.seconds * (1 + left.stragglers)) * left.goodput
    useful = learning.useful(1, length) * tokens / (gpus * cluster.kind.peak)
    return Point(model, gpus, zero, length, memory, one, tokens, useful, left, busy)


def _longest(shape: Shape, states: States, cluster: Cluster, rank: int) -> tuple[int, int, float]:
    """Tokens of the longest row that fits, the smallest stage of ZeRO, bytes; or 0 tokens, with those of the shortest."""
    memory = 0.0
    for length in LENGTHS:
        for zero in (1, 2, 3):
            logits = 3.0 * HEAD_TOKENS * shape.vocabulary * 4
            job = Job(shape, states, rank, 2, (length, length, 0), logits, ranks=cluster.devices, zero=zero)
            memory = peak(job, cluster.kind.device).total
            if memory <= FULL * cluster.kind.memory:
                return length, zero, memory
    return 0, 3, memory


def breaks(one: Point) -> str:
    """What gives way first."""
    if not one.length:
        return f"memory: {one.memory / 2**30:,.0f} GB a rank for a row of {LENGTHS[-1]}"
    losses = {
        "batch: ranks without a row": 1 - one.busy / one.gpus,
        "network": one.step.exposed / one.step.seconds,
        "failures": 1 - one.goodput.goodput,
        "stragglers": one.goodput.stragglers / (1 + one.goodput.stragglers),
    }
    worst = max(losses, key=lambda name: losses[name])
    if losses[worst] < 0.05:
        return "rows cut short by memory" if one.length < LENGTHS[0] else "nothing yet"
    return f"{worst} ({losses[worst]:.0%} lost)"


def lines(*, lora: bool) -> Iterator[str]:
    """A table of all models and numbers of GPUs."""
    columns = "model, GPUs, ZeRO, row, GB a rank, tokens/s, MFU, goodput, a failure every, checkpoint every, breaks first"
    yield f"| {columns.replace(', ', ' | ')} |"
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    for model in MODELS:
        for gpus in GPUS:
            one = point(model, gpus, lora=lora)
            left = (
                f"{one.goodput.goodput:.1%} | {spoken(one.goodput.mtbf)} | {spoken(one.goodput.interval)} | {breaks(one)} |"
            )
            head = f"| {model.removeprefix('llama-')} | {gpus:,} | {one.zero} | {one.length or 'none'} "
            speed = f"{one.tokens:,.0f} | {one.utilisation:.0%}" if one.length else "- | -"
            yield f"{head}| {one.memory / 2**30:,.0f} | {speed} | {left}"


def main() -> None:
    """Print the tables."""
    for lora in (False, True):
        print(f"\n{'LoRA of rank 16' if lora else 'All weights'}, h100-80gb\n", *lines(lora=lora), sep="\n")
    print("\nPublished\n", *published.lines(), sep="\n")
    print(f"\nDeepSpeed-Chat OPT-13B: {published.chat_hours():.1f} hours by the model, 9 published")


if __name__ == "__main__":
    main()
