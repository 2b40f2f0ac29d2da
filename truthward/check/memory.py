"""How much memory a stage will take at its peak, part by part, on each rank and under each stage of ZeRO.

Weights, gradients and optimizer states are counted as Rajbhandari et al. 2020 (arXiv 1910.02054, section 3) count them.
Activations are the tensors that autograd keeps of our layers, counted by kind; what the allocator wastes on top of them
was measured (``docs/check.md``). Units are bytes.
"""

from __future__ import annotations

import random
from typing import NamedTuple

from truthward import chat
from truthward.check.facts import Facts, Shape
from truthward.records import Pair, Prompt

GB = 2**30
RUNTIME = {"cpu": 0.58 * GB, "cuda": 0.6 * GB}  # Python with torch, transformers, peft and TRL; or a CUDA context
# what the allocator holds beyond live activations: glibc's heap is cut to pieces by tensors of ever new sizes, less so where
# each step has the same (packed sequences); CUDA's caching allocator rounds up
WASTE = {"cpu": {"packed": 1.55, "trees": 2.6}, "cuda": {"packed": 1.1, "trees": 1.25}}
HEAD_TOKENS, DISTILL_TOKENS = 256, 64  # positions whose logits are held at once (truthward.head, constitution.student)
SCORED = 16  # labelled pairs that the preference model scores in one pass


class Memory(NamedTuple):
    """Peak of one rank, by part."""

    runtime: float
    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        return sum(self)


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


def predict(facts: Facts, stage: str, device: str, width: int, zero: int | None = None) -> Memory | None:
    """The peak of a stage's training on one rank; None where the model's sizes or the rows are not known.

    Args:
        device: ``cpu`` or ``cuda``.
        width: bytes of the compute type.
        zero: stage of ZeRO; by default the recipe's.
    """
    shape, table, ranks = facts.shape, getattr(facts.recipe, stage), facts.recipe.launch.world
    row = largest_row(facts, stage)
    if not shape.layers or row is None:
        return None
    tokens, longest, trees = row
    lora = table.tune == "lora"
    trained = shape.adapter(table.lora_rank) if lora else shape.parameters
    states = _states(facts, stage, trained, width)
    layer = shape.parameters / shape.layers * width
    stage_of_zero = facts.recipe.launch.zero if zero is None else zero
    weights, gradients, optimizer = sharded(states, stage_of_zero, ranks, layer)
    kept = activations(shape, tokens, longest, trees, table.lora_rank if lora else 0, width)
    waste = WASTE[device]["trees" if trees else "packed"]
    chunk = DISTILL_TOKENS * 5 if stage == "distill" else 3 * min(tokens, HEAD_TOKENS)
    logits = 0.0 if stage == "reward" else chunk * shape.vocabulary * 4
    peak = max(kept * waste, _scoring(facts, width) if stage == "reward" else 0)
    if stage == "ppo":  # the sampler's copy of the policy goes before the update begins
        peak = max(peak, shape.parameters * width)
    return Memory(RUNTIME[device], weights, gradients, optimizer, peak, logits)


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


def largest_row(facts: Facts, stage: str) -> tuple[int, int, int] | None:
    """Tokens of the largest micro-batch that training is likely to draw, of its longest tree, and how many trees it has."""
    table = getattr(facts.recipe, stage)
    if stage == "ppo":
        prompts = [p.prompt for p in facts.rows(table.prompts, Prompt)]
        lengths = [n + table.max_new_tokens for n in facts.lengths([facts.render(chat.user(t)) for t in prompts])]
        micro, draws = table.micro_batch_size, table.iterations * table.rollouts
    elif stage == "distill":
        return None
    else:
        lengths, draws = facts.tokens(stage), int(table.epochs * len(facts.tokens(stage)))
        micro = min(table.micro_batch_size, table.batch_size)
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
    return sum(row), longest, len(row)
