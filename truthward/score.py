"""log p(answer | prompt) for many answers to many prompts (see :mod:`truthward.branches`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from truthward.branches import Item, Trunk, grow_trunk, plant
from truthward.head import head_logprobs

SHARED, MEMBERS = 32, 4  # prompts whose first tokens are alike have these computed once: so many tokens, so many prompts


@torch.no_grad()
def answer_logprobs(
    model: Any, items: list[Item], tokens_a_batch: int = 2048, tick: Callable[[int], None] = lambda n: None
) -> list[list[list[float]]]:
    """Log-probability of every token of every answer.

    Args:
        model: a causal LM with a decoder and an output head.
        items: prompts with their answers.
        tokens_a_batch: about how many tokens go through one forward pass; 0: one item alone, so that as many items take as
            many passes.
        tick: called with the number of items done, for a progress bar.

    Returns:
        for each item, for each answer, its tokens' log-probabilities (nats, fp32), in the order given.
    """
    results: list[list[list[float]]] = [[] for _ in items]
    for members, shared in _groups(items) if tokens_a_batch else [(range(len(items)), 0)]:
        trunk = grow_trunk(model, items[members[0]].prompt[:shared]) if shared else None
        rest = [Item(items[i].prompt[shared:], items[i].answers) for i in members]
        for batch in _batches(rest, tokens_a_batch):
            logprobs = iter(_forward(model, [rest[k] for k in batch], trunk))
            for k in batch:
                results[members[k]] = [[next(logprobs) for _ in answer] for answer in rest[k].answers]
            tick(len(batch))
    return results


def answer_sums(model: Any, items: list[Item], **options: Any) -> list[list[float]]:
    """log p(answer | prompt) for each item and answer: the sum over its tokens, end token included."""
    return [[sum(a) for a in item] for item in answer_logprobs(model, items, **options)]


def _groups(items: list[Item]) -> list[tuple[list[int], int]]:
    """Item indices in groups whose prompts begin alike, with how many tokens they share; 0 where it isn't worth a pass."""
    alike: dict[tuple[int, ...], list[int]] = {}
    for i, item in enumerate(items):
        alike.setdefault(tuple(item.prompt[:SHARED]) if len(item.prompt) > SHARED else (), []).append(i)
    groups, others = [], []
    for start, members in alike.items():
        if start and len(members) >= MEMBERS:
            prompts = [items[i].prompt for i in members]
            longest = min(map(len, prompts)) - 1  # a prompt's last token predicts the answers' first
            shared = next((n for n in range(longest) if len({p[n] for p in prompts}) > 1), longest)
            groups.append((members, shared))
        else:
            others += members
    return groups + ([(sorted(others), 0)] if others else [])


def _batches(items: list[Item], tokens: int) -> list[list[int]]:
    """Item indices, longest first, so that trees of one batch are about as long; at most ``tokens`` a batch, or one item."""
    batches: list[list[int]] = []
    room = 0
    for i in sorted(range(len(items)), key=lambda i: -items[i].length):
        if room < items[i].length:
            batches.append([])
            room = tokens
        batches[-1].append(i)
        room -= items[i].length
    return batches


def _forward(model: Any, items: list[Item], trunk: Trunk | None) -> list[float]:
    weight = next(model.parameters())
    forest = plant(items).to(weight.device)
    hidden_TH = model.get_decoder()(**forest.inputs(weight.dtype, trunk), use_cache=False).last_hidden_state[0]
    logprobs, _ = head_logprobs(model.get_output_embeddings(), hidden_TH[forest.source], forest.target)
    return logprobs.tolist()
