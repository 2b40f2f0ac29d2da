"""How much memory a stage will take at its peak, part by part, on each rank and under each stage of ZeRO.

Weights, gradients and optimizer states are counted as Rajbhandari et al. 2020 (arXiv 1910.02054, section 3) count them, and
DeepSpeed's own copies and buffers as its code makes them. Activations are the tensors that autograd keeps of our layers,
counted by kind; what the allocator wastes on top of them was measured (``docs/check.md``). Units are bytes.
"""

from __future__ import annotations

import math
import random
from typing import Literal, NamedTuple

from truthward import chat
from truthward.check.facts import Facts, Shape
from truthward.records import Pair, Prompt

GB = 2**30
RUNTIME = {"cpu": 0.58 * GB, "cuda": 0.6 * GB}  # Python with torch, transformers, peft and TRL; or a CUDA context
DEEPSPEED = {"cpu": 0.03 * GB, "cuda": 0.1 * GB}  # its modules, and the process group
BUCKET = 50_000_000  # elements that are reduced together (truthward.zero)
PREFETCH = 50_000_000  # elements that ZeRO-3 gathers ahead (DeepSpeed's stage3_prefetch_bucket_size)
LIVE = 1_000_000_000  # elements that ZeRO-3 keeps whole between two uses (DeepSpeed's stage3_max_reuse_distance)
# what the allocator holds beyond live activations: glibc's heap is cut to pieces by tensors of ever new sizes, less so where
# each step has the same (packed sequences); CUDA's caching allocator rounds up
WASTE = {"cpu": {"packed": 1.55, "trees": 2.6}, "cuda": {"packed": 1.1, "trees": 1.25}}
HEAD_TOKENS, DISTILL_TOKENS = 256, 64  # positions whose logits are held at once (truthward.head, constitution.student)
SCORED = 16  # labelled pairs that the preference model scores in one pass


Device = Literal["cpu", "cuda"]
Offload = Literal["none", "optimizer", "all"]


class Memory(NamedTuple):
    """Peak of one rank, by part; ``host`` is what ZeRO keeps in the host's memory for it, and no part of its total."""

    runtime: float
    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    buffers: float = 0.0
    host: float = 0.0

    @property
    def total(self) -> float:
        return sum(self) - self.host


class States(NamedTuple):
    """What a model is trained with: parameters that are held, those that are trained, and bytes of each kind."""

    frozen: float
    trained: float
    weight: int
    gradient: int
    optimizer: int


def sharded(states: States, zero: int, ranks: int, layer: float = 0) -> tuple[float, float, float]:
    """Weights, gradients and optimizer states on each rank.

    Stage 1 shares the optimizer's states among ranks, stage 2 gradients too, stage 3 weights too; while a layer is computed
    stage 3 holds it whole.

    Args:
        states: of the whole model.
        zero: stage of ZeRO, 0 to 3.
        ranks: how many share.
        layer: bytes of the largest layer.
    """
    weights = states.frozen + states.trained * states.weight
    gradients, optimizer = states.trained * states.gradient, states.trained * states.optimizer
    if zero >= 1:
        optimizer /= ranks
    if zero >= 2:
        gradients /= ranks
    if zero >= 3:
        weights = weights / ranks + (layer if ranks > 1 else 0)
    return weights, gradients, optimizer


def activations(shape: Shape, tokens: int, longest: int, trees: int, rank: int, width: int) -> float:
    """What autograd keeps of a forward pass over a row.

    A token of a layer keeps: the two residual streams and two normed inputs (4 H), query and what attention gave (2 H), the
    MLP's gate before and after its activation, its other half and their product (4 I), and what is inside the seven adapters
    (7 r). A packed row keeps keys and values as every head sees them (2 H), and a row of the mask; trees keep them as they
    are, and as a padded batch query, keys and values (3 H) and each head's weights.

    Args:
        tokens: of the row.
        longest: tokens of its longest tree; of a packed row, its length.
        trees: how many; 0 for a packed row.
        rank: of the adapters; 0 where all weights are trained.
        width: bytes of an element.
    """
    h, inner = shape.hidden, shape.inner
    once = 6 * h + 4 * inner + 7 * rank
    if not trees:
        return shape.layers * tokens * (once + 2 * h + tokens) * width
    padded = trees * longest * (3 * h + shape.heads * longest)
    kept = tokens * (once + 2 * h * shape.kv_heads // shape.heads) + padded
    return shape.layers * kept * width


class Job(NamedTuple):
    """What the memory of a stage depends on; whoever plans replaces ranks, stage of ZeRO or row.

    Attributes:
        shape: of the model.
        states: what is trained, without DeepSpeed.
        rank: of the adapters; 0 where all weights are trained.
        width: bytes of the compute type.
        row: tokens of the largest micro-batch, of its longest tree, and how many trees; 0 for a packed row.
        logits: bytes that are held of them at once.
        least: bytes of a phase with no activations kept, such as sampling.
        cache: keys and values of PPO's answers in bytes, over all ranks.
        micros: micro-batches of an optimizer step, on a rank.
        recompute: whether activations are checkpointed: each layer's input is kept, and one layer's activations at a time.
    """

    shape: Shape
    states: States
    rank: int
    width: int
    row: tuple[int, int, int]
    logits: float
    least: float = 0.0
    cache: float = 0.0
    ranks: int = 1
    zero: int = 0
    offload: Offload = "none"
    micros: int = 1
    recompute: bool = False


def under_deepspeed(states: States, width: int) -> States:
    """The states that ZeRO shares out: everything in the compute type, and an fp32 master copy of what is trained.

    DeepSpeed makes the copy under fp32 as well.
    """
    return States(states.frozen, states.trained, width, width, 4 + 8)


def peak(job: Job, device: Device) -> Memory:
    """The peak of a job on one rank.

    In a step of one micro-batch the backward pass frees activations as it makes gradients, so that these come on top of what
    the step itself needs, not of all activations; gradients that are accumulated lie beside both.
    """
    shape, states, width = job.shape, job.states, job.width
    kept = activations(shape, *job.row, job.rank, width)
    if job.recompute:
        kept = kept / shape.layers + shape.layers * job.row[0] * shape.hidden * width
    kept *= WASTE[device]["trees" if job.row[2] else "packed"]
    runtime, buffers, host, step = RUNTIME[device], 0.0, 0.0, 0.0
    if job.zero:
        states = under_deepspeed(states, width)
        runtime += DEEPSPEED[device]
        buffers = _bucket(job, device) * width
        step = 3 * 4 * states.trained / job.ranks  # the flat gradient in fp32, and two temporaries of Adam
    elif job.ranks > 1:
        buffers = states.trained * states.gradient  # DDP's buckets are a copy of the gradients
    live = min(shape.parameters, LIVE) * width
    weights, gradients, optimizer = sharded(states, job.zero, job.ranks, live)
    if job.zero and job.offload != "none":
        host, optimizer, step = optimizer + step, 0.0, 0.0
    if job.zero == 3 and job.offload == "all" and job.ranks > 1:
        host, weights = host + weights - live, live
    sampling = job.least + job.cache / job.ranks
    beside = 0.0 if job.micros == 1 else gradients
    during = max(kept + beside, sampling + beside, gradients + step) - gradients
    return Memory(runtime, weights, gradients, optimizer, during, job.logits, buffers, host)


def _bucket(job: Job, device: Device) -> float:
    """Elements of DeepSpeed's buffers: in which gradients are gathered, and of weights on their way.

    A GPU has the first twice, at its full size; a CPU's pages come as they are touched. Stage 3 gathers a bucket of weights
    ahead, and copies it from the ranks' parts to where it is used.
    """
    gradients = 2 * BUCKET if device == "cuda" else min(BUCKET, job.states.trained)
    return gradients + 2 * min(PREFETCH, job.shape.parameters) * (job.zero == 3 and job.ranks > 1)


def predict(facts: Facts, stage: str, device: Device, width: int, zero: int | None = None) -> Memory | None:
    """The peak of a stage's training on one rank; None where the model's sizes or the rows are not known.

    Args:
        device: ``cpu`` or ``cuda``.
        width: bytes of the compute type.
        zero: stage of ZeRO; by default the recipe's.
    """
    job = job_of(facts, stage, width)
    if job is None:
        return None
    return peak(job if zero is None else job._replace(zero=zero), device)


def job_of(facts: Facts, stage: str, width: int, micro: int = 0) -> Job | None:
    """What the recipe asks of a rank; None where the model's sizes or the rows are not known.

    Args:
        width: bytes of the compute type.
        micro: rows of a micro-batch; 0 takes the recipe's.
    """
    shape, table, launch = facts.shape, getattr(facts.recipe, stage), facts.recipe.launch
    row = largest_row(facts, stage, micro)
    if not shape.layers or row is None:
        return None
    lora = table.tune == "lora"
    trained = shape.adapter(table.lora_rank) if lora else shape.parameters
    chunk = DISTILL_TOKENS * 5 if stage == "distill" else 3 * min(row[0], HEAD_TOKENS)
    logits = 0.0 if stage == "reward" else chunk * shape.vocabulary * 4.0
    least = _scoring(facts, width) if stage == "reward" else 0.0
    cache = 0.0
    if stage == "ppo" and table.engine == "local":  # the sampler's whole copy of the policy goes before the update begins
        least, cache = shape.parameters * width, table.rollouts * row[1] * shape.cached * width
    rank, states = table.lora_rank if lora else 0, _states(facts, stage, trained, width)
    where, micros = (launch.world, launch.zero, launch.offload), micro_batches(facts, stage)
    return Job(shape, states, rank, width, row, logits, least, cache, *where, micros, launch.gradient_checkpointing)


def micro_batches(facts: Facts, stage: str) -> int:
    """Micro-batches of an optimizer step on a rank."""
    table, world = getattr(facts.recipe, stage), facts.recipe.launch.world
    if stage == "ppo":
        return max(1, table.rollouts // table.minibatches // (table.micro_batch_size * world))
    if stage == "distill":
        return max(1, table.batch_size // (table.micro_batch_size * world))
    return max(1, facts.loader(stage)[1])


def _states(facts: Facts, stage: str, trained: int, width: int) -> States:
    """Adapters are in fp32 whatever the base is in; a whole model is trained in its own type (PPO's copy in fp32)."""
    shape, table = facts.shape, getattr(facts.recipe, stage)
    lora, base = table.tune == "lora", shape.parameters * width
    if stage == "ppo":
        others = ("reward" in table.rewards) + (table.parent != _base_of(facts))  # frozen adapters: reward, reference
        critic = shape.adapter(table.lora_rank) if table.advantage == "gae" else 0
        policy = trained + critic
        return States(base + 4 * others * shape.adapter(table.lora_rank), policy, 4, 4, 8)
    return States(base, trained, 4, 4, 8) if lora else States(0, trained, width, width, 2 * width)


def _base_of(facts: Facts) -> str:
    from truthward.recipe import ppo_base

    return ppo_base(facts.recipe)


def _scoring(facts: Facts, width: int) -> float:
    """A pass of the preference model over labelled pairs, without gradients: attention's scores of a layer, three times."""
    pairs = facts.rows(facts.recipe.reward.principle_bank, Pair)
    texts = [facts.render(chat.user(p.prompt)) + p.better + p.worse for p in pairs]
    longest = max(facts.lengths(texts), default=0)
    return 3 * SCORED * facts.shape.heads * longest**2 * width + SCORED * longest * facts.shape.inner * 4 * width


def largest_row(facts: Facts, stage: str, micro: int = 0) -> tuple[int, int, int] | None:
    """Tokens of the largest micro-batch that training is likely to draw, of its longest tree, and how many trees it has."""
    table = getattr(facts.recipe, stage)
    if stage == "ppo":
        prompts = [p.prompt for p in facts.rows(table.prompts, Prompt)]
        lengths = [n + table.max_new_tokens for n in facts.lengths([facts.render(chat.user(t)) for t in prompts])]
        micro, draws = micro or table.micro_batch_size, table.iterations * table.rollouts
    elif stage == "distill":
        return None
    else:
        lengths, draws = facts.tokens(stage), int(table.epochs * len(facts.tokens(stage)))
        micro = min(micro or table.micro_batch_size, table.batch_size)
    if not lengths:
        return None
    if stage == "sft" and table.packing:
        return min(table.max_length, sum(lengths)), min(table.max_length, sum(lengths)), 0
    drawn = random.Random(facts.recipe.seed).choices(lengths, k=max(draws, micro))
    rows = [drawn[i : i + micro] for i in range(0, len(drawn) - micro + 1, micro)]
    row = max(rows, key=lambda some: (sum(some), max(some)))
    longest = max(row)
    if stage == "sft":  # padded to the longest, and attended to as packed rows are
        return longest * micro, longest * micro, 0
    beside = facts.replayed(stage) if stage == "dpo" else []
    if beside:  # a micro-batch has one more than the average at most
        count = math.ceil(micro * table.replay_share)
        longest, size = max(longest, max(beside) + table.replay_tokens), sum(beside) / len(beside) + table.replay_tokens
        return sum(row) + int(count * size), longest, len(row) + count
    return sum(row), longest, len(row)
