"""log p(answer | prompt) for many answers to many prompts (see :mod:`truthward.branches`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from truthward.branches import Item, plant
from truthward.tensors import token_logprobs

ROW_TOKENS = 512  # a row's attention grows with its square; longer items get a row of their own


@torch.inference_mode()
def answer_logprobs(
    model: Any, items: list[Item], tokens_a_batch: int = 2048, tick: Callable[[int], None] = lambda n: None
) -> list[list[list[float]]]:
    """Log-probability of every token of every answer.

    Args:
        model: a causal LM with a decoder and an output head.
        items: prompts with their answers.
        tokens_a_batch: about how many tokens go through one forward pass.
        tick: called with the number of items done, for a progress bar.

    Returns:
        for each item, for each answer, its tokens' log-probabilities (nats, fp32), in the order given.
    """
    results: list[list[list[float]]] = [[] for _ in items]
    rows = _fill_rows(items)
    per_batch = max(1, tokens_a_batch // ROW_TOKENS)
    for start in range(0, len(rows), per_batch):
        batch = rows[start : start + per_batch]
        logprobs = iter(_forward(model, [[items[i] for i in row] for row in batch]))
        for i in (i for row in batch for i in row):
            results[i] = [[next(logprobs) for _ in answer] for answer in items[i].answers]
        tick(sum(map(len, batch)))
    return results


def answer_sums(model: Any, items: list[Item], **options: Any) -> list[list[float]]:
    """log p(answer | prompt) for each item and answer: the sum over its tokens, end token included."""
    return [[sum(a) for a in item] for item in answer_logprobs(model, items, **options)]


def _fill_rows(items: list[Item]) -> list[list[int]]:
    """Best fit, longest first: rows of about ``ROW_TOKENS`` with little padding; item indices."""
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(items)), key=lambda i: -items[i].length):
        fits = [r for r in range(len(rows)) if room[r] >= items[i].length]
        if fits:
            best = min(fits, key=lambda r: room[r])
            rows[best].append(i)
            room[best] -= items[i].length
        else:
            rows.append([i])
            room.append(ROW_TOKENS - items[i].length)
    return rows


def _forward(model: Any, rows: list[list[Item]]) -> list[float]:
    forest, weight = plant(rows), next(model.parameters())
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    hidden_RTH = decoder(
        input_ids=forest.ids.to(weight.device),
        attention_mask=forest.additive(weight.dtype).to(weight.device),
        position_ids=forest.positions.to(weight.device),
        use_cache=False,
    ).last_hidden_state
    hidden_NH = hidden_RTH[forest.row.to(weight.device), forest.source.to(weight.device)]
    pieces = zip(hidden_NH.split(512), forest.target.to(weight.device).split(512), strict=True)  # bounds the logits held
    return torch.cat([token_logprobs(head(h), t) for h, t in pieces]).tolist()
