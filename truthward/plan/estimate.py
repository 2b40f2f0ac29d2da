"""A recipe's stages on a cluster: what each takes, and the smallest stage of ZeRO and micro-batch that fit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from truthward import chat
from truthward.check.facts import Facts
from truthward.check.machine import FULL
from truthward.check.memory import Job, Memory, job_of, peak
from truthward.plan.cost import Learning, Step, rollout, step, volume
from truthward.plan.goodput import Goodput, goodput
from truthward.plan.machines import Cluster, Kind
from truthward.records import Prompt

PLANNED = ("sft", "reward", "dpo", "ppo")
STATE = 12  # bytes a trained parameter in a checkpoint: fp32 weights and both moments


class Place(NamedTuple):
    """Stage of ZeRO, rows of a micro-batch, whether layers are computed twice; memory of a rank, and whether it fits."""

    zero: int
    micro: int
    recompute: bool
    memory: Memory
    fits: bool


class Estimate(NamedTuple):
    """A stage.

    Attributes:
        place: as the recipe (or the command line) has it.
        better: the smallest stage of ZeRO, and the largest micro-batch, that fit, where the former does not.
        sent: bytes that a rank sends in an optimizer step.
        step: an optimizer step.
        tokens: a second, over all ranks: trained on, or for PPO sampled.
        utilisation: of the model's FLOPs.
        useful: seconds without failures.
        goodput: what failures and stragglers leave.
        busy: ranks that have a row in each step.
    """

    stage: str
    place: Place
    better: Place | None
    sent: float
    step: Step
    tokens: float
    utilisation: float
    useful: float
    goodput: Goodput
    busy: int

    @property
    def seconds(self) -> float:
        """With failures and stragglers."""
        return self.useful * (1 + self.goodput.stragglers) / self.goodput.goodput


class Rows(NamedTuple):
    """What a stage's optimizer steps are made of: rows and tokens of a step over all ranks, context of a token, steps."""

    rows: int
    tokens: float
    context: float
    steps: int


def width_on(facts: Facts, kind: Kind) -> int:
    """Bytes of the compute type there."""
    wanted = facts.recipe.model.dtype
    return 4 if wanted == "float32" or (wanted == "auto" and kind.device == "cpu") else 2


def estimates(facts: Facts, cluster: Cluster, zero: int | None = None) -> Iterator[Estimate]:
    """Each trained stage of the recipe whose model and rows are known.

    Args:
        zero: stage of ZeRO; by default the recipe's.
    """
    for stage, _ in facts.uses(*PLANNED):
        if found := _estimate(facts, stage, cluster, facts.recipe.launch.zero if zero is None else zero):
            yield found


def _estimate(facts: Facts, stage: str, cluster: Cluster, zero: int) -> Estimate | None:
    table, width = getattr(facts.recipe, stage), width_on(facts, cluster.kind)
    job = job_of(facts, stage, width)
    if job is None:
        return None
    micro = 1 if stage == "sft" and table.packing else table.micro_batch_size
    place = _at(facts, stage, cluster, zero, micro, facts.recipe.launch.gradient_checkpointing)
    better = None if place.fits else smallest(facts, stage, cluster, micro)
    chosen = better or place
    rows = _rows(facts, stage)
    busy = min(cluster.devices, rows.rows)
    micros = math.ceil(rows.rows / (busy * chosen.micro))
    models = 2 if stage == "ppo" and table.advantage == "gae" else 1
    sent_width = width if chosen.zero else job.states.gradient  # DDP sends adapters' gradients in fp32
    passes = 1 if stage == "dpo" else 0
    learning = Learning(job.shape, job.states.trained, sent_width, passes, models, chosen.recompute)
    one = step(learning, cluster, rows.tokens / busy, rows.context, chosen.zero, micros)
    useful, tokens = rows.steps * one.seconds, rows.tokens
    flops = rows.steps * learning.useful(rows.tokens, rows.context)
    if stage == "ppo":
        more, flops_more = _experience(facts, learning, cluster, width)
        useful, flops = useful + table.iterations * more, flops + table.iterations * flops_more
        sampled = table.iterations * table.rollouts * table.max_new_tokens
    speed = (sampled if stage == "ppo" else rows.steps * tokens) / useful
    utilisation = flops / (useful * cluster.devices * cluster.kind.peak)
    sent = volume(learning, chosen.zero, cluster.devices, micros)
    left = goodput(cluster.devices, cluster.hosts, STATE * job.states.trained)
    return Estimate(stage, place, better, sent, one, speed, utilisation, useful, left, busy)


def _at(facts: Facts, stage: str, cluster: Cluster, zero: int, micro: int, recompute: bool) -> Place:
    job = job_of(facts, stage, width_on(facts, cluster.kind), micro)
    assert job
    memory = peak(placed(job, cluster, zero)._replace(recompute=recompute), cluster.kind.device)
    return Place(zero, micro, recompute, memory, memory.total <= FULL * cluster.kind.memory)


def placed(job: Job, cluster: Cluster, zero: int) -> Job:
    """A job with so many ranks, under a stage of ZeRO."""
    return job._replace(ranks=cluster.devices, zero=zero if cluster.devices > 1 else 0)


def smallest(facts: Facts, stage: str, cluster: Cluster, micro: int) -> Place | None:
    """The smallest stage of ZeRO at which a micro-batch fits; if none does, stage 3 with the largest that fits.

    Layers are computed twice only where a micro-batch of one does not fit otherwise.
    """
    stages = range(4) if cluster.devices > 1 else range(1)
    tries = [(zero, micro, facts.recipe.launch.gradient_checkpointing) for zero in stages]
    while micro > 1:
        micro //= 2
        tries.append((stages[-1], micro, tries[0][2]))
    tries.append((stages[-1], 1, True))
    found = (_at(facts, stage, cluster, *one) for one in tries)
    return next((place for place in found if place.fits), None)


def _rows(facts: Facts, stage: str) -> Rows:
    table = getattr(facts.recipe, stage)
    if stage == "ppo":
        length = _prompt(facts) + table.max_new_tokens
        rows = table.rollouts // table.minibatches
        return Rows(rows, rows * length, length / 2, table.iterations * table.epochs * table.minibatches)
    lengths = facts.tokens(stage)
    total, count = sum(lengths), facts.sequences(stage)
    a_row = total / max(1, count)
    context = table.max_length if stage == "sft" and table.packing else a_row / 2  # a packed row's scores are all made
    steps = max(1, math.ceil(table.epochs * count / table.batch_size))
    return Rows(table.batch_size, table.batch_size * a_row, context, steps)


def _prompt(facts: Facts) -> float:
    """Mean tokens of PPO's prompts."""
    lengths = facts.lengths([facts.render(chat.user(p.prompt)) for p in facts.rows(facts.recipe.ppo.prompts, Prompt)])
    return sum(lengths) / max(1, len(lengths))


def _experience(facts: Facts, learning: Learning, cluster: Cluster, width: int) -> tuple[float, float]:
    """Seconds and operations of an iteration's rollout and of its scores: policy, reference, critic, preference model."""
    table, prompt = facts.recipe.ppo, _prompt(facts)
    share = table.rollouts / min(cluster.devices, table.rollouts)
    scored = 2 + (table.advantage == "gae") + ("reward" in table.rewards)
    sampled = rollout(learning.shape, cluster, share, prompt, table.max_new_tokens, width)
    length = prompt + table.max_new_tokens
    scores = Learning(learning.shape, 0, width, passes=scored, models=0)
    flops = scores.flops(share * length, length / 2)
    generated = Learning(learning.shape, 0, width, passes=1, models=0).flops(table.rollouts * length, length / 2)
    seconds = sampled.seconds + flops / (cluster.kind.peak * cluster.kind.share)
    return seconds, generated + scores.flops(table.rollouts * length, length / 2)
