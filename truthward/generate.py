"""Sampling answers in batches: rows that have ended leave, and waiting prompts take their place.

Every prompt has its own seed, so an answer does not depend on which others share its batch; it may have its own temperature
and limit too, so that greedy and sampled answers come out of one call. Equal prompts that begin together are computed once.
One uniform number a token inverts the cumulative distribution, in two levels: a softmax with ``multinomial`` over 49,152
words would cost as much as half the layers. Only the last position passes through the LM head.

Models of the Llama family go through :mod:`truthward.decoder`, all others through their own forward pass.

Shapes: B rows still running, V words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from truthward.decoder import Decoder, is_plain, supports
from truthward.tensors import pad, positions

SPAN = 256  # words in one block of the two-level search


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


class Rows(Protocol):
    """Rows that began together, as an engine keeps them."""

    def __len__(self) -> int: ...

    def keep(self, alive: Tensor) -> Tensor:
        """Drop rows; returns the old index of each that is left."""


class Engine(Protocol):
    """What computes logits: :class:`truthward.decoder.Decoder` or :class:`PlainModel`."""

    blocks: int
    device: torch.device

    def prefill(self, prompts: list[list[int]], limit: int) -> tuple[Any, Tensor]:
        """Begin rows; returns them and their first logits ``[B, V]``."""

    def step(self, blocks: Sequence[Any], tokens: Tensor) -> Tensor:
        """Append a token to every row ``[B]``; returns the next logits ``[B, V]``."""


@torch.inference_mode()
def generate(
    model: Any,
    prompts: list[list[int]],
    seeds: list[int],
    *,
    eos: int,
    pad_id: int,
    max_new_tokens: int | Sequence[int],
    temperature: float | Sequence[float],
    batch_size: int = 32,
    tick: Callable[[int], None] = lambda n: None,
) -> list[Completion]:
    """Sample one answer for each prompt.

    Args:
        model: a causal LM, a :class:`Decoder` or a :class:`PlainModel`.
        prompts: token ids up to where the assistant begins.
        seeds: one for each prompt; equal seed, prompt and model give an equal answer.
        eos, pad_id: ids of the end and padding tokens.
        max_new_tokens: longest answer; one for all, or one for each prompt.
        temperature: logits are divided by it, 0 takes the most likely token; one for all, or one for each prompt.
        batch_size: rows sampled together.
        tick: called with the number of answers done, for a progress bar.

    Returns:
        a :class:`Completion` for each prompt, in the order given.
    """
    engine = engine_for(model, pad_id)
    limits, heats = _each(max_new_tokens, len(prompts)), _each(temperature, len(prompts))
    shared = heats[0] if len(set(heats)) == 1 else None
    done = [Completion() for _ in prompts]
    waiting = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), prompts[i]))  # equal prompts side by side
    size = max(1, batch_size // engine.blocks)
    running: list[_Running] = []
    while waiting or running:
        free = batch_size - sum(len(r.prompts) for r in running)
        if waiting and free >= min(size, len(waiting)):
            some = [waiting.pop() for _ in range(min(size, len(waiting)))]
            own = [limits[i] for i in some]
            block, logits = engine.prefill([prompts[i] for i in some], max(own))
            new = _Running(
                block,
                some,
                _uniform([seeds[i] for i in some], own).to(engine.device),
                torch.tensor(own),
                torch.tensor([heats[i] for i in some], device=engine.device),
            )
            running.append(new)
            stepped = [new]
        else:
            logits = engine.step([r.block for r in running], torch.cat([r.tokens for r in running]))
            stepped = running
        uniform = torch.cat([r.uniform[:, r.step] for r in stepped])
        heat = torch.cat([r.temperature for r in stepped]) if shared is None else shared
        tokens, logprobs = sample(logits, uniform, heat)
        sizes = [len(r.prompts) for r in stepped]
        for r, t, p in zip(stepped, tokens.split(sizes), logprobs.split(sizes), strict=True):
            tick(r.record(done, t, p, eos))
        running = [r for r in running if r.prompts]
    return done


@dataclass
class _Running:
    """A block of an engine, with what sampling must know of its rows."""

    block: Rows
    prompts: list[int]
    uniform: Tensor
    limits: Tensor
    temperature: Tensor
    step: int = 0
    tokens: Tensor = field(default_factory=lambda: torch.empty(0))

    def record(self, done: list[Completion], tokens: Tensor, logprobs: Tensor, eos: int) -> int:
        """Note a token of each row and drop the rows that have ended; returns how many."""
        for i, t, p in zip(self.prompts, tokens.tolist(), logprobs.tolist(), strict=True):
            done[i].ids.append(t)
            done[i].logprobs.append(p)
            done[i].finished = t == eos
        self.step += 1
        self.tokens = tokens
        before, alive = len(self.prompts), (tokens != eos) & (self.limits > self.step).to(tokens.device)
        if not alive.any():
            self.prompts = []
        elif not alive.all():
            order = self.block.keep(alive)
            self.prompts = [self.prompts[k] for k in order.tolist()]
            self.uniform, self.tokens, self.temperature = self.uniform[order], tokens[order], self.temperature[order]
            self.limits = self.limits[order.cpu()]
        return before - len(self.prompts)


def _each(value: float | Sequence[Any], count: int) -> list[Any]:
    """A value for each prompt, from one for all or one for each.

    Raises:
        ValueError: there are more or fewer than prompts.
    """
    values = [value] * count if isinstance(value, int | float) else list(value)
    if len(values) != count:
        raise ValueError(f"{count} prompts, and {len(values)} values")
    return values


def engine_for(model: Any, pad_id: int) -> Engine:
    """The lean decoder where it knows the model, else the model's own forward pass."""
    if isinstance(model, Decoder | PlainModel):
        return model
    return Decoder.share(model) if supports(model) and is_plain(model) else PlainModel(model, pad_id)


@dataclass
class PlainRows:
    """Left-padded rows with a cache of transformers."""

    cache: DynamicCache
    mask: Tensor
    position: Tensor

    def __len__(self) -> int:
        return len(self.mask)

    def keep(self, alive: Tensor) -> Tensor:
        """Drop the rows that are not ``alive`` ``[B]``; returns the old index of each row that is left."""
        order = alive.nonzero().squeeze(1)
        self.cache.batch_select_indices(order)
        self.mask, self.position = self.mask[order], self.position[order]
        return order


class PlainModel:
    """Any causal LM of transformers, by its own forward pass."""

    blocks = 1  # one call a block: more of them would only cost

    def __init__(self, model: Any, pad_id: int) -> None:
        self.model, self.pad_id = model, pad_id
        self.device = next(model.parameters()).device
        # an index copies; a slice would send the head down a slow strided product
        self.last = torch.tensor([-1], device=self.device)

    def prefill(self, prompts: list[list[int]], limit: int) -> tuple[PlainRows, Tensor]:
        """Begin rows, equal prompts computed once; returns the rows and their first logits ``[B, V]``."""
        once = list(dict.fromkeys(map(tuple, prompts)))
        ids, mask = (t.to(self.device) for t in pad([list(p) for p in once], self.pad_id, side="left"))
        rows = PlainRows(DynamicCache(config=self.model.config), mask, positions(mask))
        logits = self._forward(rows, ids)
        if len(once) < len(prompts):
            place = {prompt: i for i, prompt in enumerate(once)}
            copies = torch.tensor([place[tuple(p)] for p in prompts], device=self.device)
            rows.cache.batch_select_indices(copies)
            rows.mask, rows.position, logits = rows.mask[copies], rows.position[copies], logits[copies]
        return rows, logits

    def step(self, blocks: Sequence[PlainRows], tokens: Tensor) -> Tensor:
        """Append a token to every row ``[B]``; returns the next logits ``[B, V]``."""
        logits = []
        for rows, part in zip(blocks, tokens.split([len(b) for b in blocks]), strict=True):
            rows.mask = torch.cat([rows.mask, torch.ones_like(rows.mask[:, :1])], 1)
            rows.position = rows.position[:, -1:] + 1
            logits.append(self._forward(rows, part.unsqueeze(1)))
        return torch.cat(logits)

    def _forward(self, rows: PlainRows, ids: Tensor) -> Tensor:
        return self.model(
            input_ids=ids,
            attention_mask=rows.mask.long(),
            position_ids=rows.position,
            past_key_values=rows.cache,
            use_cache=True,
            logits_to_keep=self.last,
        ).logits[:, -1]


def _uniform(seeds: list[int], counts: list[int]) -> Tensor:
    """As many numbers for each seed as are asked of it, zeros after them ``[B, largest count]``."""
    drawn = [torch.rand(n, generator=torch.Generator().manual_seed(seed)) for seed, n in zip(seeds, counts, strict=True)]
    return torch.stack([F.pad(numbers, (0, max(counts) - len(numbers))) for numbers in drawn])


def sample(logits_BV: Tensor, uniform_B: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    """One token a row by inverting the cumulative distribution at a uniform number.

    The search goes over sums of ``SPAN`` words, then within the span it falls in: two short sums instead of one over V.

    Args:
        temperature: of all rows, or of each ``[B]``; rows at 0 take their most likely token.

    Returns:
        token ids ``[B]`` and their log-probabilities ``[B]`` (nats) at this temperature; 0 for rows at temperature 0.
    """
    if isinstance(temperature, Tensor):
        return _sample_each(logits_BV, uniform_B, temperature)
    if temperature == 0:
        return logits_BV.argmax(-1), torch.zeros(len(logits_BV), device=logits_BV.device)
    logits_BV = logits_BV.float()
    return _draw(logits_BV if temperature == 1 else logits_BV / temperature, uniform_B)


def _sample_each(logits_BV: Tensor, uniform_B: Tensor, temperature_B: Tensor) -> tuple[Tensor, Tensor]:
    """The same where rows differ in temperature; only those above 0 pass through a softmax."""
    token_B, logprob_B = sample(logits_BV, uniform_B, 0)
    warm = (temperature_B > 0).nonzero().squeeze(1)
    if len(warm):
        heated = logits_BV[warm].float() / temperature_B[warm].unsqueeze(1)
        token_B[warm], logprob_B[warm] = _draw(heated, uniform_B[warm])
    return token_B, logprob_B


def _draw(logits_BV: Tensor, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
    p_BV = logits_BV.softmax(-1)
    spans_BVs = F.pad(p_BV, (0, -p_BV.shape[1] % SPAN)).unflatten(1, (-1, SPAN))
    sums_BV = spans_BVs.sum(-1)
    before_BV = sums_BV.cumsum(-1)
    span_B1, rest_B1 = _invert(before_BV, uniform_B.unsqueeze(1) * before_BV[:, -1:])
    within_Bs = spans_BVs.take_along_dim(span_B1.unsqueeze(2), 1).squeeze(1).cumsum(-1)
    word_B1, _ = _invert(within_Bs, rest_B1)
    token_B1 = (span_B1 * SPAN + word_B1).clamp(max=p_BV.shape[1] - 1)
    return token_B1.squeeze(1), p_BV.gather(1, token_B1).log().squeeze(1)


def _invert(cumulative_BV: Tensor, point_B1: Tensor) -> tuple[Tensor, Tensor]:
    """First index whose cumulative sum exceeds the point ``[B, 1]``, and the point less what lies before that index.

    Rounding may put a point at or past the end, where an entry of no probability could be found; it is drawn back.
    """
    end_B1 = cumulative_BV[:, -1:]
    point_B1 = point_B1.clamp(min=0).minimum(torch.nextafter(end_B1, torch.zeros_like(end_B1)))
    index_B1 = torch.searchsorted(cumulative_BV, point_B1, right=True)
    index_B1 = index_B1.clamp(max=cumulative_BV.shape[1] - 1)  # NaN ends past the end; its log-probability will show it
    before_B1 = F.pad(cumulative_BV, (1, 0)).gather(1, index_B1)
    return index_B1, point_B1 - before_B1
