"""Sampling answers in batches: left-padded prompts, one shared cache, finished rows dropped on the way.

Every prompt has its own seed, so an answer does not depend on which others share its batch. One uniform number a token
inverts the cumulative distribution; a softmax with ``multinomial`` over 49,152 words would cost as much as half the
layers. Only the last position passes through the LM head.

Shapes: B rows still running, V words.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from truthward.tensors import pad, positions


@dataclass
class Completion:
    """One sampled answer.

    Attributes:
        ids: its tokens, the end token included when it ended.
        logprobs: the sampler's log-probability of each token at the sampling temperature, nats.
        finished: it ended by itself, rather than at the limit.
    """

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finished: bool = False


@torch.inference_mode()
def generate(
    model: Any,
    prompts: list[list[int]],
    seeds: list[int],
    *,
    eos: int,
    pad_id: int,
    max_new_tokens: int,
    temperature: float,
    batch_size: int = 32,
    tick: Callable[[int], None] = lambda n: None,
) -> list[Completion]:
    """Sample one answer for each prompt.

    Args:
        model: a causal LM.
        prompts: token ids up to where the assistant begins.
        seeds: one for each prompt; equal seed, prompt and model give an equal answer.
        eos, pad_id: ids of the end and padding tokens.
        max_new_tokens: longest answer.
        temperature: logits are divided by it; 0 takes the most likely token.
        batch_size: rows sampled together.
        tick: called with the number of answers done, for a progress bar.

    Returns:
        a :class:`Completion` for each prompt, in the order given.
    """
    done = [Completion() for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        _sample_batch(model, prompts, seeds, done, batch, eos, pad_id, max_new_tokens, temperature)
        tick(len(batch))
    return done


def _sample_batch(
    model: Any,
    prompts: list[list[int]],
    seeds: list[int],
    done: list[Completion],
    batch: list[int],
    eos: int,
    pad_id: int,
    limit: int,
    temperature: float,
) -> None:
    device = next(model.parameters()).device
    ids, mask = (t.to(device) for t in pad([prompts[i] for i in batch], pad_id, side="left"))
    uniform = torch.stack([torch.rand(limit, generator=torch.Generator().manual_seed(seeds[i])) for i in batch])
    uniform, position = uniform.to(device), positions(mask)
    cache, running = DynamicCache(config=model.config), batch
    last = torch.tensor([-1], device=device)  # an index copies; a slice would send the head down a slow strided product
    for step in range(limit):
        out = model(
            input_ids=ids,
            attention_mask=mask.long(),
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=last,
        )
        token, logprob = sample(out.logits[:, -1], uniform[:, step], temperature)
        for i, t, p in zip(running, token.tolist(), logprob.tolist(), strict=True):
            done[i].ids.append(t)
            done[i].logprobs.append(p)
            done[i].finished = t == eos
        alive = token != eos
        if not alive.any():
            return
        ids, position = token.unsqueeze(1), position[:, -1:] + 1
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        if not alive.all():
            keep = alive.nonzero().squeeze(1)
            cache.batch_select_indices(keep)
            running = [running[k] for k in keep.tolist()]
            ids, position, mask, uniform = ids[keep], position[keep], mask[keep], uniform[keep]


def sample(logits_BV: Tensor, uniform_B: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """One token a row by inverting the cumulative distribution at a uniform number.

    Returns:
        token ids ``[B]`` and their log-probabilities ``[B]`` (nats) at this temperature.
    """
    if temperature == 0:
        return logits_BV.argmax(-1), torch.zeros(len(logits_BV))
    logits_BV = logits_BV.float() / temperature
    logprobs_BV = logits_BV - logits_BV.logsumexp(-1, keepdim=True)
    cumulative_BV = logprobs_BV.exp().cumsum_(-1)
    point_B1 = uniform_B.unsqueeze(1) * cumulative_BV[:, -1:]
    token_B = torch.searchsorted(cumulative_BV, point_B1, right=True).squeeze(1).clamp(max=logits_BV.shape[1] - 1)
    return token_B, logprobs_BV.gather(1, token_B.unsqueeze(1)).squeeze(1)
